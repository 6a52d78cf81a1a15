"""Private features of TensorFlow that this library uses: these tests fail when they change."""

import pytest

from masked_layers import _tensorflow

pytestmark = pytest.mark.once


def test_gradients_that_tensorflow_registers_are_found_and_forgotten():
    import tensorflow as tf
    from tensorflow.python.framework import ops as framework

    @tf.custom_gradient
    def squared(x):
        return x**2, lambda upstream: upstream * 2 * x

    function = tf.function(squared)
    trace = function.get_concrete_function(tf.constant(1.0))
    (name,) = _tensorflow.gradient_names([trace.graph])
    assert name in framework.gradient_registry._registry
    _tensorflow.forget_gradients([name, "one that is not there"])
    assert name not in framework.gradient_registry._registry


def test_a_variable_can_be_kept_out_of_the_checkpoint_of_a_saved_model(tmp_path):
    import tensorflow as tf

    root = tf.Module()
    root.kept, root.left_out = tf.Variable([1.0, 2.0]), tf.Variable([3.0, 4.0])
    _tensorflow.keep_out_of_checkpoint(root.left_out)
    root.serve = tf.function(lambda: root.kept + root.left_out, input_signature=[])
    tf.saved_model.save(root, str(tmp_path))
    saved = tf.train.load_checkpoint(str(tmp_path / "variables" / "variables"))
    shapes = saved.get_variable_to_shape_map()
    assert [name for name, shape in shapes.items() if shape == [2]] == [
        "kept/.ATTRIBUTES/VARIABLE_VALUE"
    ]
    loaded = tf.saved_model.load(str(tmp_path))
    assert loaded.left_out.shape == (2,)


def test_operations_with_effects_are_known():
    stateful = ["AssignVariableOp", "ReadVariableOp", "StatefulPartitionedCall", "no such op"]
    assert [op for op in [*stateful, "MatMul", "Const"] if _tensorflow.is_stateful(op)] == stateful

"""Private names of Keras' graph of operations, checked against the installed Keras."""

import keras
import numpy as np
import pytest
from keras import layers

from masked_layers import _keras
from masked_layers.shrinking import _keras_graph
from shrunk import checked, randomize, zero

pytestmark = pytest.mark.usefixtures("nothing_drawn")


def test_graph_calls_lists_the_calls_in_order():
    x = keras.Input((4,))
    first, second = layers.Dense(3), layers.Dense(3)
    hidden = first(x)
    total = second(x) + hidden
    model = keras.Model(x, keras.activations.relu(total))
    calls = list(_keras_graph.graph_calls(model))
    operations = [operation for operation, *_ in calls]
    assert set(operations[:2]) == {first, second}
    assert type(operations[2]) is _keras_graph.ADD
    assert type(operations[3]) in _keras_graph.ELEMENTWISE_OPERATIONS
    _, args, kwargs, outputs = calls[2]
    assert args[1] is hidden
    assert kwargs == {}
    assert outputs[0] is total


@pytest.mark.once
@pytest.mark.parametrize(
    "name", ["elu", "gelu", "hard_sigmoid", "leaky_relu", "relu6", "selu", "silu", "tanh"]
)
def test_functions_on_symbolic_tensors_are_followed(name):
    x = keras.Input((4,))
    y = getattr(keras.ops, name)(layers.Dense(3, name="a")(x))
    model = randomize(keras.Model(x, layers.Dense(2)(y)))
    zero(model.get_layer("a"), [0])
    smaller, report = checked(model)
    assert (smaller.get_layer("a").units, report.not_followed) == (2, {})


def test_ones_like():
    ones = keras.ops.ones_like(keras.Input((4,)), dtype="int32")
    assert type(ones._keras_history.operation) is _keras_graph.ONES_LIKE


def test_symbolic_tensors_are_found_in_nested_arguments():
    a, b = keras.Input((4,), name="a"), keras.Input((2,), name="b")
    assert _keras_graph.is_tensor(a)
    assert not _keras_graph.is_tensor(keras.ops.zeros((4,)))
    arguments = ((a, 1.0), {"others": [b, None, keras.ops.zeros((2,))], "again": a})
    found = _keras_graph.tensors_in(arguments)
    assert [x.name for x in found] == [x.name for x in (a, a, b)]
    assert all(any(x is each for each in (a, b)) for x in found)


@pytest.mark.parametrize(
    "make",
    [lambda: keras.Input((4, 2)), lambda: keras.ops.ones((1, 4, 2))],
    ids=["symbol", "tensor"],
)
def test_carries_mask(make):
    assert not _keras.carries_mask(make())
    assert _keras.carries_mask(layers.Masking()(make()))


def test_calls_forgotten():
    """Keras' record of symbolic calls is private; a graph made in the scope stays whole."""
    layer = layers.TimeDistributed(layers.Dense(3))
    layer.build((None, 2, 4))
    inner = layer.layer
    x = keras.Input((4,))
    with _keras_graph.calls_forgotten(layer):
        graph = keras.Model(x, inner(x))
        assert inner.output is graph.output
    # On torch, the error is torch's.
    with pytest.raises(AttributeError, match=r"has never been called|no attribute .output"):
        _ = inner.output
    assert [operation for operation, *_ in _keras_graph.graph_calls(graph)] == [inner]
    assert graph.predict(np.ones((1, 4)), verbose=0).shape == (1, 3)
    assert keras.models.clone_model(graph).count_params() == 15


def test_get_item():
    assert type(keras.Input((4, 3))[:, 0]._keras_history.operation) is _keras_graph.GET_ITEM

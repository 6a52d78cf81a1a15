"""Functions compiled before a model was converted, masked or stripped in place."""

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner, training
from lottery_ticket_pruner.evidence import gradients
from masked_layers import compiled

BACKEND = keras.backend.backend()
X = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")


def compile_function(function):
    """Compiles as a user of TensorFlow would. torch cannot compile calls of Keras layers."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function)
    return function


class Task(keras.Model):
    """Compiles a function as keras-hub's CausalLM does: once, and keeps it in an attribute."""

    def __init__(self, backbone, **kwargs):
        super().__init__(backbone.inputs[0], backbone(backbone.inputs[0]), **kwargs)
        self.backbone = backbone
        self.generate_function = None

    def generate_step(self, x):
        return self(x) * 2

    def make_generate_function(self):
        if self.generate_function is None:
            if BACKEND == "jax":
                import jax

                variables = self.trainable_variables + self.non_trainable_variables

                @jax.jit
                def step(x, state):
                    scope = keras.StatelessScope(zip(variables, state, strict=True))
                    with scope:
                        return self.generate_step(x)

                self.generate_function = lambda x: step(x, [v.value for v in variables])
            else:
                self.generate_function = compile_function(self.generate_step)
        return self.generate_function

    def generate(self, x):
        x = keras.ops.convert_to_tensor(x)
        return keras.ops.convert_to_numpy(self.make_generate_function()(x))


def backbone():
    chain = [layers.Dense(5, name="in"), layers.Dense(2, name="out")]
    return keras.Sequential([keras.Input((4,)), *chain], name="backbone")


def oracle(model, x=X):
    """The backbone, without functions or layers of Keras."""
    values = {ref.path.split("/")[-2]: ref for ref in ml.weight_refs(model)}
    for name in ("in", "out"):
        ref = values[name]
        kernel = np.array(keras.ops.convert_to_numpy(ref.variable))
        if ref.mask is not None:
            keep = ref.mask.to_numpy()
            if ref.mask.rescale:
                kernel *= keep.size / keep.sum()
            frozen = ref.mask.frozen
            kernel[~keep] = 0 if frozen is None else keras.ops.convert_to_numpy(frozen)[~keep]
        x = x @ kernel  # Biases are still zero.
    return x


def prune(model, seed=1):
    rng = np.random.default_rng(seed)
    ml.set_masks(model, {p: rng.random(m.shape) < 0.5 for p, m in ml.get_masks(model).items()})


def near(actual, expected):
    assert np.std(expected) > 0
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def used_task():
    """A task, and models around and next to it, all of which have compiled functions."""
    task = Task(backbone())
    inputs = keras.Input((4,))
    outer = keras.Model(inputs, task(inputs) + 1)
    beside = keras.Sequential([keras.Input((4,)), *task.backbone.layers])
    apart = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
    for model in (task, outer, beside, apart):
        model.compile("sgd", "mse")
        model.predict_on_batch(X)
    task.generate(X)
    return task, outer, beside, apart


def check(task, outer, beside):
    near(task.generate(X), 2 * oracle(task))
    near(task.predict_on_batch(X), oracle(task))
    near(outer.predict_on_batch(X), oracle(task) + 1)
    near(beside.predict_on_batch(X), oracle(task))


def test_conversion_in_place_reaches_every_function_of_every_model():
    task, outer, beside, apart = used_task()
    check(task, outer, beside)
    kept = apart.predict_function
    ml.convert_to_masked(task, inplace=True)
    assert task.generate_function is None
    assert outer.predict_function is None
    assert apart.predict_function is kept
    prune(task)
    check(task, outer, beside)
    ml.strip_masks(task, inplace=True)
    check(task, outer, beside)
    for ref in ml.weight_refs(task):
        ref.variable.assign(
            np.arange(1.0, 1.0 + np.prod(ref.variable.shape)).reshape(ref.variable.shape)
        )
    check(task, outer, beside)  # A function with masks would drop half of these.


def test_converting_a_model_inside_reaches_the_models_around():
    task, outer, beside, _ = used_task()
    ml.convert_to_masked(task.backbone, inplace=True)
    prune(task.backbone)
    check(task, outer, beside)


@pytest.mark.slow("jax")
def test_hardening_in_place_reaches_every_function():
    task, outer, beside, _ = used_task()
    ml.convert_to_masked(task, mask=ml.EdgePopupMask(sparsity=0.5, seed=1), inplace=True)
    task.generate(X)
    for model in (task, outer, beside):
        model.predict_on_batch(X)
    ml.harden(task, inplace=True)
    prune(task, seed=2)
    check(task, outer, beside)


def test_frozen_values_and_rescaling_of_a_pruner_reach_every_function():
    task, outer, beside, _ = used_task()
    ml.convert_to_masked(task, inplace=True)
    pruner = LotteryTicketPruner(task)
    task.generate(X)
    for model in (task, outer, beside):
        model.predict_on_batch(X)
    pruner.update_masks("smallest_weights", sparsity=0.5)
    pruner.apply_dwr(task)
    check(task, outer, beside)
    pruner.treat(pruned="freeze")
    assert any(ref.mask.frozen is not None for ref in ml.masked_refs(task))
    check(task, outer, beside)


def test_functions_compiled_by_the_library_are_compiled_again_without_a_warning():
    """Fails if there is a warning."""
    model = ml.convert_to_masked(backbone())
    model.compile("sgd", "mse")
    y = np.zeros(model.predict_on_batch(X).shape, "float32")
    pruner = LotteryTicketPruner(model)
    for change in (None, "rescaled", "frozen"):
        training.train(model, X, y, steps=1, batch_size=len(X))
        if change == "rescaled":
            pruner.apply_dwr(model)
        elif change == "frozen":
            pruner.treat(pruned="freeze")
        pruner.update_masks("snip", sparsity=0.5, data=(X, y))
        measured = gradients.loss_gradients(model, X, y)
        fresh = ml.convert_to_masked(model)
        fresh.compile("sgd", "mse")
        for path, expected in gradients.loss_gradients(fresh, X, y).items():
            np.testing.assert_allclose(measured[path], expected, rtol=1e-5, atol=1e-7)


def test_a_file_with_another_factor_reaches_every_function(tmp_path):
    task, outer, beside, _ = used_task()
    ml.convert_to_masked(task, inplace=True)
    prune(task)
    other = ml.convert_to_masked(Task(backbone()), inplace=True)
    prune(other, seed=2)
    for ref in ml.masked_refs(other):
        ref.mask.rescale = True
    other.save_weights(tmp_path / "rescaled.weights.h5")
    for ref in ml.masked_refs(other):
        ref.mask.rescale = False
        ref.mask.freeze(np.ones(ref.variable.shape))
    other.save_weights(tmp_path / "frozen.weights.h5")
    for name in ("rescaled", "frozen"):
        check(task, outer, beside)
        task.load_weights(tmp_path / f"{name}.weights.h5")
    check(task, outer, beside)


def test_a_file_of_many_masks_is_loaded_with_one_collection_of_live_objects(tmp_path, monkeypatch):
    def make():
        inner = [layers.Dense(4) for _ in range(6)]
        return ml.convert_to_masked(keras.Sequential([keras.Input((4,)), *inner]))

    source = make()
    for ref in ml.masked_refs(source):
        ref.mask.value.assign(np.eye(4, dtype=bool))
        ref.mask.freeze(np.full(ref.variable.shape, 0.5, "float32"))
    source.save_weights(tmp_path / "frozen.weights.h5")
    model = make()
    last = keras.Sequential([keras.Input((4,)), model.layers[-1]])  # holds none of the others
    for user in (model, last):
        user.predict_on_batch(X)
    looks = []
    real = compiled._alive
    monkeypatch.setattr(compiled, "_alive", lambda cls: looks.append(cls) or real(cls))
    for _ in range(2):  # One load leaves nothing behind for the next one.
        looks.clear()
        model.load_weights(tmp_path / "frozen.weights.h5")
        assert looks.count(keras.Model) == 1
        for user, like in ((model, source), (last, keras.Sequential(source.layers[-1:]))):
            expected = like(X)
            np.testing.assert_allclose(
                user.predict_on_batch(X), keras.ops.convert_to_numpy(expected), rtol=1e-5
            )
        for ref in ml.masked_refs(model):
            ref.mask.freeze(None)
        compiled.forget_functions(model)
        assert not np.allclose(model.predict_on_batch(X), source.predict_on_batch(X))
        last.predict_on_batch(X)


@pytest.mark.once
def test_custom_functions_are_named():
    model = backbone()

    def my_step(x):
        return model(x)

    step, other = compile_function(my_step), compile_function(lambda x: x + 1)
    step(X), other(X)
    with pytest.warns(UserWarning, match=r"'backbone' has changed.*\['my_step'\]") as caught:
        ml.convert_to_masked(model, inplace=True)
    assert caught[0].filename == __file__
    prune(model)
    step = compile_function(my_step)
    near(step(X), oracle(model))
    with pytest.warns(UserWarning, match="my_step"):
        ml.strip_masks(model, inplace=True)


def test_functions_of_models_inside_are_found():
    model = backbone()
    model.compile("sgd", "mse")
    model.predict_on_batch(X)
    outer = keras.Sequential([keras.Input((3, 4)), layers.TimeDistributed(model)])
    compiled.forget_functions(outer, around=False)
    assert model.predict_function is None
    near(model.predict_on_batch(X), oracle(model))

"""Keras models that predict with sparse kernels: what they compute, and what they refuse."""

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from winning_kernels import let_win

RNG = np.random.default_rng(0)
on_torch = [
    pytest.mark.once("torch"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


def marked(function):
    for mark in on_torch:
        function = mark(function)
    return function


@pytest.fixture
def sparse_wins(monkeypatch):
    """Lets the sparse kernels win everywhere."""
    pytest.importorskip("torch")
    let_win(monkeypatch, "csr", "sparse")


def pruned(model, sparsity=0.8):
    model = ml.convert_to_masked(model)
    masks = {path: RNG.random(m.shape) >= sparsity for path, m in ml.get_masks(model).items()}
    ml.set_masks(model, masks)
    return model


def image():
    return keras.Sequential(
        [
            keras.Input((7, 7, 3)),
            layers.Conv2D(6, 3, padding="same", activation="relu"),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(4),
        ]
    )


def several():
    a, b = keras.Input((4, 8), name="a"), keras.Input((6,), dtype="int32", name="b")
    attended = layers.MultiHeadAttention(2, 4)(a, a)
    x = layers.EinsumDense("abc,bcd->ad", 3)(attended)
    y = layers.Dense(3, name="left")(layers.Flatten()(layers.Embedding(20, 5)(b)))
    return keras.Model({"a": a, "b": b}, [layers.Dense(2, name="right")(x), y])


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(5)

    def call(self, x):
        return {"y": self.dense(x), "x": x}


def subclassed():
    model = Subclassed()
    model(np.ones((1, 6), "float32"))
    return model


def drawn(model, rows):
    from masked_layers import _keras

    def draw(spec):
        shape = (rows, *spec.shape[1:])
        if spec.dtype == "int32":
            return RNG.integers(0, 20, shape).astype("int32")
        return RNG.normal(size=shape).astype("float32")

    return keras.tree.map_structure(draw, _keras.input_specs(model))


@marked
@pytest.mark.parametrize("make", [image, several, subclassed])
def test_predictions_are_those_of_the_model(make, sparse_wins):
    model = pruned(make())
    before = model.get_weights(), ml.get_masks(model)
    fast = ml.accelerate(model, batch_size=2)
    assert {row.kernel for row in fast.report if row.site} == {"csr"}
    assert fast.report.output_error < 1e-5
    x = drawn(model, 5)
    found, wanted = fast.predict(x, verbose=0), model.predict(x, verbose=0)
    keras.tree.assert_same_structure(found, wanted)
    for one, other in zip(keras.tree.flatten(found), keras.tree.flatten(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())
    if make is not subclassed:
        assert [y.shape for y in fast.outputs] == [y.shape for y in model.outputs]
        assert [x.name for x in fast.inputs] == [x.name for x in model.inputs]
    for now, then in zip(model.get_weights(), before[0], strict=True):
        np.testing.assert_array_equal(now, then)
    for path, mask in ml.get_masks(model).items():
        np.testing.assert_array_equal(mask, before[1][path])
    assert all(variable.trainable for variable in model.trainable_variables)
    assert not fast.weights


@marked
def test_it_evaluates_like_the_model_and_refuses_to_train(sparse_wins, tmp_path):
    model = pruned(several())
    losses = {"left": "mse", "right": "mae"}
    model.compile("sgd", loss=losses, metrics={"left": ["mae"]})
    fast = ml.accelerate(model)
    x = drawn(model, 5)
    y = [RNG.normal(size=(5, size)).astype("float32") for size in (2, 3)]
    wanted = model.evaluate(x, y, verbose=0, return_dict=True)
    found = fast.evaluate(x, y, verbose=0, return_dict=True)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-4)
    for train in (lambda: fast.fit(x, y), lambda: fast.train_on_batch(x, y)):
        with pytest.raises(NotImplementedError, match="is for inference"):
            train()
    with pytest.raises(NotImplementedError, match="is for inference"):
        fast(x, training=True)
    for copied in (lambda: fast.save(tmp_path / "a.keras"), lambda: keras.models.clone_model(fast)):
        with pytest.raises(NotImplementedError, match="cannot be copied or saved"):
            copied()
    assert not list(tmp_path.iterdir())
    # It can be a part of another model.
    around = keras.Model(fast.inputs, fast(fast.inputs)[0] * 2)
    np.testing.assert_allclose(
        around.predict(x, verbose=0), 2 * fast.predict(x, verbose=0)[0], rtol=1e-6
    )


@marked
def test_kernels_are_measured_and_can_be_repeated():
    pytest.importorskip("torch")
    model = pruned(keras.Sequential([keras.Input((512,)), layers.Dense(512)]), 0.99)
    fast = ml.accelerate(model, batch_size=16, threads=1)
    report = fast.report
    assert report.batch_size == 16
    assert report.gain >= 1.0
    assert all(set(row.seconds) == {"dense", "csr", "csr/32"} for row in report if row.site)
    again = ml.accelerate(model, batch_size=16, threads=1, timings=report).report
    assert [row.kernel for row in again] == [row.kernel for row in report]
    assert again.program == report.program


@marked
def test_other_lengths_than_those_of_the_program_are_refused():
    pytest.importorskip("torch")
    model = keras.Sequential([keras.Input((None, 4)), layers.LSTM(3)])
    with pytest.warns(UserWarning, match=r"only inputs of the shapes \[\(7, 4\)\]"):
        fast = ml.accelerate(model, sample_inputs=np.ones((2, 7, 4)))
    x = RNG.normal(size=(3, 7, 4)).astype("float32")
    np.testing.assert_allclose(fast(x).numpy(), model(x).detach().numpy(), atol=1e-6)
    for steps in (6, 8):
        with pytest.raises(ValueError, match=r"expected shape=\(None, 7, 4\)"):
            fast.predict(np.ones((3, steps, 4)), verbose=0)


class OwnSteps(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(5)

    def call(self, x):
        return self.dense(x)

    def predict_step(self, data):
        return super().predict_step(data) + 100


def own_steps():
    model = OwnSteps()
    model(np.ones((1, 6), "float32"))
    return model


def padded():
    return keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(9, 4, mask_zero=True),
            layers.Dense(2, kernel_regularizer="l2", activity_regularizer="l1"),
        ]
    )


def penalized():
    dense = layers.Dense(2, kernel_regularizer="l2", activity_regularizer="l1")
    return keras.Sequential([keras.Input((6,)), dense])


@marked
@pytest.mark.parametrize(
    ("make", "message", "copied"),
    [
        (own_steps, r"\['predict_step'\] of OwnSteps are not called.* not copied", False),
        (padded, r"`mask_zero=True`.* not copied.*\(2, of regularizers or `add_loss`\)", False),
        (penalized, r"Losses that are added.*\(2, of regularizers or `add_loss`\)", True),
    ],
    ids=["steps", "masks", "losses"],
)
def test_what_evaluate_would_do_differently_is_said(make, message, copied):
    pytest.importorskip("torch")
    model = make()
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match=message):
        fast = ml.accelerate(model)
    assert fast.compiled is copied


@marked
def test_an_output_that_is_an_input_and_weights_files(tmp_path):
    pytest.importorskip("torch")
    x = keras.Input((6,), name="program")
    fast = ml.accelerate(keras.Model(x, [x, layers.Dense(4, name="b")(x)]))
    assert fast.output_names == ["program", "b"]
    inputs = RNG.normal(size=(3, 6)).astype("float32")
    np.testing.assert_array_equal(fast.predict(inputs, verbose=0)[0], inputs)
    with pytest.raises(NotImplementedError, match="cannot be copied or saved"):
        fast.save_weights(tmp_path / "a.weights.h5")
    with pytest.raises(NotImplementedError, match="cannot load weights"):
        fast.load_weights(tmp_path / "a.weights.h5")
    assert not list(tmp_path.iterdir())


@pytest.mark.once
def test_other_backends_are_told_what_to_do():
    if keras.backend.backend() == "torch":
        pytest.skip("torch has it")
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2)])
    with pytest.raises(RuntimeError, match=r"KERAS_BACKEND=torch.*export_sparse_torch"):
        ml.accelerate(model)

"""Compilation of the smaller model and the state of its optimizer."""

import keras
import numpy as np
import pytest
from keras import layers

from masked_layers import convert_to_masked, get_masks, set_masks, strip_masks
from masked_layers.shrinking import shrink
from shrunk import dense_net, numpy, randomize, widths, zero

pytestmark = pytest.mark.usefixtures("nothing_drawn")


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
}


@pytest.mark.parametrize("name", ["sgd", pytest.param("scaled", marks=pytest.mark.slow)])
def test_training_continues_where_it_was(name):
    """Trains both models further: they must end with equal outputs."""
    keras.utils.set_random_seed(0)
    x = keras.Input((6, 4))
    y = layers.Conv1D(6, 3, padding="same", name="a")(x)
    y = layers.ReLU()(layers.BatchNormalization()(y))
    y = layers.Conv1D(5, 3, activation="tanh", name="b")(y)
    model = randomize(keras.Model(x, layers.Dense(2, name="c")(layers.Flatten()(y))))
    model = convert_to_masked(model)
    model.compile(OPTIMIZERS[name](), "mse", metrics=["mae"])
    rng = np.random.default_rng(0)
    data = rng.normal(size=(16, 6, 4)).astype("float32"), rng.normal(size=(16, 2))
    options = {"batch_size": 8, "shuffle": False, "verbose": 0}
    model.fit(*data, **options)
    masks = get_masks(model)
    masks["a/kernel"][..., :2] = False
    masks["b/kernel"][:, :2] = False
    masks["b/kernel"][..., 4] = False
    masks["c/kernel"].reshape(4, 5, 2)[:, 4] = False
    set_masks(model, masks)
    model.fit(*data, **options)
    smaller = shrink(model)
    assert widths(smaller) == {"a": 4, "b": 4, "c": 2}
    assert smaller.optimizer.iterations == model.optimizer.iterations == 4
    for old, new in zip(model.optimizer.variables, smaller.optimizer.variables, strict=True):
        if old.shape == new.shape:
            np.testing.assert_array_equal(numpy(old), numpy(new))
        assert np.isin(numpy(new), numpy(old)).all()  # A slice of the original.
    for each in (model, smaller):
        each.fit(*data, epochs=2, **options)
    expected = model.evaluate(*data, verbose=0, return_dict=True)
    assert smaller.evaluate(*data, verbose=0, return_dict=True) == pytest.approx(expected, rel=1e-3)
    np.testing.assert_allclose(numpy(smaller(data[0])), numpy(model(data[0])), atol=1e-3)


class Counted(keras.metrics.Metric):
    def __init__(self, width):
        super().__init__()
        self.width = width

    def update_state(self, *args, **kwargs):
        pass

    def result(self):
        return self.width


@pytest.mark.once
def test_warns_and_leaves_the_model_uncompiled_if_it_cannot_be_compiled_again():
    model = dense_net(4, 2)
    model.compile("adam", lambda y, p: keras.ops.mean((y - p) ** 2))
    assert shrink(model).compiled
    model.compile("adam", "mse", metrics=[Counted(3)])
    with pytest.warns(UserWarning, match="is not compiled, because .* could not be compiled"):
        smaller = shrink(model)
    assert not smaller.compiled
    smaller.compile("sgd", "mse")
    smaller.fit(np.ones((4, 5)), np.ones((4, 2)), verbose=0)


@pytest.mark.once
@pytest.mark.parametrize("size", [4, 200])
def test_warns_and_resets_an_optimizer_whose_state_cannot_be_reduced(size):
    """Adafactor has a state for rows and one for columns, which are as long in a square kernel."""
    model = keras.Sequential([keras.Input((size,)), layers.Dense(200, name="a"), layers.Dense(150)])
    randomize(model)
    model.compile(keras.optimizers.Adafactor(0.01), "mse")
    model.fit(np.ones((8, size)), np.ones((8, 150)), verbose=0)
    zero(model.get_layer("a"), [0])
    with pytest.warns(UserWarning, match="was reset: the state of Adafactor"):
        smaller = shrink(model)
    assert smaller.get_layer("a").units == 199
    smaller.fit(np.ones((8, size)), np.ones((8, 150)), verbose=0)


@pytest.mark.parametrize("new_bias", [False, True])
@pytest.mark.parametrize("built", [False, True])
def test_what_weight_decay_leaves_out_stays_left_out(built, new_bias):
    inputs = keras.Input((3,))
    hidden = layers.Dense(4, "relu", name="hidden")
    out = layers.Dense(2, use_bias=not new_bias, name="out")
    model = randomize(keras.Model(inputs, out(hidden(inputs))))
    zero(hidden, [1])
    hidden.bias.assign([0.5, 0.5, 0.5, 0.5])  # the second unit is a constant, which `out` takes up
    optimizer = keras.optimizers.SGD(0.0, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_list=[out.kernel])
    model.compile(optimizer, "mse")
    if built:
        optimizer.build(model.trainable_variables)
    smaller = shrink(model)
    before = numpy(smaller.get_layer("out").kernel)
    smaller.optimizer.learning_rate = 0.1
    smaller.optimizer.apply(
        [keras.ops.zeros(v.shape) for v in smaller.trainable_variables],
        smaller.trainable_variables,
    )
    np.testing.assert_array_equal(numpy(smaller.get_layer("out").kernel), before)
    assert (numpy(smaller.get_layer("hidden").bias) < 0.5).all()


@pytest.mark.parametrize("copy", [convert_to_masked, lambda x: strip_masks(convert_to_masked(x))])
def test_copies_leave_out_of_weight_decay_what_the_original_does(copy):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    optimizer = keras.optimizers.SGD(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["kernel"])
    model.compile(optimizer, "mse")
    copied = copy(model)
    copied.layers[0].bias.assign([1.0, 1.0])
    variables = copied.trainable_variables
    copied.optimizer.apply([keras.ops.zeros(v.shape) for v in variables], variables)
    np.testing.assert_array_equal(numpy(copied.layers[0].kernel), numpy(model.layers[0].kernel))
    np.testing.assert_allclose(numpy(copied.layers[0].bias), [0.95, 0.95])

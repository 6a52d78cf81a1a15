"""Rescaling turned on and off: functions of Keras use the new factor at once."""

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner

X = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
Y = np.zeros((4, 2), "float32")
MASKS = {
    "first/kernel": np.eye(3, dtype=bool),
    "last/kernel": np.array([[1, 0], [1, 1], [0, 1]], dtype=bool),
}
FACTORS = {"first/kernel": 9 / 3, "last/kernel": 6 / 4}


def masked():
    inner = [layers.Dense(n, use_bias=False, name=name) for n, name in ((3, "first"), (2, "last"))]
    model = ml.convert_to_masked(keras.Sequential([keras.Input((3,)), *inner]))
    ml.set_masks(model, MASKS)
    return model


def outputs(model, rescaled):
    """Computes effective weights from raw weights, masks and some factors in NumPy."""
    y = X
    for ref in ml.masked_refs(model):
        kernel = np.where(MASKS[ref.path], keras.ops.convert_to_numpy(ref.variable), 0)
        y = y @ (kernel * (FACTORS[ref.path] if ref.path in rescaled else 1))
    return y


@pytest.mark.parametrize("trained", ["the model", "one around it"])
def test_a_switch_between_two_batches_of_fit_holds_from_the_next_on(trained):
    model = masked()
    user = keras.Sequential([keras.Input((3,)), model]) if trained == "one around it" else model
    user.compile(keras.optimizers.SGD(0.0), "mse")
    means = []

    class Switch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            means.append(logs["loss"])
            if batch == 1:
                ml.set_rescale(model, True)

    x, y = np.concatenate([X] * 4), np.concatenate([Y] * 4)
    user.fit(x, y, batch_size=len(X), shuffle=False, verbose=0, callbacks=[Switch()])
    losses = np.diff([0, *(n * mean for n, mean in enumerate(means, 1))])
    plain, rescaled = (np.mean(outputs(model, paths) ** 2) for paths in ((), MASKS))
    np.testing.assert_allclose(losses, [plain, plain, rescaled, rescaled], rtol=1e-4)


def test_masks_are_switched_by_path_and_in_functions_compiled_before():
    model = masked()
    for paths, rescale, switched in (
        ([], {}, False),
        (["last/kernel"], {"last/kernel": True}, True),
        (["last/kernel"], {"last/kernel": np.bool_(True)}, False),
        (list(MASKS), True, True),
        (["last/kernel"], {"first/kernel": False}, True),
        ([], False, True),
    ):
        assert ml.set_rescale(model, rescale) is switched
        assert [ref.path for ref in ml.masked_refs(model) if ref.mask.rescale is True] == paths
        found = model.predict_on_batch(X)
        np.testing.assert_allclose(found, outputs(model, paths), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("rescale", "message"),
    [
        ({"first/kernel": True, "other": True}, r"no masked weight at 'other'.*'last/kernel'"),
        ({"first/kernel": True, "last/kernel": 1}, "must be a bool, or a dict.*Received: 1"),
        ("yes", "must be a bool, or a dict.*Received: 'yes'"),
    ],
)
def test_invalid_values_are_refused_before_any_mask_is_switched(rescale, message):
    model = masked()
    with pytest.raises(ValueError, match=message):
        ml.set_rescale(model, rescale)
    assert not any(ref.mask.rescale for ref in ml.masked_refs(model))


def test_a_model_without_masks_is_refused():
    with pytest.raises(ValueError, match="has no masked weight"):
        ml.set_rescale(keras.Sequential([keras.Input((3,)), layers.Dense(2)]), True)


@pytest.mark.once("tensorflow")
@pytest.mark.parametrize(
    "switch",
    [lambda model: ml.set_rescale(model, True), lambda m: LotteryTicketPruner(m).apply_dwr(m)],
    ids=["of masks", "of the pruner"],
)
def test_a_custom_function_is_named_at_the_line_of_its_user(switch):
    import tensorflow as tf

    model = masked()

    @tf.function
    def my_step(x):
        return model(x)

    my_step(X)
    with pytest.warns(UserWarning, match=r"has changed, but functions.*\['my_step'\]") as caught:
        switch(model)
    assert [warning.filename for warning in caught] == [__file__]

"""Class weights and validation splits in `training.fit` mean the same as in Keras' `fit`."""

import keras
import numpy as np
import pytest

from lottery_ticket_pruner import training

RNG = np.random.default_rng(0)
X = RNG.normal(size=(42, 4)).astype("float32")
Y = RNG.integers(3, size=42)
WEIGHTS = {0: 3.0, 2: 0.25}


def compiled(one_hot=False):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="softmax")])
    loss = "categorical_crossentropy" if one_hot else "sparse_categorical_crossentropy"
    model.compile(keras.optimizers.SGD(0.1), loss, weighted_metrics=["accuracy"])
    return model


@pytest.mark.parametrize("kind", ["column", "one-hot"])
def test_they_mean_the_same_as_in_keras(kind):
    one_hot = kind == "one-hot"
    y = np.eye(3, dtype="float32")[Y] if one_hot else Y[:, None]
    options = {"batch_size": 9, "epochs": 2, "shuffle": False, "validation_split": 0.31}
    results = []
    for fit in (keras.Model.fit, training.fit):
        model = compiled(one_hot)
        history = fit(model, X, y, class_weight=WEIGHTS, verbose=0, **options).history
        results.append(
            {"weights": np.concatenate([w.ravel() for w in model.get_weights()]), **history}
        )
    theirs, ours = results
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        np.testing.assert_allclose(ours[name], values, rtol=1e-4, atol=1e-6)


@pytest.mark.once
def test_a_split_is_ignored_beside_validation_data_and_keeps_sample_weights():
    weights = RNG.random(42)
    model = compiled()
    history = training.fit(
        model, X, Y, sample_weight=weights, validation_split=0.5, batch_size=42, shuffle=False
    )
    expected = model.evaluate(X[21:], Y[21:], sample_weight=weights[21:], verbose=0)[0]
    assert history.history["val_loss"][-1] == pytest.approx(expected, rel=1e-5)
    both = training.fit(model, X, Y, validation_split=0.5, validation_data=(X[:3], Y[:3]))
    expected = model.evaluate(X[:3], Y[:3], verbose=0)[0]
    assert both.history["val_loss"][-1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_split": 1.0}, r"`validation_split` must be between 0 and 1"),
        ({"validation_split": -0.1}, r"must be between 0 and 1\. Received: -0\.1"),
        ({"validation_split": "half"}, r"must be between 0 and 1\. Received: 'half'"),
        ({"validation_split": 0.999}, r"leaves 0 of 42 examples to train on and 42"),
        ({"class_weight": [1.0]}, r"a dict from class indices to numbers\. Received: \[1\.0\]"),
        ({"class_weight": {"a": 1.0}}, "a dict from class indices to numbers"),
        ({"class_weight": WEIGHTS, "sample_weight": np.ones(42)}, "not both"),
        ({"class_weight": WEIGHTS, "y": [Y, Y]}, r"one array of targets.*Received: list"),
        ({"class_weight": WEIGHTS, "y": np.zeros((42, 2, 2))}, r"Received: \(42, 2, 2\)"),
        ({"class_weight": WEIGHTS, "y": None}, "Received: NoneType"),
    ],
)
def test_wrong_arguments_are_refused_before_training(options, message):
    model = compiled()
    with pytest.raises(ValueError, match=message):
        training.fit(model, X, **{"y": Y, **options})
    assert int(model.optimizer.iterations) == 0

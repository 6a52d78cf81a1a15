"""Data, a model that is compiled once per file, and a record of the start of each training."""

import numpy as np
import pytest

import masked_layers as ml
from lottery_ticket_pruner import training
from searches import make_model


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 8)).astype("float32")
    return x, (x[:, 0] > x[:, 1]).astype("int32")


@pytest.fixture(scope="module")
def shared():
    """A masked model whose functions are compiled once for the whole module."""
    return ml.convert_to_masked(make_model())


@pytest.fixture
def masked(shared):
    """The shared model with the weights of `make_model()`."""
    shared.set_weights(make_model().get_weights())
    return shared


@pytest.fixture
def starts(monkeypatch):
    """Records model weights and masks before every stretch of training."""
    seen = []
    original = training.train_by_plan

    def recording(model, *args, **kwargs):
        state = (model.get_weights(), ml.get_masks(model), int(model.optimizer.iterations))
        seen.append(state)
        return original(model, *args, **kwargs)

    monkeypatch.setattr(training, "train_by_plan", recording)
    return seen

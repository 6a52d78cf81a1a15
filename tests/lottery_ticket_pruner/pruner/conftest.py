"""Data for a small classifier."""

import numpy as np
import pytest


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 6)).astype("float32")
    return x, (x[:, 0] > x[:, 1]).astype("int64")

"""A trained model for all searches, which do not change it."""

import pytest

from small_classifier import DATA, make_model


@pytest.fixture(scope="session")
def trained():
    model = make_model()
    model.fit(*DATA[0], epochs=10, batch_size=100, verbose=0)
    return model

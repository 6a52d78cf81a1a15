import keras
import pytest


@pytest.fixture(autouse=True)
def _fresh_keras():
    """Every test starts from the same seed and leaves no global policy behind."""
    policy = keras.config.dtype_policy()
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy(policy)

"""What holds for every test, and what keeps the suite quick."""

import gc
import os

import hypothesis
import numpy as np
import pytest

# The suite says the same of the same code, however often it runs.
# Examples that no run has seen yet: pytest --hypothesis-profile=explore
hypothesis.settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "explore", hypothesis.settings.get_profile("suite"), derandomize=False
)
hypothesis.settings.load_profile("suite")


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "once(*backends): depends on no backend, or only through what other tests check on each;"
        " runs under these alone, none named: TensorFlow",
    )
    # Under JAX most of the time goes into compiling each operation for each shape. What the tests
    # compile runs for an instant, so that optimizing it does not pay; `optimized` is for those that
    # are about its bits. Child processes take all of it over.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if hasattr(config, "cache"):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def pytest_collection_modifyitems(items):
    import keras  # Not above: it reads the environment.

    for item in items:
        once = item.get_closest_marker("once")
        if once and keras.backend.backend() not in (backends := once.args or ("tensorflow",)):
            item.add_marker(pytest.mark.skip(reason=f"tested on {', '.join(backends)}"))


def pytest_collection_finish():
    """The half million objects of the imports are not looked at again by any garbage collection.

    Without this a third of the suite's time goes into those that the library and Keras ask for.
    """
    gc.collect()
    gc.freeze()


# Of the generators called RNG, by module: how they are left by its import.
_DRAWN_BY_IMPORT = {}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Every test starts from the same seed, and so does what its fixtures draw."""
    import keras

    keras.utils.set_random_seed(0)
    rng = getattr(item.module, "RNG", None)
    if rng is not None:
        state = _DRAWN_BY_IMPORT.setdefault(item.module, rng.bit_generator.state)
        rng.bit_generator.state = state


@pytest.fixture(scope="session", autouse=True)
def _no_route_by_the_clock():
    """However slow the machine, no training changes over to `fit`, which rounds in another way.

    Tests of that change set the patience that they need.
    """
    from lottery_ticket_pruner.training import engine

    engine._PATIENCE = float("inf")


@pytest.fixture(scope="module", autouse=True)
def _no_graph_is_kept():
    """Frees the training steps that TensorFlow has traced, which would pile up to gigabytes.

    It registers gradients of their own, and these hold the graphs.
    """
    yield
    import keras

    if keras.backend.backend() == "tensorflow":
        from tensorflow.python.framework import ops

        from masked_layers._keras_trace import forget_gradients

        forget_gradients(
            [name for name in ops.gradient_registry._registry if name.startswith("CustomGradient")]
        )
        gc.collect()


@pytest.fixture(autouse=True)
def _same_policy():
    """No test leaves a global policy behind."""
    import keras

    policy = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(policy)


@pytest.fixture
def optimized():
    """JAX compiles what the test makes as it does outside of the suite."""
    import keras

    if keras.backend.backend() != "jax":
        yield
        return
    import jax

    flag = "jax_disable_most_optimizations"
    before = jax.config.values[flag]
    jax.config.update(flag, False)
    yield
    jax.config.update(flag, before)


@pytest.fixture
def nothing_drawn(monkeypatch):
    """Kernels start as zeros, for tests that set them: drawing is compiled for each shape."""
    import keras

    def zeros(self, shape, dtype=None, **kwargs):
        return keras.ops.convert_to_tensor(np.zeros(shape, "float32"), dtype)

    monkeypatch.setattr(keras.initializers.VarianceScaling, "__call__", zeros)

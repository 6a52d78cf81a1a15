"""Settings for every test, and what keeps the suite fast."""

import contextlib
import gc
import os
import sys

import hypothesis
import numpy as np
import pytest

# The suite gives the same result for the same code every time.
# For examples that no run has seen yet: pytest --hypothesis-profile=explore
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

# The option of XLA for what generates the code of fused operations on a CPU.
FUSION_EMITTERS = "xla_cpu_use_fusion_emitters"


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "once(*backends): depends on no backend, or only through what other tests check on each;"
        " runs under these alone, none named: TensorFlow",
    )
    config.addinivalue_line(
        "markers",
        "slow(*backends): takes long under these, none named: under all, where quicker tests check"
        " most of it; runs there with --slow alone (`tox -e slow-tf,slow-jax`)",
    )
    # With JAX, most of the time is spent compiling each operation for each shape. Compiled code
    # runs only briefly in tests, so optimizing it does not pay. `optimized` is for tests of its
    # exact bits. Child processes inherit these settings.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if os.environ.get("KERAS_BACKEND") == "jax":
        # These emitters take more than half of the time of compiling.
        flags = f"--{FUSION_EMITTERS}=false {os.environ.get('XLA_FLAGS', '')}"
        os.environ["XLA_FLAGS"] = flags
    if hasattr(config, "cache"):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked `slow`, alone")


def pytest_collection_modifyitems(config, items):
    import keras  # Not at the top, because it reads the environment.

    backend, only_slow = keras.backend.backend(), config.getoption("slow")
    chosen, others = [], []
    for item in items:
        once = item.get_closest_marker("once")
        if once and backend not in (backends := once.args or ("tensorflow",)):
            item.add_marker(pytest.mark.skip(reason=f"tested on {', '.join(backends)}"))
        marks = list(item.iter_markers("slow"))
        slow = any(not mark.args or backend in mark.args for mark in marks)
        (chosen if slow or not only_slow else others).append(item)
        if slow and not only_slow:  # Not deselected: pytest-xdist would not say how many.
            item.add_marker(pytest.mark.skip(reason="slow: runs with --slow"))
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = chosen


def pytest_collection_finish():
    """Excludes the half million objects of the imports from garbage collection.

    Otherwise a third of the suite's time is spent in collections that the library and Keras start.
    """
    gc.collect()
    gc.freeze()


# The state of all generators called RNG after the import of their module.
_DRAWN_BY_IMPORT = {}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Starts every test, and what its fixtures draw, from the same seed."""
    import keras

    keras.utils.set_random_seed(0)
    rng = getattr(item.module, "RNG", None)
    if rng is not None:
        state = _DRAWN_BY_IMPORT.setdefault(item.module, rng.bit_generator.state)
        rng.bit_generator.state = state


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    """Fails a test that leaves a strategy of TensorFlow in scope, instead of all tests after it."""
    if tf := sys.modules.get("tensorflow"):
        stack = tf.compat.v1.get_default_graph()._distribution_strategy_stack
        if stack:
            stack.clear()
            pytest.fail("The test left a `tf.distribute` strategy in scope.", pytrace=False)


@pytest.fixture(scope="session", autouse=True)
def _no_route_by_the_clock():
    """Prevents choices by the clock, which slow machines would make in another way.

    Training switches to `fit`, which rounds differently, and `prune` leaves out a method. Tests of
    this set the patience and the limits that they need.
    """
    from lottery_ticket_pruner import training
    from lottery_ticket_pruner.compression import attempts

    training.settings.patience = float("inf")
    attempts._FIT_SECONDS = attempts._SCAN_SECONDS = float("inf")


@pytest.fixture(scope="session", autouse=True)
def _each_step_is_traced_once():
    """Makes Keras create metrics and slots before it traces a step of `fit` on TensorFlow.

    Keras creates them while it traces the step, and then has to trace it a second time, which takes
    half of a short training. On JAX and torch it creates them before, as here. Child processes of
    tests (examples, commands) train as Keras does by itself.
    """
    import keras

    if keras.backend.backend() != "tensorflow":
        yield
        return
    import tensorflow as tf

    from lottery_ticket_pruner import _keras

    # It is called TensorFlowTrainer in Keras 3.15 and Trainer in 3.16.
    trainer = next(base for base in keras.Model.__mro__ if "_make_function" in vars(base))
    build, make = trainer._maybe_symbolic_build, trainer._make_function

    def is_ready(model):
        return not model.run_eagerly and all(layer.built for layer in model._flatten_layers())

    def build_metrics(self, iterator=None, data_batch=None):
        build(self, iterator, data_batch)
        if self._distribute_strategy is not None or not is_ready(self):
            return
        # The shapes alone, because an iterator of the user would lose the batch that is looked at.
        batch = data_batch if iterator is None else iterator._distributed_dataset.element_spec
        shaped = (tf.TensorSpec, tf.Tensor, np.ndarray, type(None))
        if all(isinstance(leaf, shaped) for leaf in keras.tree.flatten(batch)):
            with contextlib.suppress(Exception):  # The step itself says what is wrong with it.
                _keras.build_loss(self, batch)

    def build_slots_and_make(self, step):
        optimizer = self.optimizer
        if step == self.train_step and is_ready(self) and optimizer and not optimizer.built:
            optimizer.build(self.trainable_variables)
        return make(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_maybe_symbolic_build", build_metrics)
        patch.setattr(trainer, "_make_function", build_slots_and_make)
        yield


@pytest.fixture(scope="module", autouse=True)
def _no_graph_is_kept():
    """Frees training steps traced by TensorFlow, which would otherwise add up to gigabytes.

    Their custom gradients are registered globally and hold the graphs.
    """
    yield
    import keras

    if keras.backend.backend() == "tensorflow":
        from tensorflow.python.framework import ops

        from masked_layers._tensorflow import forget_gradients

        forget_gradients(
            [name for name in ops.gradient_registry._registry if name.startswith("CustomGradient")]
        )
        gc.collect()


@pytest.fixture(autouse=True)
def _same_policy():
    """Restores the global policy after every test."""
    import keras

    policy = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(policy)


@pytest.fixture
def optimized(monkeypatch):
    """Lets JAX compile as it does outside the suite."""
    import keras

    if keras.backend.backend() != "jax":
        yield
        return
    import jax
    from jax._src import compiler  # The public way is an argument of each `jax.jit`.

    options = compiler.get_compile_options

    def with_emitters(*args, env_options_overrides=None, **kwargs):
        overrides = {FUSION_EMITTERS: True, **(env_options_overrides or {})}
        return options(*args, env_options_overrides=overrides, **kwargs)

    monkeypatch.setattr(compiler, "get_compile_options", with_emitters)
    flag = "jax_disable_most_optimizations"
    before = jax.config.values[flag]
    jax.config.update(flag, False)
    yield
    jax.config.update(flag, before)


@pytest.fixture
def nothing_drawn(monkeypatch):
    """Starts kernels from zeros, for tests that set them: drawing is compiled for each shape."""
    import keras

    def zeros(self, shape, dtype=None, **kwargs):
        return keras.ops.convert_to_tensor(np.zeros(shape, "float32"), dtype)

    monkeypatch.setattr(keras.initializers.VarianceScaling, "__call__", zeros)

"""Ranking on the device against NumPy: exact counts, highest keys, random ties."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from lottery_ticket_pruner import ranking

# A single length, so that JAX compiles once.
SIZE = 24
# Many equal values, signed zeros, subnormal and huge ones.
VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-45, 3e38, -3e38]), st.floats(-4, 4, width=32)
)


def integer(value):
    return ops.convert_to_tensor(value, "int32")


def as_numpy(tensors):
    return [ops.convert_to_numpy(tensor) for tensor in tensors]


@settings(max_examples=60)
@given(
    st.lists(VALUES, min_size=SIZE, max_size=SIZE),
    st.lists(st.booleans(), min_size=SIZE, max_size=SIZE),
    st.integers(0, SIZE),
    st.integers(0, 2**30),
)
def test_the_largest_candidates_stay(values, candidates, most, seed):
    weight, candidates = np.array(values, "float32"), np.array(candidates)
    mask, finite = as_numpy(
        ranking.keep_largest(
            ops.convert_to_tensor(weight),
            ops.convert_to_tensor(candidates),
            integer(most),
            integer(seed),
        )
    )
    assert finite
    assert not (mask & ~candidates).any()
    assert mask.sum() == min(most, candidates.sum())
    kept, dropped = np.abs(weight[mask]), np.abs(weight[candidates & ~mask])
    assert not kept.size or not dropped.size or kept.min() >= dropped.max()


LENGTH = 5_003  # Not a multiple of any power of two.


def long_kernels():
    """Kernels by name: with many ties, or with a sample that misleads the search."""
    rng = np.random.default_rng(0)
    sampled = np.arange(LENGTH) % -(-LENGTH // 64) == 0
    every_exponent = 2.0 ** rng.uniform(-149, 127, LENGTH)
    rare = np.where(np.arange(LENGTH) == 11, 3e38, 1e-45)
    kernels = {
        "rounded": np.round(rng.normal(size=LENGTH) * 100),
        "nearly distinct": rng.normal(size=LENGTH) * 1e6,
        "all equal": np.full(LENGTH, -0.5),
        "zeros": np.where(rng.random(LENGTH) < 0.5, 0.0, -0.0),
        "half equal": np.where(rng.random(LENGTH) < 0.5, 1.0, rng.normal(size=LENGTH)),
        "sample of the largest": np.where(sampled, 3e38, every_exponent / 2.0**100),
        "sample of the smallest": np.where(sampled, 0.0, every_exponent),
        "one large": rare,
    }
    return {name: kernel.astype("float32") for name, kernel in kernels.items()}


def test_long_kernels_are_ranked_like_numpy_within_another_program():
    candidates = np.random.default_rng(1).random(LENGTH) < 0.9

    def ranked(weight, most):
        return ranking.keep_largest(weight, ops.convert_to_tensor(candidates), most, integer(3))

    program = ranked
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        program = tf.function(ranked, jit_compile=True)
    if keras.backend.backend() == "jax":
        import jax

        program = jax.jit(ranked)
    for name, weight in long_kernels().items():
        size = np.abs(weight[candidates])
        for most in (0, 1, 450, 2_300, len(size) - 1, len(size)):
            mask, finite = as_numpy(program(ops.convert_to_tensor(weight), integer(most)))
            assert finite, name
            assert not (mask & ~candidates).any(), name
            assert mask.sum() == most, name
            threshold = np.partition(size, len(size) - most)[len(size) - most] if most else np.inf
            assert mask[candidates & (np.abs(weight) > threshold)].all(), name
            assert not mask[np.abs(weight) < threshold].any(), name
    for spoiled, expected in ((candidates, False), (~candidates, True)):
        weight[np.flatnonzero(spoiled)[0]] = np.nan
        assert bool(program(ops.convert_to_tensor(weight), integer(9))[1]) is expected
        weight[:] = 1


@pytest.mark.once("torch")
def test_no_kernel_takes_many_passes(monkeypatch):
    passes = []
    count = ranking._count
    monkeypatch.setattr(ranking, "_count", lambda flags: passes.append(1) or count(flags))
    everything = ops.ones((LENGTH,), "bool")
    for weight in long_kernels().values():
        for most in (1, 450):
            passes.clear()
            ranking.keep_largest(
                ops.convert_to_tensor(weight), everything, integer(most), integer(3)
            )
            assert len(passes) <= 60  # An interval of 31 bits is halved from the 17th pass on.


@settings(max_examples=40)
@given(
    st.lists(VALUES, min_size=SIZE, max_size=SIZE),
    st.lists(VALUES, min_size=SIZE, max_size=SIZE),
    st.lists(st.booleans(), min_size=SIZE, max_size=SIZE),
    st.floats(0, 1),
    st.booleans(),
)
def test_rewiring_keeps_the_count(values, growth, mask, share, by_lot):
    weight, mask, growth = np.array(values, "float32"), np.array(mask), np.array(growth, "float32")
    count = int(share * mask.sum())
    state = [ops.convert_to_tensor(weight), ops.convert_to_tensor(mask)]
    if by_lot:
        results = ranking.rewire_at_random(*state, integer(count), integer(7))
    else:
        wanted = ops.convert_to_tensor(growth)
        results = ranking.rewire_by_growth(*state, wanted, integer(count), integer(7))
    new, grown, finite = as_numpy(results)
    gone = mask & ~new
    assert finite
    assert new.sum() == mask.sum()
    assert (grown == (new & ~mask)).all()  # without weights that were pruned and drawn again
    assert gone.sum() <= count
    assert not gone.any() or np.abs(weight[gone]).max() <= np.sort(np.abs(weight[mask]))[count - 1]
    if not by_lot:
        chosen, passed = np.abs(growth[grown]), np.abs(growth[~new])
        assert not chosen.size or not passed.size or chosen.min() >= passed.max()


def test_the_lot_draws_every_number_once_and_evenly():
    keys = ops.zeros((50_000,), "int32")
    one, other = as_numpy(ranking.tie_keys(keys, integer(seed)) for seed in (1, 2))
    assert len(np.unique(one)) == len(np.unique(other)) == 50_000
    assert 0 <= one.min() < one.max() < ranking.MAX_SIZE
    expected = 50_000 / 8
    counts = np.histogram(one, 8, (0, ranking.MAX_SIZE))[0]
    assert ((counts - expected) ** 2 / expected).sum() < 30  # chi-squared, 7 degrees of freedom
    for pair in ((one[1:], one[:-1]), (one, other), (one, np.arange(50_000))):
        assert abs(np.corrcoef(*pair)[0, 1]) < 0.02


def test_ties_are_broken_by_the_seed_in_the_same_way_on_every_backend():
    weight, alive = ops.ones((SIZE,)), ops.ones((SIZE,), "bool")
    kept = [
        np.flatnonzero(as_numpy(ranking.keep_largest(weight, alive, integer(6), integer(seed)))[0])
        for seed in (0, 1)
    ]
    assert kept[0].tolist() == [1, 5, 7, 12, 17, 18]
    assert kept[0].tolist() != kept[1].tolist()


def test_values_that_are_not_finite_are_reported_where_they_are_ranked():
    weight = ops.convert_to_tensor(np.array([1, np.nan, -np.inf, 2], "float32"))
    for alive, expected in (
        ([True, False, False, True], True),
        ([False, True, False, False], False),
    ):
        mask = ops.cast(ops.convert_to_tensor(alive), "bool")
        assert bool(ranking.keep_largest(weight, mask, integer(1), integer(0))[1]) is expected
        assert bool(ranking.rewire_at_random(weight, mask, integer(1), integer(0))[2]) is expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_ranked_as_it_is(dtype):
    weight = ops.cast(ops.convert_to_tensor([0.5, -2.0, 1.0, 0.25]), dtype)
    mask = ranking.keep_largest(weight, ops.ones((4,), "bool"), integer(2), integer(0))[0]
    assert ops.convert_to_numpy(mask).tolist() == [False, True, True, False]


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch runs as it is")
def test_another_count_or_seed_recompiles_nothing():
    traces = []

    @ranking.compiled
    def double(weight, count):
        traces.append(1)
        return weight * ops.cast(count, "float32")

    results = [float(double(ops.ones(()), integer(count))) for count in (1, 2, 3)]
    assert results == [1.0, 2.0, 3.0]
    assert len(traces) == 1

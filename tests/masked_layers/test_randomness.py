"""Random streams: those that results on disk were drawn from, and no two purposes with the same."""

import zlib

import numpy as np
import pytest

from masked_layers import randomness

pytestmark = pytest.mark.once
PATH = "dense/kernel"


def crc(text):
    return zlib.crc32(text.encode())


@pytest.mark.parametrize(
    ("purpose", "parts", "entropy"),
    [
        ("order of examples", (5,), 5),
        ("order of examples", (5, 3), (5, 3)),
        ("order of examples", ([5, crc("ticket"), 1],), [5, crc("ticket"), 1]),
        ("arms of a search", (5, "ticket", 1, PATH), [5, crc("ticket"), 1, crc(PATH)]),
        ("mask updates", (5, 100), [5, 100]),
        ("rewiring", (5, 100, PATH), [5, 100, crc(PATH)]),
        ("scores of masks", (5, PATH), [5, crc(PATH)]),
        ("treatments", (5, PATH), [5, crc(PATH)]),
    ],
)
def test_earlier_streams_are_those_that_results_were_drawn_from(purpose, parts, entropy):
    assert _raw(randomness.stream(purpose, *parts)) == _raw(np.random.default_rng(entropy))
    word = np.random.SeedSequence(entropy).generate_state(1)[0]
    for bits in (30, 31, 32):
        assert randomness.integer(purpose, *parts, bits=bits) == int(word) >> (32 - bits)


def test_augmentation_is_drawn_from_a_child_of_the_order():
    (child,) = np.random.SeedSequence([5, 6]).spawn(1)
    assert _raw(randomness.stream("augmentation", [5, 6])) == _raw(np.random.default_rng(child))


def test_ties_are_the_same_in_every_process():
    # Raw bits: NumPy promises them for ever, unlike the order of a shuffle.
    assert randomness.stream("ties", 7, PATH).bit_generator.random_raw() == 1827416788799031895


def test_no_two_purposes_share_a_stream():
    drawn = [
        ("arms of a search", "random_mask", 1),
        ("arms of a search", "random_mask", 1, PATH),
        ("arms of a search", "ticket", 1, "train"),
        ("augmentation",),
        ("gradient batch", 100),
        ("groups of test examples",),
        ("order of examples",),
        ("order of examples", 100),
        ("sampled masks", PATH),
        ("ties", PATH),
        ("treatments", PATH),
    ]
    raw = {_raw(randomness.stream(purpose, 5, *parts)) for purpose, *parts in drawn}
    assert len(raw) == len(drawn)
    seeds = [
        ("arms of a search", "masks", 1),
        ("arms of a search", "treatment", 1),
        ("mask updates", 100),
        ("rewiring", 100, PATH),
        ("scores of masks", PATH),
        ("test samples", 100),
    ]
    integers = {randomness.integer(purpose, 5, *parts) for purpose, *parts in seeds}
    assert len(integers) == len(seeds)
    named = {purpose for purpose, *_ in [*drawn, *seeds]}
    assert named == set(randomness.PURPOSES)


@pytest.mark.parametrize("seed", [2**70, [2**63 + 1, np.int64(1)], np.int32(7)])
def test_seeds_are_taken_as_they_are(seed):
    assert _raw(randomness.stream("order of examples", seed)) == _raw(np.random.default_rng(seed))


def test_no_seed_is_another_one_at_every_call():
    one, other = (_raw(randomness.stream("order of examples", None)) for _ in range(2))
    assert one != other


def _raw(rng):
    return tuple(rng.bit_generator.random_raw(4).tolist())

"""The seeds that Keras draws for layers without one, and the copies that leave them alone."""

import concurrent.futures
import random

import keras
import pytest

from masked_layers import _keras

pytestmark = pytest.mark.once


def seeds(count):
    """Returns the seeds that Keras draws for new initializers."""
    return [keras.initializers.RandomUniform().seed for _ in range(count)]


def test_seeds_are_those_that_would_be_drawn_and_the_global_state_stays():
    random.seed(3)
    expected = seeds(4)
    random.seed(3)
    before = random.getstate()
    with _keras.drawn_apart():
        assert seeds(2) == expected[:2]
        with _keras.drawn_apart():
            assert seeds(2) == expected[2:]
        assert seeds(2) == expected[2:]
        # Another thread neither repeats a seed nor leaves one out.
        with concurrent.futures.ThreadPoolExecutor(1) as other:
            assert other.submit(seeds, 2).result() == expected[:2]
    assert random.getstate() != before
    assert seeds(2) == expected[2:]

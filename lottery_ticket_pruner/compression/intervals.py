"""Confidence intervals of the difference of two models on the same examples."""

import math

import numpy as np
import scipy.stats

CONFIDENCE = 0.95


def of_paired_shares(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Returns the 95 % interval of the difference of two shares of the same examples.

    Unlike a bootstrap, it has a positive length even if all examples agree. Method 10 of Newcombe
    (Statistics in Medicine 17, 1998): Wilson's intervals of both shares, combined by the
    correlation of the pairs.

    Args:
        first: Whether each example counts, as of a dense model's correct predictions.
        second: The same of the other model.

    Returns:
        Bounds of the share of `first` less that of `second`.
    """
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    size = len(first)
    both, neither = np.sum(first & second), np.sum(~first & ~second)
    only_first, only_second = np.sum(first & ~second), np.sum(~first & second)
    shares, lengths = [], []
    for flags in (first, second):
        share = float(flags.mean())
        bounds = scipy.stats.binomtest(int(flags.sum()), size).proportion_ci(CONFIDENCE, "wilson")
        shares.append(share)
        lengths.append((share - bounds.low, bounds.high - share))
    margins = [float(flags.sum()) * float((~flags).sum()) for flags in (first, second)]
    product = float(both) * float(neither) - float(only_first) * float(only_second)
    # Corrected for continuity where the correlation is positive.
    corrected = max(product - size / 2, 0.0) if product > 0 else product
    correlation = corrected / math.sqrt(math.prod(margins)) if math.prod(margins) else 0.0
    difference = shares[0] - shares[1]
    (low_1, high_1), (low_2, high_2) = lengths

    def distance(one: float, other: float) -> float:
        return math.sqrt(max(one**2 - 2 * correlation * one * other + other**2, 0.0))

    return difference - distance(low_1, high_2), difference + distance(high_1, low_2)


def of_mean(differences: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Returns the 95 % bootstrap interval (BCa) of the mean of differences, which must vary."""
    differences = np.asarray(differences, "float64")
    found = scipy.stats.bootstrap(
        (differences,),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=4_000,
        vectorized=True,
        batch=500,
        rng=np.random.default_rng(seed),
    )
    low, high = found.confidence_interval
    return float(low), float(high)

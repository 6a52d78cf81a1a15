"""Statistics of results: means over replicates, intervals, and the choices that rows differ in."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats

from lottery_ticket_pruner.tolerances import is_within

LABELS = {
    "dense": "dense",
    "ticket": "ticket",
    "random_reinit": "random reinit",
    "reinit_same_sign": "reinit same signs",
    "random_mask": "random mask",
    "reshuffled_mask": "reshuffled mask",
}

CONFIDENCE = 0.95

# What differences without an interval are, for readers.
ALL_EQUAL = "the same for all seeds, which tells nothing about its spread"

# Below this instability a network counts as stable (Frankle et al., arXiv 1912.05671).
STABLE = 0.02

# Numeric columns that are measured. All other numeric columns are taken as measured as well.
_CHOICES = ("criterion", "dwr", "kind", "weights")


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Returns the 95 % confidence interval of the mean by Student's t, from three values on.

    None if these are all equal, because the interval would have no width, as if the mean were
    certain. For two values, returns the lower and the higher one; for one value, that value twice.
    """
    if len(values) < 3:
        return min(values), max(values)
    if are_equal(values):
        return None
    mean, error = np.mean(values), scipy.stats.sem(values)
    half = error * scipy.stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)
    return float(mean - half), float(mean + half)


def are_equal(shares: Sequence[float]) -> bool:
    """Returns whether several shares, or differences of shares, are equal except for rounding."""
    return len(shares) > 1 and is_within(float(np.ptp(shares)), 0.0, 1.0)


def is_at_least(gain: float) -> bool:
    """Returns whether a difference of (mean) accuracies is not negative, except for rounding."""
    return is_within(-gain, 0.0, 1.0)


def describe_bands(counts: Iterable[int]) -> str:
    """Describes the bands of a figure, given the number of replicates at each point."""
    numbers = sorted(set(counts))
    texts = []
    if several := [n for n in numbers if n >= 3]:
        shown = f"{several[0]} to {several[-1]}" if len(several) > 1 else several[0]
        texts.append(
            f"{CONFIDENCE:.0%} confidence intervals of the mean by Student's t, "
            f"{shown} replicates".replace("%", " %")
        )
    if 2 in numbers:
        texts.append("lowest to highest of 2 replicates")
    return f"Bands: {'; '.join(texts)}" if texts else ""


def setting_text(name: str, value: object) -> str:
    """Returns the choice of an option in words, for titles and sentences."""
    if name == "dwr":
        return "rescaled" if value else "not rescaled"
    return f"{name.replace('_', ' ')} {text_of(value)}"


def accuracy_text(accuracies: Sequence[float]) -> str:
    """Returns the mean in percent and, for several values, the standard deviation."""
    return spread(100 * np.asarray(accuracies, float), "{:z.2f}")


def spread(values: Sequence[float] | np.ndarray, style: str) -> str:
    """Returns the mean as text in this style and, for several values, the standard deviation.

    Values that are missing (NaN), as from runs of earlier versions, do not count.
    """
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    if not len(values):
        return ""
    mean = style.format(np.mean(values))
    return mean if len(values) == 1 else f"{mean} ± {style.format(np.std(values, ddof=1))}"


def arms_of(rows: pd.DataFrame) -> list[str]:
    """Returns the arms besides the dense run: first the ticket, last unknown arms."""
    present = dict.fromkeys(rows["arm"])
    known = [arm for arm in LABELS if arm in present]
    return [arm for arm in (*known, *(a for a in present if a not in LABELS)) if arm != "dense"]


def arm_label(arm: str) -> str:
    """Returns the name of an arm for readers."""
    return LABELS.get(arm, arm.replace("_", " "))


def dense_accuracies(rows: pd.DataFrame) -> list[float]:
    """Returns the test accuracies of the dense runs, one per replicate. Empty if there are none."""
    return rows.loc[rows["arm"] == "dense", "test_accuracy"].tolist()


def factors_of(rows: pd.DataFrame) -> list[str]:
    """Returns the columns of choices in rows without rounds: texts, booleans and known names."""
    numeric = pd.api.types.is_numeric_dtype
    return [
        name
        for name, column in rows.items()
        if name in _CHOICES or not numeric(column) or pd.api.types.is_bool_dtype(column)
    ]


def place_of(rows: pd.DataFrame) -> str:
    """Returns the column that orders rows without rounds: the epoch, or else the sparsity."""
    return "epoch" if "epoch" in rows else "sparsity"


def levels_of(rows: pd.DataFrame, place: str) -> list[tuple[float, pd.DataFrame]]:
    """Returns the levels of the rows in order, each with the rows of all seeds.

    Rows are matched by their position within their seed, because a learned mask has a different
    sparsity for every seed.
    """
    turns = rows.groupby("seed")[place].rank(method="first")
    return [(own[place].mean(), own) for _, own in rows.groupby(turns)]


def grouped(
    rows: pd.DataFrame, columns: list[str]
) -> Iterable[tuple[tuple[Any, ...], pd.DataFrame]]:
    """Groups rows by columns, in the order of the rows. Without columns, there is one group."""
    return rows.groupby(columns, sort=False, dropna=False) if columns else [((), rows)]


def text_of(value: object) -> str:
    """Returns a cell as text. Empty if it has no value."""
    return "" if pd.isna(value) else str(value)

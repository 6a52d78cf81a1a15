"""Sentences that say what the results of a report show, from the same numbers as its tables."""

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from lottery_ticket_pruner.experiments.reports.run_folders import Group
from lottery_ticket_pruner.experiments.reports.statistics import (
    ALL_EQUAL,
    CONFIDENCE,
    STABLE,
    accuracy_text,
    arm_label,
    arms_of,
    factors_of,
    grouped,
    interval,
    is_at_least,
    levels_of,
    place_of,
    setting_text,
)
from lottery_ticket_pruner.wording import signed

# Largest relative difference of weights remaining at which tickets are compared in a sentence.
_COMPARABLE = 0.1

# Options that must be the same.
_SUBJECT = ("data", "data_digest", "network")


def of_search(rows: pd.DataFrame) -> str:
    """Returns how far tickets match the dense network, and from where on they beat the controls.

    Differences are taken within each seed. From three seeds on, one counts only if its interval
    excludes zero.
    """
    tickets = rows[rows["arm"] == "ticket"]
    if tickets.empty:
        return ""
    return " ".join(filter(None, (_against_dense(rows), _against_controls(rows))))


def _against_dense(rows: pd.DataFrame) -> str:
    gains = _gains(rows, "dense")
    if not gains:
        return ""
    left, means = _left(rows), {number: float(np.mean(gain)) for number, gain in gains.items()}
    matching = [number for number, mean in means.items() if is_at_least(mean)]
    if matching:
        fewest = min(matching, key=lambda number: left[number])
        count = len(gains[fewest])
        return (
            f"{'In' if count == 1 else 'On average over'} {_seeds(count)}, tickets with as few as "
            f"{_percent(left[fewest])} of the weights are at least as accurate as "
            f"{_dense(rows, fewest)}."
        )
    closest = max(means.values())
    best = min((n for n in means if is_at_least(means[n] - closest)), key=lambda n: left[n])
    return (
        f"No ticket is as accurate as {_dense(rows, best)}. The closest is {_points(means[best])} "
        f"below it, with {_percent(left[best])} of the weights."
    )


def _dense(rows: pd.DataFrame, number: int) -> str:
    """Returns the dense network with its accuracy for the seeds that have reached a round."""
    seeds = rows.loc[(rows["arm"] == "ticket") & (rows["round"] == number), "seed"]
    dense = rows[(rows["arm"] == "dense") & rows["seed"].isin(seeds)]
    return f"the dense network ({accuracy_text(dense['test_accuracy'])} %)"


def _against_controls(rows: pd.DataFrame) -> str:
    controls = [arm for arm in arms_of(rows) if arm != "ticket"]
    every = {arm: _gains(rows, arm) for arm in controls}
    numbers = sorted(set.intersection(*(set(gains) for gains in every.values()))) if every else []
    if not numbers:
        return ""
    last, left = numbers[-1], _left(rows)
    sentence = f"With {_percent(left[last])} of the weights, the accuracy of the tickets is "
    sentence += _listed([_difference(arm, gains[last]) for arm, gains in every.items()])
    beaten = {n for n in numbers if all(_is_above(gains[n]) for gains in every.values())}
    begin = next((n for n in numbers if {m for m in numbers if m >= n} <= beaten), None)
    name = "the controls" if len(controls) > 1 else f"the control ({arm_label(controls[0])})"
    fewest = min(len(gains[n]) for gains in every.values() for n in numbers)
    if begin is None and fewest < 3:
        return f"{sentence}. They do not beat {name} at the end."
    interval_text = f"the {100 * CONFIDENCE:.0f} % interval of"
    if begin is None:
        undecided = [gains[last] for gains in every.values() if not _is_above(gains[last])]
        if all(interval(gains) is None for gains in undecided):
            return f"{sentence}; at least one of these differences is {ALL_EQUAL}."
        return f"{sentence}; {interval_text} at least one of these differences is not above zero."
    if fewest < 3:
        why = f"{_seeds(fewest)} {'is' if fewest == 1 else 'are'} too few for an interval"
    else:
        why = f"{interval_text} each difference is above zero"
    return f"{sentence}. They beat {name} from {_percent(left[begin])} of the weights on ({why})."


def _gains(rows: pd.DataFrame, arm: str) -> dict[int, list[float]]:
    """Returns the ticket's accuracy minus that of an arm for each seed, by round."""
    tickets = rows[rows["arm"] == "ticket"].set_index(["round", "seed"])["test_accuracy"]
    own = rows[rows["arm"] == arm]
    if arm == "dense":
        dense = own.set_index("seed")["test_accuracy"]
        others = tickets.index.get_level_values("seed").map(dense)
        gains = tickets - np.asarray(others, float)
    else:
        gains = tickets - own.set_index(["round", "seed"])["test_accuracy"]
    gains = gains.dropna()
    return {int(number): list(own) for number, own in gains.groupby(level="round")}


def _left(rows: pd.DataFrame) -> dict[int, float]:
    return {int(n): 1 - own["sparsity"].mean() for n, own in rows.groupby("round")}


def _is_above(gains: Sequence[float]) -> bool:
    found = interval(gains)
    if found is None:
        return False
    least = found[0] if len(gains) > 2 else float(np.mean(gains))
    return least > 0 and not is_at_least(-least)  # NaN is neither.


def _difference(arm: str, gains: Sequence[float]) -> str:
    gain = float(np.mean(gains))
    if is_at_least(gain) and is_at_least(-gain):
        return f"equal to that of {arm_label(arm)}"
    return f"{_points(gain)} {'above' if gain > 0 else 'below'} that of {arm_label(arm)}"


def _points(gain: float) -> str:
    points = abs(100 * gain)
    return f"{points:.2f} points" if points >= 0.005 else "less than 0.01 points"


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def of_masks(rows: pd.DataFrame) -> str:
    """Returns which mask is best, and how it compares with the trained network if that is known."""
    place, factors = place_of(rows), factors_of(rows)
    found = []
    for values, own in grouped(rows, factors):
        for at, level in levels_of(own, place):
            found.append((level["test_accuracy"].mean(), at, values, level))
    _, at, values, level = max(found, key=lambda one: one[0])
    choices = dict(zip(factors, values, strict=True))
    named = ", ".join(itertools.starmap(setting_text, choices.items()))
    at_place = f"at {place} {at:g}"
    where = f"with {100 * (1 - at):.4g} % of the weights" if place == "sparsity" else at_place
    best = accuracy_text(level["test_accuracy"])
    text = f"The best mask reaches {best} % test accuracy {where}{f' ({named})' if named else ''}."
    if len(found) > 1:
        text += (
            f" It is the best of {len(found)} by this test accuracy itself, so on other examples "
            "less is to be expected."
        )
    if "dense_accuracy" in rows and rows["dense_accuracy"].notna().any():
        dense = accuracy_text(rows.groupby("seed")["dense_accuracy"].first())
        text += f" The trained network with all weights has {dense} %."
    return text


def of_instability(rows: pd.DataFrame) -> str:
    """Returns from which step on trainings stay connected."""
    means = rows.groupby("rewind_to")["instability"].mean().sort_index()
    stable = [step for step in means.index if (means[means.index >= step] < STABLE).all()]
    if stable:
        first = stable[0]
        return (
            f"From step {first} on, trainings with different orders of the examples stay "
            f"connected: the mean instability is below {100 * STABLE:g} points, and "
            f"{100 * means[first]:z.2f} there."
        )
    return (
        "From none of the measured steps on do trainings stay connected: the mean instability of "
        f"the last is {100 * means.iloc[-1]:z.2f} points, and less than {100 * STABLE:g} count as "
        "stable."
    )


def of_comparison(groups: Sequence[Group]) -> str:
    """Returns which of several searches found the best tickets, if their last rounds compare.

    Accuracies on other data, or of other networks, are not compared.
    """
    if len({tuple(str(group.config.get(name)) for name in _SUBJECT) for group in groups}) > 1:
        return ""
    lasts = []
    for group in groups:
        rows = group.rows[group.rows["arm"] == "ticket"]
        if not rows.empty:
            lasts.append((group.label or group.title, rows[rows["round"] == rows["round"].max()]))
    if len(lasts) < 2:
        return ""
    shares = [1 - rows["sparsity"].mean() for _, rows in lasts]
    if max(shares) - min(shares) > _COMPARABLE * max(shares):
        return (
            "The last tickets of the configurations have different numbers of weights: compare "
            "them in the picture, at equal weights."
        )
    lasts.sort(key=lambda one: -one[1]["test_accuracy"].mean())
    (best, own), (second, other) = lasts[:2]
    text = f"Of the last tickets, those of {best} are best ({_reached(own)}), before {second} "
    text += f"({_reached(other)})"
    by_seed = [rows.set_index("seed")["test_accuracy"] for rows in (own, other)]
    gains = (by_seed[0] - by_seed[1]).dropna()
    if len(gains) < 3:
        return f"{text}; too few seeds in common for an interval."
    ends = interval(gains)
    if ends is None:
        return f"{text}; the difference is {ALL_EQUAL}, so it has no interval."
    between = " to ".join(signed(100 * end, ".2f") for end in ends) + " points"
    return f"{text}; the {100 * CONFIDENCE:.0f} % interval of the difference is {between}."


def _reached(rows: pd.DataFrame) -> str:
    left = _percent(1 - rows["sparsity"].mean())
    return f"{accuracy_text(rows['test_accuracy'])} % with {left} of the weights"

"""Trainings that end before their last step, because their outcome is clear."""

import math
from collections.abc import Sequence

# A training is judged after each of so many parts of it.
PARTS = 4
# From this part on, it may be given up: the first one tells little about the pace of the others.
_HOPELESS_FROM = 2


def outcome_is_clear(
    drops: Sequence[float], tolerance: float, *, decays: bool, examples: int | None = None
) -> bool:
    """Returns whether a training of a pruned model may end.

    It may if the drop is at most half of the tolerance, or if it would not come near the tolerance
    if every further part reduced it as much as the last one. Later parts usually reduce it less.
    The drop is then the smallest one so far, less two of its standard errors, because a single one
    that is worse by chance tells nothing about the rest of the training.

    Args:
        drops: The drop before the training, and after each part so far.
        tolerance: The drop that is acceptable.
        decays: Whether the learning rate depends on the step. The last part may then reduce the
            drop most, so the training is not given up.
        examples: Number of examples that the drop was measured on, if it is one of an accuracy.
    """
    margin = abs(tolerance) / 2
    done, now = len(drops) - 1, drops[-1]
    if now <= tolerance - margin:
        return True
    if decays or done < _HOPELESS_FROM or any(map(math.isnan, drops)):
        return False
    least = min(drops[1:])
    gained = max(drops[-2] - now, 0.0)
    # At least a share `least` of the examples has become wrong.
    error = 0.0 if examples is None else math.sqrt(least * max(1 - least, 0.0) / examples)
    return least - (PARTS - done) * gained - 2 * error > tolerance + margin

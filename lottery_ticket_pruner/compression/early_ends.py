"""Trainings that end before their last step, because their outcome is clear."""

from collections.abc import Sequence

# A training is judged after each of so many parts of it.
PARTS = 4
# From this part on, it may be given up: the first one tells little about the pace of the others.
_HOPELESS_FROM = 2


def outcome_is_clear(drops: Sequence[float], tolerance: float, *, decays: bool) -> bool:
    """Returns whether a training of a pruned model may end.

    It may if the drop is at most half of the tolerance, or if it would not come near the tolerance
    if every further part reduced it as much as the last one. Later parts usually reduce it less.

    Args:
        drops: The drop before the training, and after each part so far.
        tolerance: The drop that is acceptable.
        decays: Whether the learning rate depends on the step. The last part may then reduce the
            drop most, so the training is not given up.
    """
    margin = abs(tolerance) / 2
    done, now = len(drops) - 1, drops[-1]
    if now <= tolerance - margin:
        return True
    if decays or done < _HOPELESS_FROM:
        return False
    gained = max(drops[-2] - now, 0.0)
    return now - (PARTS - done) * gained > tolerance + margin

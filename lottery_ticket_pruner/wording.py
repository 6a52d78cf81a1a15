"""Numbers as texts for people: signs, and drops of accuracies in points."""

import dataclasses
from typing import Self


def signed(value: float, style: str) -> str:
    """Formats a number with its sign, or without one where it is shown as zero.

    Args:
        value: The number.
        style: Its format without a sign, such as `".2f"`.
    """
    text = format(value, f"+{style}")
    return text if text.strip("+-0.%") else text[1:]


def is_accuracy(metric: str) -> bool:
    """Returns whether a metric is an accuracy by its name, which may begin with an output's."""
    return metric.rpartition("_")[2] in ("accuracy", "acc")


def is_share(metric: str, value: float) -> bool:
    """Returns whether a value of a metric is an accuracy between 0 and 1."""
    return is_accuracy(metric) and 0 <= value <= 1


def points(share: float, style: str = "g") -> str:
    """Returns a share in percentage points, by default with no more digits than it has."""
    number = format(100 * share, style)
    if "e+" in number:  # Of a hundred, two digits would be 1e+02.
        number = f"{100 * share:.0f}"
    return f"{number} point" if number == "1" else f"{number} points"


@dataclasses.dataclass(frozen=True)
class DropText:
    """Form in which drops are printed: those of an accuracy in points, others as they are.

    Attributes:
        in_points: Whether they are told in points.
    """

    in_points: bool

    @classmethod
    def of(cls, metric: str, dense: float) -> Self:
        """Returns how drops of a metric are told.

        Args:
            metric: Its name.
            dense: Its value for the dense model. Only drops of shares are told in points.
        """
        return cls(is_share(metric, dense))

    def number(self, drop: float) -> str:
        """Returns a drop without its unit, with its sign."""
        return signed(100 * drop, ".2f") if self.in_points else signed(drop, ".4f")

    def text(self, drop: float) -> str:
        """Returns a drop with its unit. Of points, only a negative one has a sign."""
        return points(drop, "z.2f") if self.in_points else self.number(drop)

    def interval(self, low: float, high: float) -> str:
        """Returns the ends of an interval of drops."""
        unit = " points" if self.in_points else ""
        return f"{self.number(low)} to {self.number(high)}{unit}"

    def limit(self, drop: float) -> str:
        """Returns a drop that was given, such as a tolerance."""
        return points(drop) if self.in_points else f"{drop:g}"

    @property
    def heading(self) -> str:
        """Heading of a column of numbers."""
        return "drop, points" if self.in_points else "drop"

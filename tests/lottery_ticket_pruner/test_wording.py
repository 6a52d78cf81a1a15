"""Numbers as texts for people."""

import pytest

from lottery_ticket_pruner.wording import DropText, signed

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("value", "style", "text"),
    [
        (-1e-9, ".2f", "0.00"),
        (0.0, ".4f", "0.0000"),
        (-0.004, ".2%", "-0.40%"),
        (-0.00001, ".2%", "0.00%"),
        (0.0, ".3g", "0"),
        (1e-9, ".3g", "+1e-09"),
        (float("nan"), ".2f", "+nan"),
    ],
)
def test_zero_has_no_sign(value, style, text):
    assert signed(value, style) == text


@pytest.mark.parametrize(
    ("metric", "dense", "texts"),
    [
        ("accuracy", 0.97, ("0.50 points", "+0.50", "-1.00 to +2.00 points", "1 point")),
        ("left_binary_accuracy", 1.0, ("0.50 points", "+0.50", "-1.00 to +2.00 points", "1 point")),
        ("accuracy", 97.0, ("+0.0050", "+0.0050", "-0.0100 to +0.0200", "0.01")),  # In percent.
        ("auc", 0.97, ("+0.0050", "+0.0050", "-0.0100 to +0.0200", "0.01")),
        ("loss", 0.2, ("+0.0050", "+0.0050", "-0.0100 to +0.0200", "0.01")),
    ],
)
def test_only_drops_of_accuracies_are_told_in_points(metric, dense, texts):
    told = DropText.of(metric, dense)
    assert (
        told.text(0.005),
        told.number(0.005),
        told.interval(-0.01, 0.02),
        told.limit(0.01),
    ) == texts

"""The look of pictures: colors that readers with other eyes can tell apart."""

import itertools

import numpy as np
import pytest

pytest.importorskip("matplotlib")

import matplotlib as mpl
from matplotlib.colors import to_rgb

from lottery_ticket_pruner import pictures

pytestmark = pytest.mark.once

# Of linear RGB, at full severity: Machado, Oliveira and Fernandes (2009), table 1.
EYES = {
    "all three cones": np.eye(3),
    "no long cones": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "no medium cones": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(color, eyes):
    """CIELAB coordinates of a color as these eyes see it."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = TO_XYZ @ np.clip(np.array(eyes) @ linear, 0, 1) / TO_XYZ.sum(1)
    x, y, z = np.where(seen > 0.008856, np.cbrt(seen), 7.787 * seen + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eyes", EYES)
@pytest.mark.parametrize("palette", [pictures.PALETTE, pictures.DARK_PALETTE])
def test_all_colors_of_a_palette_differ(palette, eyes):
    """A difference of 2.3 is just noticeable side by side; lines need several times as much."""
    seen = [lab(color, EYES[eyes]) for color in palette]
    least = min(np.linalg.norm(one - other) for one, other in itertools.combinations(seen, 2))
    assert least > 15
    # The simulation does tell colors apart that such eyes cannot.
    red, green = (lab(color, EYES["no medium cones"]) for color in ("#B59A00", "#E08B2D"))
    assert np.linalg.norm(red - green) < 15


def test_names_with_dollar_signs_are_not_formulas(tmp_path):
    """matplotlib fails for what is not a formula, and would show others in italics."""
    name = r"$\no formula$ and $x$"
    for figure in (
        pictures.dots([name], {name: [0.5], "other": [0.4]}, "share"),
        pictures.matrix(np.eye(1), [name], [name], np.array([[name]]))[0],
    ):
        figure.suptitle(name)
        with mpl.rc_context({"svg.fonttype": "none"}):
            pictures.show_literally(figure).savefig(tmp_path / "figure.svg")
        assert (tmp_path / "figure.svg").read_text().count(name) >= 3

"""Masks of tickets in run folders, checked by hand: layers, overlaps, signs."""

import keras
import numpy as np
import pytest

pytest.importorskip("tyro")

import masked_layers as ml
from lottery_ticket_pruner.experiments import networks
from lottery_ticket_pruner.experiments.reports import run_folders, ticket_masks, web_page
from made_up_runs import write_run

pytestmark = pytest.mark.once

PATHS = ["fc_1/kernel", "fc_2/kernel", "output/kernel"]


def ticket(seed, keep):
    """Writes a LeNet for 2 x 2 pixels and 3 classes, and keeps the given rows of each kernel."""
    keras.utils.set_random_seed(seed)
    model = ml.convert_to_masked(networks.build("lenet-300-100", (2, 2, 1), 3))
    kept = {path: np.zeros(mask.shape, bool) for path, mask in ml.get_masks(model).items()}
    for mask in kept.values():
        mask[keep] = True
    ml.set_masks(model, kept)
    return model


def kept_by(folder):
    return [
        ticket_masks.tickets_of(g) for g in run_folders.groups_of(run_folders.find_runs([folder]))
    ]


def test_layers_over_several_tickets(tmp_path):
    folder = write_run(tmp_path / "run")
    ticket(0, slice(0, 1)).save(folder / "ticket.keras")
    ticket(0, slice(0, 3)).save(folder / "ticket-1.keras")
    (folder / "ticket-2.keras").write_bytes(b"no model")
    (kept,) = kept_by(tmp_path)
    assert [found.seed for found in kept.tickets] == [7, 8]
    assert len(kept.unreadable) == 1
    assert "ticket-2.keras" in kept.unreadable[0]
    assert [(row.path, row.size, row.kept_text) for row in kept.layers] == [
        ("fc_1/kernel", 1_200, "300 to 900"),
        ("fc_2/kernel", 30_000, "100 to 300"),
        ("output/kernel", 300, "3 to 9"),
        ("total", 31_500, "403 to 1,209"),
    ]
    assert kept.layers[0].share == pytest.approx(600 / 1_200)


def test_signs_are_compared_with_the_weights_drawn_from_the_seed(tmp_path):
    folder = write_run(tmp_path / "run")
    for name, seed in (("ticket", 7), ("ticket-1", 8)):
        model = ticket(seed, slice(0, 2))
        refs = dict(zip(PATHS, ml.masked_refs(model), strict=True))
        values = refs["fc_1/kernel"].variable.numpy().copy()
        # A quarter of the 600 kept weights changes its sign, the others their size.
        values[0, :150] *= -1
        values[1] *= 3
        refs["fc_1/kernel"].variable.assign(values)
        model.save(folder / f"{name}.keras")
    (kept,) = kept_by(tmp_path)
    assert [row.same_sign for row in kept.layers] == pytest.approx([0.75, 1, 1, 656 / 806])
    (sheet,) = ticket_masks.comparisons([kept])
    assert sheet.headings[-1] == "same sign"
    assert sheet.lines[0][-1] == "0.814 ± 0.000"

    # Pruned weights that do not come from the seed: drawn elsewhere, or rewound to a later step.
    values[3, 0] += 1
    refs["fc_1/kernel"].variable.assign(values)
    model.save(folder / "ticket-1.keras")
    (kept,) = kept_by(tmp_path)
    assert [found.signs is None for found in kept.tickets] == [False, True]


def test_overlaps_between_seeds_and_between_configurations(tmp_path):
    rows = {"a": (slice(0, 1), slice(1, 2)), "b": (slice(0, 2), slice(0, 2))}
    for name, kept in rows.items():
        folder = write_run(tmp_path / "runs" / name, strategy=name)
        ticket(0, kept[0]).save(folder / "ticket.keras")
        ticket(1, kept[1]).save(folder / "ticket-1.keras")
    other = write_run(tmp_path / "runs" / "c", strategy="c")
    ticket(0, slice(0, 1)).save(other / "ticket.keras")
    kepts = kept_by(tmp_path / "runs")
    seeds, pairs = ticket_masks.comparisons(kepts)
    # One row of 4, 300 and 100 each, a different one for the other seed; by chance a b / n of them.
    chance = 300 / 4 + 100 / 300 + 3 / 100
    by_chance = f"{chance / (806 - chance):.3f}"
    assert seeds.lines[0][:5] == ("a", "2", "1.28%", "0.000", by_chance)
    assert seeds.lines[1][3] == "1.000"
    assert seeds.lines[2][3:5] == ("", "")
    # The first row of two, and the second of them; the third configuration has only seed 7.
    assert [line[:4] for line in pairs.lines] == [
        ("a", "b", "1", "0.500"),
        ("a", "c", "1", "1.000"),
        ("b", "c", "1", "0.500"),
    ]
    ((overlap, count),) = ticket_masks.between(kepts[:2])
    assert count == 2
    assert overlap.jaccard == pytest.approx(np.array([[1, 0.5], [0.5, 1]]))

    text = web_page.render(kepts)
    for title in ("Pruned weights of each layer", "Kept by both masks over kept by either"):
        assert title in text
    assert "overlap of the last tickets&#39; masks between configurations" in text

"""Masks of tickets in run folders, checked by hand: layers, overlaps, signs."""

import keras
import numpy as np
import pytest

pytest.importorskip("tyro")

import masked_layers as ml
from lottery_ticket_pruner.experiments import networks, results
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


def tickets_in(folder):
    return [
        ticket_masks.tickets_of(g) for g in run_folders.groups_of(run_folders.find_runs([folder]))
    ]


def test_layers_over_several_tickets(tmp_path):
    folder = write_run(tmp_path / "run")
    ticket(0, slice(0, 1)).save(folder / "ticket.keras")
    ticket(0, slice(0, 3)).save(folder / "ticket-1.keras")
    (folder / "ticket-2.keras").write_bytes(b"no model")
    (found,) = tickets_in(tmp_path)
    assert [ticket.seed for ticket in found.tickets] == [7, 8]
    assert len(found.unreadable) == 1
    assert "ticket-2.keras" in found.unreadable[0]
    assert [(row.path, row.size, row.kept_text) for row in found.layers] == [
        ("fc_1/kernel", 1_200, "300 to 900"),
        ("fc_2/kernel", 30_000, "100 to 300"),
        ("output/kernel", 300, "3 to 9"),
        ("total", 31_500, "403 to 1,209"),
    ]
    assert found.layers[0].share == pytest.approx(600 / 1_200)


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
    (found,) = tickets_in(tmp_path)
    assert [row.same_sign for row in found.layers] == pytest.approx([0.75, 1, 1, 656 / 806])
    (sheet,) = ticket_masks.comparisons([found])
    assert sheet.headings[-1] == "same sign"
    assert sheet.lines[0][-1] == "0.814 ± 0.000"

    # Pruned weights that do not come from the seed: drawn elsewhere, or rewound to a later step.
    values[3, 0] += 1
    refs["fc_1/kernel"].variable.assign(values)
    model.save(folder / "ticket-1.keras")
    (found,) = tickets_in(tmp_path)
    assert [ticket.signs is None for ticket in found.tickets] == [False, True]


def with_initial_weights(folder, replicate=0, **options):
    """A run whose ticket differs from what its seed draws; in one row a fifth of signs change."""
    write_run(folder, seeds=[7, 8], **options)
    model = ticket(100 + replicate, slice(0, 2))
    initial = {}
    for ref in ml.masked_refs(model):
        values = np.abs(ref.variable.numpy()) + 1
        initial[ref.path] = values.copy()
        values[0, : values.shape[1] // 5] *= -1  # Of two rows that are kept.
        ref.variable.assign(values * 3)
    suffix = f"-{replicate}" if replicate else ""
    ml.save_ticket(model, folder / f"ticket{suffix}.safetensors")
    file = results.file_of_initial_weights(folder, replicate)
    file.parent.mkdir(parents=True)
    np.savez(file, **initial)
    return file


@pytest.mark.parametrize("replicate", [0, 1])
@pytest.mark.parametrize(
    "options", [{"rewind_to": "20it"}, {"kept": "finetune"}, {"network": "of my own"}]
)
def test_signs_are_compared_with_the_initial_weights_in_the_folder(tmp_path, options, replicate):
    with_initial_weights(tmp_path / "run", replicate, **options)
    (found,) = tickets_in(tmp_path)
    assert [ticket.seed for ticket in found.tickets] == [7 + replicate]
    # Of 300, 100 and 3 columns: 60, 20 and none in one of the two rows.
    assert [row.same_sign for row in found.layers] == pytest.approx([0.9, 0.9, 1, 726 / 806])


def test_kept_weights_that_start_from_other_values_have_no_signs_to_keep(tmp_path):
    with_initial_weights(tmp_path / "run", kept="reinit")
    (found,) = tickets_in(tmp_path)
    assert [ticket.signs for ticket in found.tickets] == [None]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:1000]), "cut short or damaged"),
        (lambda file: np.savez(file, **{PATHS[0]: np.ones(3)}), "weights of another network"),
    ],
)
def test_damaged_initial_weights_leave_signs_out_and_are_named(tmp_path, damage, message):
    file = with_initial_weights(tmp_path / "run")
    damage(file)
    with pytest.warns(UserWarning, match=f"Signs are left out.*initial.npz.*{message}"):
        (found,) = tickets_in(tmp_path)
    assert [ticket.signs for ticket in found.tickets] == [None]
    assert found.layers[-1].kept == (806,)
    assert "initial.npz" in found.unreadable[0]


def test_overlaps_between_seeds_and_between_configurations(tmp_path):
    rows = {"a": (slice(0, 1), slice(1, 2)), "b": (slice(0, 2), slice(0, 2))}
    for name, kept in rows.items():
        folder = write_run(tmp_path / "runs" / name, strategy=name)
        ml.save_ticket(ticket(0, kept[0]), folder / "ticket.safetensors")
        ticket(1, kept[1]).save(folder / "ticket-1.keras")  # Of an earlier version.
    other = write_run(tmp_path / "runs" / "c", strategy="c")
    ticket(0, slice(0, 1)).save(other / "ticket.keras")
    all_tickets = tickets_in(tmp_path / "runs")
    seeds, pairs = ticket_masks.comparisons(all_tickets)
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
    ((overlap, count),) = ticket_masks.between(all_tickets[:2])
    assert count == 2
    assert overlap.jaccard == pytest.approx(np.array([[1, 0.5], [0.5, 1]]))

    text = web_page.render(all_tickets)
    for title in ("Weights remaining in each layer", "How much masks have in common"):
        assert title in text
    assert "overlap of the last tickets&#39; masks between configurations" in text

"""The masks of tickets in run folders: by layer, compared with each other, and by sign."""

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import rich.progress
from rich.console import Console

import masked_layers as ml
from lottery_ticket_pruner import analyses
from lottery_ticket_pruner.experiments import networks
from lottery_ticket_pruner.experiments.reports.run_folders import Group, Run
from lottery_ticket_pruner.experiments.reports.tables import Sheet, filled
from lottery_ticket_pruner.variables import read
from masked_layers.keras_files import load_model


@dataclasses.dataclass(frozen=True, eq=False)
class Ticket:
    """The last ticket of one seed.

    Attributes:
        seed: The seed.
        masks: Its masks by path.
        signs: Which share of its weights ended with the sign they started with, by path; None where
            the initial weights are not known, see `read_tickets`.
    """

    seed: int
    masks: dict[str, np.ndarray]
    signs: dict[str, analyses.SignAgreement] | None


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """The entries of one weight that the tickets of a group keep.

    Attributes:
        path: The weight.
        shape: Its shape.
        size: Number of its entries.
        kept: How many the masks keep, in each ticket.
        same_sign: Share of the kept ones that ended with their initial sign, over the tickets of
            which that is known; else NaN.
    """

    path: str
    shape: tuple[int, ...]
    size: int
    kept: tuple[int, ...]
    same_sign: float = float("nan")

    @property
    def share(self) -> float:
        """Share of weights left, over all tickets."""
        return sum(self.kept) / (len(self.kept) * self.size)

    @property
    def kept_text(self) -> str:
        """The number of kept entries, from the least to the most."""
        least, most = min(self.kept), max(self.kept)
        return f"{least:,}" if least == most else f"{least:,} to {most:,}"

    @property
    def same_sign_text(self) -> str:
        """The share of kept signs, empty where it is not known."""
        return _share(self.same_sign)


@dataclasses.dataclass(frozen=True, eq=False)
class Kept:
    """The masks of the tickets of a group of runs.

    Attributes:
        group: The group.
        tickets: Its tickets, one for each seed, in their order.
        unreadable: Files that did not load, with the reasons.
    """

    group: Group
    tickets: tuple[Ticket, ...]
    unreadable: tuple[str, ...]

    @property
    def label(self) -> str:
        """The group in words."""
        return self.group.label or self.group.title

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the masks by path; empty without tickets."""
        masks = self.tickets[0].masks if self.tickets else {}
        return {path: mask.shape for path, mask in masks.items()}

    @property
    def layers(self) -> list[LayerRow]:
        """A row for each masked weight, and one over all of them."""
        signs = [ticket.signs for ticket in self.tickets if ticket.signs is not None]
        rows = [
            LayerRow(
                path,
                shape,
                int(np.prod(shape)),
                tuple(int(ticket.masks[path].sum()) for ticket in self.tickets),
                _mean([of_ticket[path].kept for of_ticket in signs]),
            )
            for path, shape in self.shapes.items()
        ]
        if rows:
            totals = tuple(map(sum, zip(*(row.kept for row in rows), strict=True)))
            same = _mean([of_ticket["total"].kept for of_ticket in signs])
            rows.append(LayerRow("total", (), sum(row.size for row in rows), totals, same))
        return rows


def read_tickets(groups: Sequence[Group], console: Console | None = None) -> list[Kept]:
    """Reads the masks of the tickets of each group, and shows a bar meanwhile."""
    console = console or Console(quiet=True)
    tracked: Iterable[Group] = rich.progress.track(
        groups, "reading tickets", console=console, transient=True
    )
    return [tickets_of(group) for group in tracked]


def tickets_of(group: Group) -> Kept:
    """Load the last tickets of a group of runs.

    Initial weights are not part of a run folder: they are drawn again from the seed. Whether these
    are those of the run is told by the ticket's pruned weights, which never train; after a
    rewinding point later than 0, or by another backend, they are not.

    Warns:
        UserWarning: A ticket is damaged or cannot be loaded, and is left out.
    """
    tickets: dict[int, Ticket] = {}
    unreadable = []
    for run in group.runs:
        for path in sorted(run.folder.glob("ticket*.keras")):
            try:
                seed = _seed(run, path)
                model = load_model(path)
                masks = ml.get_masks(model)
            # Whatever Keras and its file formats raise about a file, or a layer not imported.
            except Exception as error:
                text = (str(error).splitlines() or [repr(error)])[0]
                unreadable.append(text if str(path) in text else f"'{path}': {text}")
                warnings.warn(f"A ticket is left out. {unreadable[-1]}", stacklevel=2)
                continue
            first = next(iter(tickets.values()), None)
            if masks and (first is None or _shapes(masks) == _shapes(first.masks)):
                tickets.setdefault(seed, Ticket(seed, masks, _signs(run.config, seed, model)))
    return Kept(group, tuple(tickets[seed] for seed in sorted(tickets)), tuple(unreadable))


def _seed(run: Run, ticket: Path) -> int:
    replicate = int(ticket.stem.partition("-")[2] or 0)
    seeds = run.config.get("seeds") or []
    return seeds[replicate] if replicate < len(seeds) else replicate


def _signs(
    config: Mapping[str, Any], seed: int, ticket: keras.Model
) -> dict[str, analyses.SignAgreement] | None:
    kept = config.get("kept", "rewind")
    starts_with_signs = kept == "rewind" or kept.endswith("same_sign")
    if config.get("network") not in networks.NAMES or not starts_with_signs:
        return None
    keras.utils.set_random_seed(seed)
    plain = networks.build(config["network"], ticket.input_shape[1:], ticket.output_shape[-1])
    initial = {ref.path: read(ref.variable) for ref in ml.weight_refs(plain)}
    final = {ref.path: read(ref.variable) for ref in ml.masked_refs(ticket)}
    masks = ml.get_masks(ticket)
    pruned = 0
    for path, mask in masks.items():
        if path not in initial or initial[path].shape != mask.shape:
            return None
        if not np.array_equal(initial[path][~mask], final[path][~mask]):
            return None
        pruned += np.count_nonzero(~mask)
    return analyses.sign_agreement(initial, final, masks) if pruned else None


# --- Tables ---------------------------------------------------------------------------------------


def sheets_of(kept: Kept) -> list[Sheet]:
    """Returns tables of what the tickets of one group keep of each weight."""
    if not kept.tickets:
        return []
    lines = [
        (row.path, f"{row.size:,}", row.kept_text, f"{row.share:.2%}", row.same_sign_text)
        for row in kept.layers
    ]
    headings = ("weight", "of", "kept", "left", "same sign")
    return [filled(Sheet(_layers_title(len(kept.tickets)), headings, tuple(lines), names=1))]


def comparisons(kepts: Sequence[Kept]) -> list[Sheet]:
    """Returns tables of what the tickets of several seeds and groups have in common."""
    lines = []
    for kept in kepts:
        if kept.tickets:
            overlap = analyses.mask_overlap({str(t.seed): t.masks for t in kept.tickets})
            pairs = np.triu_indices(len(kept.tickets), 1)
            signs = [t.signs["total"].kept for t in kept.tickets if t.signs is not None]
            lines.append(
                (
                    kept.label,
                    str(len(kept.tickets)),
                    f"{kept.layers[-1].share:.2%}",
                    _shares(overlap.jaccard[pairs]),
                    _shares(overlap.expected[pairs]),
                    _shares(signs),
                )
            )
    headings = ("", "seeds", "weights", "overlap of seeds", "by chance", "same sign")
    note = (
        "Overlap: weights that two masks keep over those that either keeps, and what random masks "
        "with as many weights in each layer have. Same sign: kept weights that ended with the sign "
        "they started with."
    )
    title = "masks of the last tickets: mean ± standard deviation"
    sheets = [filled(Sheet(title, headings, tuple(lines), names=1, note=note))] if lines else []
    lines = []
    for overlap, seeds in between(kepts):
        for one, other in zip(*np.triu_indices(len(overlap.names), 1), strict=True):
            shares = (overlap.jaccard[one, other], overlap.expected[one, other])
            names = (overlap.names[one], overlap.names[other])
            lines.append((*names, str(seeds), *map(_share, shares)))
    if lines:
        headings = ("masks of", "and of", "seeds", "overlap", "by chance")
        title = "overlap of the last tickets' masks between configurations, seed by seed"
        sheets.append(Sheet(title, headings, tuple(lines), names=2))
    return sheets


def between(kepts: Sequence[Kept]) -> list[tuple[analyses.Overlap, int]]:
    """The overlaps of the masks of groups at the same seed: their means, and the number of seeds.

    One for each set of groups with masks of the same weights.
    """
    together: dict[str, list[Kept]] = {}
    for kept in kepts:
        if kept.tickets:
            together.setdefault(str(kept.shapes), []).append(kept)
    found = []
    for same in together.values():
        masks = [{ticket.seed: ticket.masks for ticket in kept.tickets} for kept in same]
        seeds = set.intersection(*(set(of_group) for of_group in masks))
        if len(same) > 1 and seeds:
            names = [kept.label for kept in same]
            overlaps = [
                analyses.mask_overlap({name: m[seed] for name, m in zip(names, masks, strict=True)})
                for seed in sorted(seeds)
            ]
            means = (
                np.mean([getattr(overlap, kind) for overlap in overlaps], axis=0)
                for kind in ("jaccard", "expected")
            )
            found.append((analyses.Overlap(tuple(names), *means), len(seeds)))
    return found


def layer_sparsities(kepts: Sequence[Kept]) -> dict[str, dict[str, float]]:
    """The share of pruned weights of every masked weight, for each group by its label."""
    return {
        kept.label: {row.path: 1 - row.share for row in kept.layers[:-1]}
        for kept in kepts
        if kept.tickets
    }


def same_signs(kepts: Sequence[Kept]) -> dict[str, dict[str, float]]:
    """The share of kept signs of every masked weight, for each group of which it is known."""
    return {
        kept.label: {row.path: row.same_sign for row in kept.layers}
        for kept in kepts
        if kept.tickets and not np.isnan(kept.layers[-1].same_sign)
    }


def _layers_title(tickets: int) -> str:
    return f"weights left in each layer of the last ticket{'s' if tickets > 1 else ''}"


def _shapes(masks: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {path: mask.shape for path, mask in masks.items()}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _share(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.3f}"


def _shares(values: Sequence[float]) -> str:
    if not len(values):
        return ""
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.3f}"

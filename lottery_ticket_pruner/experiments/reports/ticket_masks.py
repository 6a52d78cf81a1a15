"""Masks of tickets in run folders: by layer, by sign, and compared with each other."""

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
from lottery_ticket_pruner.experiments import networks, saved_tickets
from lottery_ticket_pruner.experiments.reports import portraits
from lottery_ticket_pruner.experiments.reports.run_folders import Group, Run
from lottery_ticket_pruner.experiments.reports.tables import Sheet, filled
from lottery_ticket_pruner.experiments.results import file_of_initial_weights, initial_weights
from lottery_ticket_pruner.variables import read
from masked_layers.ticket_files import load_saved


@dataclasses.dataclass(frozen=True, eq=False)
class Ticket:
    """The last ticket of one seed.

    Attributes:
        seed: The seed.
        masks: Its masks by path.
        signs: Share of its weights that ended with the sign they started with, by path. None if the
            initial weights are unknown; see `tickets_of`.
        portrait: What one can look at.
    """

    seed: int
    masks: dict[str, np.ndarray]
    signs: dict[str, analyses.SignAgreement] | None
    portrait: portraits.Portrait


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """Statistics of a weight over the tickets of a group.

    Attributes:
        path: Path of the weight.
        shape: Shape of the weight.
        size: Number of entries.
        kept: Number of kept entries in each ticket.
        same_sign: Share of kept entries that ended with their initial sign, over the tickets with
            known initial weights. NaN if there are none.
    """

    path: str
    shape: tuple[int, ...]
    size: int
    kept: tuple[int, ...]
    same_sign: float = float("nan")

    @property
    def share(self) -> float:
        """Share of kept entries, over all tickets."""
        return sum(self.kept) / (len(self.kept) * self.size)

    @property
    def kept_text(self) -> str:
        """Number of kept entries as text, from the least to the most."""
        least, most = min(self.kept), max(self.kept)
        return f"{least:,}" if least == most else f"{least:,} to {most:,}"

    @property
    def same_sign_text(self) -> str:
        """Share of unchanged signs as text. Empty if unknown."""
        return _share(self.same_sign)


@dataclasses.dataclass(frozen=True, eq=False)
class GroupTickets:
    """The masks of the tickets of a group of runs.

    Attributes:
        group: The group.
        tickets: Its tickets, one for each seed, in order.
        unreadable: Files that could not be loaded, with the reasons.
    """

    group: Group
    tickets: tuple[Ticket, ...]
    unreadable: tuple[str, ...]

    @property
    def label(self) -> str:
        """Label of the group."""
        return self.group.label or self.group.title

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the masks by path. Empty without tickets."""
        masks = self.tickets[0].masks if self.tickets else {}
        return {path: mask.shape for path, mask in masks.items()}

    @property
    def layers(self) -> list[LayerRow]:
        """A row for each masked weight, and one for all of them."""
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


def read_tickets(groups: Sequence[Group], console: Console | None = None) -> list[GroupTickets]:
    """Reads the masks of the tickets of each group, and shows a progress bar."""
    console = console or Console(quiet=True)
    tracked: Iterable[Group] = rich.progress.track(
        groups, "reading tickets", console=console, transient=True
    )
    return [tickets_of(group) for group in tracked]


def tickets_of(group: Group) -> GroupTickets:
    """Reads the last tickets of a group of runs.

    Signs are compared with those of the initial weights in the run folder. Folders of earlier
    versions do not contain them. There, the weights are drawn again from the seed, and compared
    with the pruned weights of the ticket, which are never trained. They differ if the rewinding
    point is later than 0 or if the backend is another one; signs are unknown then.

    Warns:
        UserWarning: If a ticket or a file of initial weights is damaged or cannot be loaded, and is
            left out.
    """
    tickets: dict[int, Ticket] = {}
    unreadable = []
    for run in group.runs:
        for path in saved_tickets.tickets_in(run.folder):
            try:
                replicate, seed = _seed(run, path)
                model = load_saved(path)
                masks = ml.get_masks(model)
            # Keras and its file formats raise errors of any type here, also for unknown layers.
            except Exception as error:
                unreadable.append(_named(error, path))
                warnings.warn(f"A ticket is left out. {unreadable[-1]}", stacklevel=2)
                continue
            first = next(iter(tickets.values()), None)
            if masks and (first is None or _shapes(masks) == _shapes(first.masks)):
                try:
                    signs = _signs(run, replicate, seed, model)
                except (OSError, ValueError) as error:
                    signs = None
                    unreadable.append(_named(error, file_of_initial_weights(run.folder, replicate)))
                    warnings.warn(f"Signs are left out. {unreadable[-1]}", stacklevel=2)
                portrait = portraits.portrait_of(model, masks)
                tickets.setdefault(seed, Ticket(seed, masks, signs, portrait))
    return GroupTickets(group, tuple(tickets[seed] for seed in sorted(tickets)), tuple(unreadable))


def _named(error: Exception, path: Path) -> str:
    """Returns the first line of an error, preceded by the file."""
    text = (str(error).splitlines() or [repr(error)])[0]
    return text if str(path) in text else f"'{path}': {text}"


def _seed(run: Run, ticket: Path) -> tuple[int, int]:
    """Returns the replicate and the seed of a ticket."""
    replicate = int(ticket.stem.partition("-")[2] or 0)
    seeds = run.config.get("seeds") or []
    return replicate, seeds[replicate] if replicate < len(seeds) else replicate


def _signs(
    run: Run, replicate: int, seed: int, ticket: keras.Model
) -> dict[str, analyses.SignAgreement] | None:
    """Compares signs before and after training. None if kept weights started from other values.

    Raises:
        OSError: If the file of initial weights cannot be read.
        FileContentError: If it is damaged, or holds those of another network.
    """
    kept = run.config.get("kept", "rewind")
    if kept not in ("rewind", "finetune") and not kept.endswith("same_sign"):
        return None
    initial = initial_weights(run.folder, replicate)
    if initial is None:
        return None if kept == "finetune" else _signs_by_seed(run.config, seed, ticket)
    final = {ref.path: read(ref.variable) for ref in ml.masked_refs(ticket)}
    shapes = {path: initial[path].shape for path in final if path in initial}
    if shapes != _shapes(final):
        file = file_of_initial_weights(run.folder, replicate)
        raise ml.FileContentError(
            f"'{file}' holds the weights of another network than the ticket's."
        )
    return analyses.sign_agreement(initial, final, ml.get_masks(ticket))


def _signs_by_seed(
    config: Mapping[str, Any], seed: int, ticket: keras.Model
) -> dict[str, analyses.SignAgreement] | None:
    """Compares signs with weights drawn again. None if they are not those of the run."""
    if config.get("network") not in networks.NAMES:
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
        pruned += int(np.count_nonzero(~mask))
    return analyses.sign_agreement(initial, final, masks) if pruned else None


# --- Tables ---------------------------------------------------------------------------------------


def sheets_of(of_group: GroupTickets) -> list[Sheet]:
    """Returns tables of the kept weights of one group's tickets."""
    if not of_group.tickets:
        return []
    lines = [
        (row.path, f"{row.size:,}", row.kept_text, f"{row.share:.2%}", row.same_sign_text)
        for row in of_group.layers
    ]
    headings = ("weight", "of", "kept", "left", "same sign")
    return [filled(Sheet(_layers_title(len(of_group.tickets)), headings, tuple(lines), names=1))]


def comparisons(all_tickets: Sequence[GroupTickets]) -> list[Sheet]:
    """Returns tables that compare the masks of several seeds and groups."""
    lines: list[tuple[str, ...]] = []
    for of_group in all_tickets:
        if of_group.tickets:
            overlap = analyses.mask_overlap({str(t.seed): t.masks for t in of_group.tickets})
            pairs = np.triu_indices(len(of_group.tickets), 1)
            signs = [t.signs["total"].kept for t in of_group.tickets if t.signs is not None]
            lines.append(
                (
                    of_group.label,
                    str(len(of_group.tickets)),
                    f"{of_group.layers[-1].share:.2%}",
                    _shares(overlap.jaccard[pairs]),
                    _shares(overlap.expected[pairs]),
                    _shares(signs),
                )
            )
    headings: tuple[str, ...]
    headings = ("", "seeds", "weights", "overlap of seeds", "by chance", "same sign")
    note = (
        "Overlap: weights kept by both masks divided by weights kept by either, next to the value "
        "for random masks with as many weights in each layer. Same sign: kept weights that ended "
        "with the sign they had at step 0."
    )
    title = "masks of the last tickets: mean ± standard deviation"
    sheets = [filled(Sheet(title, headings, tuple(lines), names=1, note=note))] if lines else []
    lines = []
    for overlap, seeds in between(all_tickets):
        for one, other in zip(*np.triu_indices(len(overlap.names), 1), strict=True):
            shares = (overlap.jaccard[one, other], overlap.expected[one, other])
            names = (overlap.names[one], overlap.names[other])
            lines.append((*names, str(seeds), *map(_share, shares)))
    if lines:
        headings = ("masks of", "and of", "seeds", "overlap", "by chance")
        title = "overlap of the last tickets' masks between configurations, seed by seed"
        sheets.append(Sheet(title, headings, tuple(lines), names=2))
    return sheets


def between(all_tickets: Sequence[GroupTickets]) -> list[tuple[analyses.Overlap, int]]:
    """Returns mean overlaps of the masks of groups at the same seed, and the number of seeds.

    There is one for each set of groups with masks of the same weights.
    """
    together: dict[str, list[GroupTickets]] = {}
    for of_group in all_tickets:
        if of_group.tickets:
            together.setdefault(str(of_group.shapes), []).append(of_group)
    found = []
    for same in together.values():
        masks = [{ticket.seed: ticket.masks for ticket in of_group.tickets} for of_group in same]
        seeds = set.intersection(*(set(by_seed) for by_seed in masks))
        if len(same) > 1 and seeds:
            names = [of_group.label for of_group in same]
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


def layer_shares(all_tickets: Sequence[GroupTickets]) -> dict[str, dict[str, float]]:
    """Returns the share of kept entries of every masked weight, by group label and path."""
    return {
        of_group.label: {row.path: row.share for row in of_group.layers[:-1]}
        for of_group in all_tickets
        if of_group.tickets
    }


def same_signs(all_tickets: Sequence[GroupTickets]) -> dict[str, dict[str, float]]:
    """Returns the share of unchanged signs of every masked weight, for groups where it is known."""
    return {
        of_group.label: {row.path: row.same_sign for row in of_group.layers}
        for of_group in all_tickets
        if of_group.tickets and not np.isnan(of_group.layers[-1].same_sign)
    }


def _layers_title(tickets: int) -> str:
    return f"weights left in each layer of the last ticket{'s' if tickets > 1 else ''}"


def _shapes(masks: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {path: mask.shape for path, mask in masks.items()}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _share(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.3f}"


def _shares(values: Sequence[float] | np.ndarray) -> str:
    if not len(values):
        return ""
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.3f}"

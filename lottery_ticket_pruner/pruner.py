"""The pruner: what a model's weights were, and what the masks over them become."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner import (
    _keras,
    criteria,
    evidence,
    fitting,
    notices,
    plain_models,
    selection,
    targets,
    treatments,
)
from masked_layers import paths
from masked_layers.archives import read_npz
from masked_layers.files import replacing
from masked_layers.maskable import input_axes

if TYPE_CHECKING:
    from masked_layers import SparsityReport, WeightRef

_logger = logging.getLogger(__name__)

_FORMAT = "lottery-ticket-pruner"
_FORMAT_VERSION = 1


class LotteryTicketPruner:
    """Records what a model's weights were, and prunes, rewinds and evaluates it by these records.

    The weights of the model are recorded here as the *initial* ones, those a ticket is rewound to,
    and by `set_pretrained_weights` as the *final* ones, those most criteria rank. A record is a
    read-only copy of every weight: kernels, biases and statistics. Masks are not weights.

    The masks of a masked model are its own variables: the pruner reads and writes them there and
    keeps no copy. For a plain model, the pruner holds the masks itself, and `apply_pruning` and
    `PrunerCallback` zero the pruned weights; `update_masks`, `rewind` and `evaluate_supermask` take
    a masked model.

    Compile the model first if its learning rate is to be rewound too.

    Args:
        model: A built Keras model with at least one kernel-like weight, plain or made by
            `masked_layers.convert_to_masked`.

    Raises:
        ValueError: The model is not built, or it has nothing to prune.

    Example:
    ```python
    model = masked_layers.convert_to_masked(model)
    pruner = LotteryTicketPruner(model)
    for _ in range(5):
        model.fit(x, y)
        pruner.set_pretrained_weights()
        pruner.update_masks("large_final", rate=0.2)
        pruner.rewind()
    model.fit(x, y)
    ```

    References:
        - [Frankle & Carbin, arXiv 1803.03635](https://arxiv.org/abs/1803.03635)
        - [Frankle et al., arXiv 1912.05671](https://arxiv.org/abs/1912.05671) (rewinding)
    """

    def __init__(self, model: keras.Model) -> None:
        if not model.built or not model.weights:
            raise ValueError(
                f"The model {model.name!r} has no weights yet. Build it first: call it on a batch, "
                "or `model.build(input_shape)`."
            )
        self.model = model
        self._keys = _weight_keys(model)
        self._shapes = tuple(tuple(variable.shape) for variable in model.weights)
        # For plain models, by position among the weights; those of a masked model are in the model.
        self._masks = {i: np.ones(self._shapes[i], bool) for i in _prunables(model)}
        if not self._masks:
            raise ValueError(
                f"The model {model.name!r} has no weight that can be pruned. Kernels of Keras' "
                "layers can; weights of other layers after `masked_layers.register`."
            )
        self.masks_version = 0
        self._rescaling = plain_models.Rescaling()
        self._final: tuple[np.ndarray, ...] | None = None
        self._final_is_new = False
        self._updates = 0
        self.set_initial_weights()

    # Records.

    @property
    def initial_weights(self) -> Mapping[str, np.ndarray]:
        """The initial weights by path: read-only arrays, those that `rewind` brings back."""
        return MappingProxyType(dict(zip(self._keys, self._initial, strict=True)))

    @property
    def final_weights(self) -> Mapping[str, np.ndarray] | None:
        """The final weights by path: read-only arrays; None before they are recorded."""
        if self._final is None:
            return None
        return MappingProxyType(dict(zip(self._keys, self._final, strict=True)))

    def set_initial_weights(self, model: keras.Model | None = None) -> None:
        """Records the initial weights anew: the point that `rewind` goes back to.

        Called after k steps of training, this is rewinding to step k. The step count and the
        learning rate of the optimizer are recorded with the weights.

        Args:
            model: The model to record, of the same architecture; by default the pruner's own.

        Raises:
            ValueError: The model has other weights; the message names the layer and both shapes.
        """
        model = self._checked(model)
        self._initial = self._snapshot(model)
        self._clocks = fitting.read_clocks(getattr(model, "optimizer", None))
        self._timed_optimizer = getattr(model, "optimizer", None)
        _logger.info("Recorded %d initial weights of %r.", len(self._initial), model.name)

    def set_pretrained_weights(self, model: keras.Model | None = None) -> None:
        """Records the final weights, those after training, which most criteria rank.

        Args:
            model: The model to record, of the same architecture; by default the pruner's own.

        Raises:
            ValueError: The model has other weights; the message names the layer and both shapes.
        """
        model = self._checked(model)
        final = list(self._snapshot(model))
        for position, ref in self._prunables(model).items():
            if ref.mask is not None and ref.mask.frozen is not None:
                # What a frozen weight ended as: whoever compares it with w0 must not see the raw
                # value, which means nothing.
                held = fitting.read(ref.mask.frozen)
                held = np.where(self._mask(position, ref), final[position], held)
                final[position] = _read_only(held)
        self._final = tuple(final)
        self._final_is_new = True
        _logger.info("Recorded %d final weights of %r.", len(self._final), model.name)

    # Masked models.

    def update_masks(
        self,
        strategy: Any = "large_final",
        *,
        rate: selection.Share | None = None,
        sparsity: selection.Share | None = None,
        scope: str | None = None,
        seed: int | None = None,
        structure: Any = None,
        distribution: Any = None,
        data: Any = None,
    ) -> SparsityReport:
        """Prunes the masked model further: its masks lose what the criterion ranks lowest.

        Raw weights are not changed. Pruned weights never come back; `reset_masks` starts over.

        Args:
            strategy: A criterion: name, configuration, `criteria.Criterion` or function.
            rate: Share of the alive weights to drop now, in [0, 1); or a mapping from patterns of
                paths to shares, with a `"default"`.
            sparsity: Share of all weights that are pruned afterwards, likewise. Exactly one of
                `rate` and `sparsity`.
            scope: Who competes with whom: `"layer"` (the default for most criteria), `"global"` or
                `"output"`.
            seed: For random scores and ties. By default the number of updates since the masks were
                last reset, so that every update draws anew and a repeated run repeats.
            structure: What stands or falls together: `"filters"`, `"units"`, blocks such as
                `"4x1"`, N:M such as `"2:4"` (which takes no rate, sparsity or scope), or whatever
                else `structures.get` takes. Weights that it does not apply to stay as they are, and
                a warning is logged that names them.
            distribution: How one `sparsity` of the whole model is shared out among the layers:
                `"uniform"`, `"erk"`, or whatever else `distributions.get` takes.
            data: What a criterion of gradients or activations looks at, as arrays: `(x, y)` or
                `(x, y, sample_weight)`, or `x` alone where no targets are needed; or a data set
                of batches, which is read into memory (see `data.arrays_of`). Other criteria take
                no notice.

        Returns:
            The report of the model's sparsity.

        Raises:
            ValueError: The model is not masked, a record or data are missing, or an argument is
                wrong. Nothing has changed then.

        Warns:
            UserWarning: The criterion ranks final weights that are older than the last update;
                a mask that kept something keeps nothing now; or nothing was pruned.
        """
        self._require_masked("update_masks")
        request = selection.Request.of(
            strategy,
            rate=rate,
            sparsity=sparsity,
            scope=scope,
            seed=self._updates if seed is None else seed,
            structure=structure,
            distribution=distribution,
        )
        stale = "final" in request.criterion.needs and not self._final_is_new
        self.prune(request, data=data)
        if stale:
            warnings.warn(
                "The masks were updated since the final weights were recorded; the same weights "
                "were ranked again. Call `set_pretrained_weights` after training.",
                stacklevel=2,
            )
        return ml.sparsity_report(self.model)

    def masks_at(
        self,
        strategy: Any = "large_final",
        *,
        sparsities: Sequence[selection.Share],
        scope: str | None = None,
        seed: int = 0,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Makes the masks of many sparsities from one ranking of all weights, and sets none.

        Each is what `update_masks` would set on masks that were just reset, ties included.

        Args:
            strategy: A criterion, as for `update_masks`.
            sparsities: The sparsities, in any order; each as for `update_masks`.
            scope: As for `update_masks`.
            seed: For random scores and ties.

        Returns:
            An iterator over dicts from path to bool mask, one for each sparsity.

        Raises:
            ValueError: A record is missing, or an argument is wrong.

        Warns:
            UserWarning: One of the masks keeps nothing; for the first sparsity where that is so.
        """
        request = selection.Request.of(strategy, scope=scope, seed=seed)
        ml.sync(self.model)
        kernels = self._kernels(self._prunables(self.model), request.criterion)
        kernels = {
            path: dataclasses.replace(kernel, mask=np.ones_like(kernel.mask))
            for path, kernel in kernels.items()
        }
        masks = selection.select_many(request, kernels, sparsities)
        return notices.watched(masks, sparsities)

    def rewind(self, optimizer: bool = True) -> None:
        """Brings the initial weights back under the masks, which stay.

        Args:
            optimizer: Also bring the optimizer back: slots as after `build`, the learning rate as
                recorded with the weights (if it is a variable of the optimizer that the model was
                compiled with then; one set by a later `compile` stays), the step count 0, or the
                recorded one where a learning-rate schedule reads it. Compiled functions stay valid.

        Raises:
            ValueError: The model is not masked, or its trainable weights have changed since the
                optimizer was built. Nothing has changed then.
        """
        self._require_masked("rewind")
        self._restart(self._initial, optimizer)
        _logger.info("Rewound %d weights of %r.", len(self._initial), self.model.name)

    def treat(
        self,
        kept: Any = "rewind",
        pruned: Any = "zero",
        *,
        seed: int = 0,
        optimizer: bool = True,
    ) -> None:
        """Sets what the kept weights start from, and what the pruned ones are from now on.

        Zhou et al. call these mask-1 and mask-0 actions. `treat()` is `rewind()` with pruned
        weights at zero; `lottery_ticket_pruner.treatments` describes the others. Everything is
        derived from the recorded initial and final weights: treatments of several rounds do not
        compound. All other weights (biases, statistics) go back to the initial ones, with
        `kept="finetune"` to the final ones. Pruned weights that are not zero are frozen values of
        the mask: held in the graph, not trained, and saved with it; `rewind` leaves them, and
        `treat` and `reset_masks` take them away. Not to be called while `fit` is under way.

        Args:
            kept: The treatment of kept weights: name, configuration, `treatments.Treatment` or
                function.
            pruned: The treatment of pruned weights, likewise.
            seed: For fresh draws, permutations and signs.
            optimizer: As for `rewind`.

        Raises:
            ValueError: The model is not masked, a treatment is unknown or reads final weights that
                were not recorded, or a layer has no initializer to draw from. Nothing has changed
                then.

        Reference:
            - [Zhou et al., arXiv 1905.01067](https://arxiv.org/abs/1905.01067), sections 3 and 4
        """
        self._require_masked("treat")
        kept, pruned = treatments.get_kept(kept), treatments.get_pruned(pruned)
        for treatment in (kept, pruned):
            if treatment.needs_final and self._final is None:
                raise ValueError(
                    f"The treatment {treatment.name!r} reads the final weights. Call "
                    "`set_pretrained_weights` after training."
                )
        ml.sync(self.model)
        tuned = kept is treatments.get_kept("finetune")
        zeroed = pruned is treatments.get_pruned("zero")
        values = list(self._final if tuned else self._initial)
        frozen = {}
        for position, ref in self._prunables(self.model).items():
            kernel = self._kernel(position, ref, seed)
            effective = treatments.treat(kernel, kept, pruned)
            values[position] = np.where(kernel.mask, effective, kernel.initial)
            # Zeros of other treatments are kept, too: later rounds ask what a weight ended as.
            used = not zeroed and not kernel.mask.all()
            # Entries pruned by a later update read as w0 until they are treated.
            frozen[position] = np.where(kernel.mask, kernel.initial, effective) if used else None
        self._restart(values, optimizer)
        self._freeze(frozen)
        _logger.info(
            "Treated kept weights of %r by %s, pruned ones by %s.",
            self.model.name,
            kept.name,
            pruned.name,
        )

    def reset_masks(self) -> None:
        """Sets all masks to one, and the count of pruned weights with them; raw weights stay.

        Nothing is frozen any more.
        """
        if is_masked(self.model):
            masks = ml.get_masks(self.model)
            ml.set_masks(self.model, {path: np.ones_like(mask) for path, mask in masks.items()})
            self._freeze(dict.fromkeys(self._prunables(self.model)))
        self._masks = {position: np.ones_like(mask) for position, mask in self._masks.items()}
        self.masks_version += 1
        self._rescaling = plain_models.Rescaling()
        self._updates = 0
        _logger.info("Reset the masks of %r: all weights are alive.", self.model.name)

    def evaluate_supermask(
        self,
        x: Any = None,
        y: Any = None,
        *,
        weights: str = "initial",
        dwr: bool = False,
        **evaluate_kwargs: Any,
    ) -> dict[str, float]:
        """What the masks alone know: the metrics of the model with its masks over initial weights.

        The model is left exactly as it was: weights, masks, optimizer, metrics and compiled
        functions, also where the evaluation fails.

        Args:
            x: Input data, as for `keras.Model.evaluate`.
            y: Targets.
            weights: `"initial"`, or `"signed_constant"`: sign(w0) times the standard deviation of
                w0, per masked weight. All other weights are the recorded initial ones.
            dwr: Whether masked weights are multiplied by size / ones(mask).
            **evaluate_kwargs: Further arguments of `keras.Model.evaluate`.

        Returns:
            The metrics by name.

        Raises:
            ValueError: The model is not masked or not compiled, or `weights` is neither of the two.

        Reference:
            - [Zhou et al., arXiv 1905.01067](https://arxiv.org/abs/1905.01067), sections 4 and 5
        """
        self._require_masked("evaluate_supermask")
        if weights not in ("initial", "signed_constant"):
            raise ValueError(
                f'`weights` must be "initial" or "signed_constant". Received: weights={weights!r}'
            )
        model = self._checked(self.model)
        if not model.compiled:
            raise ValueError(
                f"The model {model.name!r} is not compiled. Call `model.compile(loss=..., "
                "metrics=...)` before `evaluate_supermask`."
            )
        values = list(self._initial)
        if weights == "signed_constant":
            for position in self._prunables(model):
                values[position] = treatments.signed_constant(values[position])
        with restored(model), rescaling(model, dict.fromkeys(_masks(model), dwr)):
            _assign(model.weights, values)
            freeze_at_zero(model)
            with targets.explained(model, x, y):
                return model.evaluate(x, y, **evaluate_kwargs, return_dict=True)

    def prune(
        self, request: selection.Request, *, data: Any = None, model: keras.Model | None = None
    ) -> None:
        """Gives a model new masks by a request; what `update_masks` and schedules have in common.

        Args:
            request: What is to be pruned.
            data: As for `update_masks`.
            model: Model to prune, of the pruner's architecture; by default the pruner's own.

        Raises:
            ValueError: A record or data are missing, or the amount is wrong. Nothing has changed
                then.
        """
        model = self.model if model is None else model
        criterion = request.criterion
        ml.sync(model)
        prunables = self._prunables(model)
        kernels = self._kernels(prunables, criterion)
        if criterion.evidence and is_masked(model):
            with self._as_ranked(model, criterion):
                measure = evidence.measurement(model, criterion, data)
                masks = selection.select(request, kernels, measure)
        else:
            masks = selection.select(request, kernels)
        self._write_masks(model, {i: masks[self._keys[i]] for i in prunables})
        self._final_is_new = False
        self._updates += 1
        size = sum(mask.size for mask in masks.values())
        alive = sum(int(mask.sum()) for mask in masks.values())
        _logger.info(
            "Pruned %r by %s: %d of %d weights alive (%.2f %%).",
            model.name,
            criterion.name,
            alive,
            size,
            100 * alive / size,
        )
        notices.of_update(request, kernels, masks)

    def note_changed_masks(self) -> None:
        """Tells the pruner that its model's masks were changed: final weights are out of date."""
        self._final_is_new = False

    # Plain and masked models: the earlier API.

    def calc_prune_mask(
        self, model: keras.Model, prune_percentage: float, prune_strategy: Any = "large_final"
    ) -> None:
        """Computes masks that drop a share of the weights that remain: 0.5, then 0.2, gives 0.6.

        In a masked model the masks take effect at once. The weights of a plain model stay as they
        are until `apply_pruning`.

        Args:
            model: The model to prune, of the pruner's architecture.
            prune_percentage: Share of the alive weights to drop, above 0 and below 1.
            prune_strategy: A criterion: name, configuration, `criteria.Criterion` or function.

        Raises:
            ValueError: The share is out of bounds, a record is missing, the strategy is unknown or
                the model has other weights. Nothing has changed then.
        """
        if not 0 < prune_percentage < 1:
            raise ValueError(
                "`prune_percentage` must be between 0 and 1, exclusive. "
                f"Received: prune_percentage={prune_percentage!r}"
            )
        model = self._checked(model)
        request = selection.Request.of(prune_strategy, rate=prune_percentage, seed=self._updates)
        self.prune(request, model=model)

    def apply_pruning(self, model: keras.Model) -> None:
        """Zeroes the pruned weights of a plain model; a masked one reads them as zero already.

        Args:
            model: The model, of the pruner's architecture.

        Raises:
            ValueError: The model has other weights; the message names the layer and both shapes.
        """
        model = self._checked(model)
        if is_masked(model):
            return
        ml.sync(model)
        for variable, mask in self.held_masks(model):
            variable.assign(fitting.zero_pruned(mask, variable))

    def apply_dwr(self, model: keras.Model) -> None:
        """Rescales what is left of each layer by size / ones(mask), once and no more.

        Dynamic weight rescaling. In a masked model this switches on a factor of the forward pass,
        which follows the masks. In a plain one the masked weights are multiplied, and pruned ones
        are zero afterwards. A second call does nothing, and after a change of the masks the factor
        is exchanged: a weight carries size / ones(mask) at most once. Weights that the caller put
        back since, or that equal the initial ones, or whose masks were reset, count as not
        rescaled; those that were trained since count as rescaled. A plain model does not tell these
        apart: what is nearer to the weights before the last rescaling than to those after it was
        put back.
        The factor of a mask without ones is 0.

        Args:
            model: The model, of the pruner's architecture.

        Raises:
            ValueError: The model has other weights; the message names the layer and both shapes.

        Reference:
            - [Zhou et al., arXiv 1905.01067](https://arxiv.org/abs/1905.01067), section 5.2
        """
        model = self._checked(model)
        if is_masked(model):
            _set_rescale(model, dict.fromkeys(_masks(model), True))
            return
        ml.sync(model)
        for position, ref in self._prunables(model).items():
            scaled = self._rescaling.apply(
                position,
                fitting.read(ref.variable),
                self._masks[position],
                self._initial[position],
            )
            if scaled is not None:
                ref.variable.assign(scaled)

    @property
    def prunable_tuples(self) -> list[plain_models.Key]:
        """`(position in model.layers, positions in layer.weights)` of each layer to prune."""
        refs = self._prunables(self.model).values()
        return plain_models.prunable_tuples(self.model, [ref.variable for ref in refs])

    @property
    def prune_masks_map(self) -> dict[plain_models.Key, list[np.ndarray | None]]:
        """The masks now: for each of `prunable_tuples` one per weight of the layer, or None.

        They are read-only copies, of zeros and ones in float64; `calc_prune_mask` and
        `update_masks` make new ones.
        """
        refs = self._prunables(self.model).items()
        masks = {id(ref.variable): self._mask(position, ref) for position, ref in refs}
        return plain_models.masks_by_layer(self.model, masks)

    @property
    def cumulative_pruning_rate(self) -> float:
        """The share of prunable weights that is pruned now; 0.0 again after `reset_masks`.

        It is counted in the masks: after 0.5 and 0.2 it is 0.6 but for what rounding to whole
        weights makes of it.
        """
        masks = [self._mask(i, ref) for i, ref in self._prunables(self.model).items()]
        pruned = sum(int(np.count_nonzero(~mask)) for mask in masks)
        return pruned / sum(mask.size for mask in masks)

    def iterate_prunables(
        self, model: keras.Model
    ) -> Iterator[
        tuple[
            str,
            keras.layers.Layer,
            int,
            np.ndarray,
            np.ndarray | None,
            np.ndarray,
            np.ndarray,
        ]
    ]:
        """Yields what is known of each prunable weight.

        Args:
            model: The model, of the pruner's architecture.

        Yields:
            `(key, layer, index, initial, pretrained, current, mask)`: the path of the weight, the
            layer that holds it, its position in `layer.weights`, the recorded initial and final
            weights (the latter None before they are recorded), the raw weight now and the bool
            mask. Changing an array changes neither record nor model.

        Raises:
            ValueError: The model has other weights; the message names the layer and both shapes.
        """
        model = self._checked(model)
        ml.sync(model)
        for position, ref in self._prunables(model).items():
            index = next(i for i, v in enumerate(ref.layer.weights) if v is ref.variable)
            yield (
                self._keys[position],
                ref.layer,
                index,
                self._initial[position],
                None if self._final is None else self._final[position],
                fitting.read(ref.variable),
                self._mask(position, ref),
            )

    def held_masks(self, model: keras.Model) -> list[tuple[keras.Variable, np.ndarray]]:
        """The masks that the pruner holds for a plain model, each with its variable there."""
        return [
            (ref.variable, self._masks[position])
            for position, ref in self._prunables(model).items()
        ]

    # Files.

    def save(self, file: str | os.PathLike) -> None:
        """Writes the whole state of the pruner to one file: records, masks and counts.

        What pruned weights of a masked model are frozen at is part of it, see `treat`. The file
        holds arrays and JSON, no pickled objects. An existing one is replaced as a whole or not at
        all.

        Args:
            file: Where to; the name is taken as it is.
        """
        prunables = self._prunables(self.model)
        masks = {position: self._mask(position, ref) for position, ref in prunables.items()}
        same = getattr(self.model, "optimizer", None) is self._timed_optimizer
        state = {
            "format": _FORMAT,
            "version": _FORMAT_VERSION,
            "paths": self._keys,
            "masked": list(masks),
            "final": self._final is not None,
            "final_is_new": self._final_is_new,
            "updates": self._updates,
            "clocks": [(step, rate if same else None) for step, rate in self._clocks],
            "rescaled": list(self._rescaling.factors.items()),
        }
        arrays = {"state": np.array(json.dumps(state))}
        arrays |= {f"initial/{i}": array for i, array in enumerate(self._initial)}
        arrays |= {f"final/{i}": array for i, array in enumerate(self._final or ())}
        arrays |= {f"mask/{position}": mask for position, mask in masks.items()}
        arrays |= {f"unscaled/{i}": array for i, array in self._rescaling.unscaled.items()}
        arrays |= {
            f"frozen/{position}": fitting.read(ref.mask.frozen)
            for position, ref in prunables.items()
            if ref.mask is not None and ref.mask.frozen is not None
        }
        with replacing(file) as stream:
            np.savez(stream, allow_pickle=False, **arrays)
        _logger.info("Saved the pruner of %r to %s.", self.model.name, file)

    @classmethod
    def load(cls, file: str | os.PathLike, model: keras.Model) -> LotteryTicketPruner:
        """Reads a pruner from a file that `save` wrote, for a model of the same architecture.

        A masked model gets the saved masks and what they freeze pruned weights at. Its weights stay
        as they are; `rewind` brings the recorded ones.

        Args:
            file: The file.
            model: The model that the pruner is for from now on.

        Raises:
            ValueError: The file is not a pruner's, or the model has other weights (the message
                names the layer and both shapes) or other masks. The model has not changed then.
        """
        state, arrays = _read_file(file)
        pruner = cls(model)
        count = len(state["paths"])
        initial = [arrays[f"initial/{i}"] for i in range(count)]
        pruner._compare(state["paths"], [array.shape for array in initial], f"The file {file}")
        prunables = pruner._prunables(model)
        if list(prunables) != state["masked"]:
            raise ValueError(
                f"The file {file} has masks for {[state['paths'][i] for i in state['masked']]}, "
                f"the model {model.name!r} for {[pruner._keys[i] for i in prunables]}. Convert the "
                "model as it was when the pruner was saved."
            )
        pruner._initial = tuple(_read_only(array) for array in initial)
        if state["final"]:
            pruner._final = tuple(_read_only(arrays[f"final/{i}"]) for i in range(count))
        pruner._final_is_new = state["final_is_new"]
        pruner._updates = state["updates"]
        pruner._clocks = [tuple(clock) for clock in state["clocks"]]
        pruner._rescaling.factors = dict(state["rescaled"])
        pruner._rescaling.unscaled = {
            i: arrays[f"unscaled/{i}"] for i in prunables if f"unscaled/{i}" in arrays
        }
        pruner._write_masks(model, {i: arrays[f"mask/{i}"] for i in prunables})
        if is_masked(model):
            pruner._freeze({i: arrays.get(f"frozen/{i}") for i in prunables})
        _logger.info("Loaded the pruner of %r from %s.", model.name, file)
        return pruner

    # Inside.

    def _snapshot(self, model: keras.Model) -> tuple[np.ndarray, ...]:
        ml.sync(model)
        return tuple(_read_only(fitting.read(variable)) for variable in model.weights)

    def _restart(self, values: Sequence[np.ndarray], optimizer: bool) -> None:
        """Assigns all weights and brings the optimizer back to its recorded step."""
        model = self._checked(self.model)
        compiled = getattr(model, "optimizer", None) if optimizer else None
        fresh = fitting.fresh_optimizer(compiled) if compiled is not None else None
        before = [fitting.read(variable) for variable in model.weights]
        _assign(model.weights, values)
        if compiled is not None:
            # After the weights: there are optimizers whose slots start as copies of them.
            same = compiled is self._timed_optimizer
            steps = [step for step, _ in self._clocks]
            rates = [rate if same else None for _, rate in self._clocks]
            try:
                fitting.reset_optimizer(compiled, fresh, model.trainable_variables, steps, rates)
            except Exception:
                _assign(model.weights, before)
                raise

    def _kernel(self, position: int, ref: WeightRef, seed: int) -> treatments.Kernel:
        rng = treatments.generator(seed, ref.path)
        draw_seed = int(rng.integers(2**31))
        return treatments.Kernel(
            mask=self._mask(position, ref),
            rng=rng,
            initial=self._initial[position],
            final=None if self._final is None else self._final[position],
            draw=lambda: treatments.draw_again(ref, draw_seed),
        )

    def _freeze(self, frozen: Mapping[int, np.ndarray | None]) -> None:
        """Writes what pruned weights are; functions compiled for masks without are made anew."""
        refs = self._prunables(self.model)
        with fitting.variable_scope(self.model):
            changed = [refs[position].mask.freeze(values) for position, values in frozen.items()]
        if any(changed):
            fitting.remake_functions(self.model)

    def _prunables(self, model: keras.Model) -> dict[int, WeightRef]:
        """Those of `_prunables` that have a mask, in the model or here."""
        refs = _prunables(model).items()
        return {i: ref for i, ref in refs if ref.mask is not None or i in self._masks}

    def _mask(self, position: int, ref: WeightRef) -> np.ndarray:
        if ref.mask is None:
            return self._masks[position].copy()
        return ref.mask.to_numpy()

    @contextlib.contextmanager
    def _as_ranked(self, model: keras.Model, criterion: criteria.Criterion) -> Iterator[None]:
        """Gives the model the final weights for a while, if it is those that are ranked."""
        if "final" not in criterion.needs or self._final is None:
            yield
            return
        with restored(model):
            _assign(model.weights, self._final)
            yield

    def _kernels(
        self, prunables: Mapping[int, WeightRef], criterion: criteria.Criterion
    ) -> dict[str, selection.Weights]:
        """What selection is to know of these weights, by path."""
        reads_current = "current" in criterion.needs | criterion.optional
        return {
            self._keys[position]: selection.Weights(
                mask=self._mask(position, ref),
                output_axes=ref.output_axes,
                input_axes=input_axes(ref.layer, ref.name),
                initial=self._initial[position],
                final=None if self._final is None else self._final[position],
                current=fitting.read(ref.variable) if reads_current else None,
            )
            for position, ref in prunables.items()
        }

    def _write_masks(self, model: keras.Model, masks: Mapping[int, np.ndarray]) -> None:
        """Sets masks, of the model if it is masked, of the pruner otherwise, and counts them."""
        if is_masked(model):
            refs = self._prunables(model)
            ml.set_masks(model, {refs[position].path: mask for position, mask in masks.items()})
        else:
            self._masks = {position: mask.astype(bool) for position, mask in masks.items()}
            self.masks_version += 1

    def _require_masked(self, method: str) -> None:
        if not is_masked(self.model):
            raise ValueError(
                f"`{method}` needs a masked model, and {self.model.name!r} is plain. Make the "
                "pruner for `masked_layers.convert_to_masked(model)` instead, or use "
                "`calc_prune_mask`, `apply_pruning` and `PrunerCallback` with the plain model."
            )
        if any(mask.learned for mask in _masks(self.model)):
            raise ValueError(
                f"`{method}` needs binary masks, and those of {self.model.name!r} are learned. "
                "Make the pruner for `masked_layers.harden(model)` instead."
            )

    def _checked(self, model: keras.Model | None) -> keras.Model:
        """The model, by default the pruner's own, if its weights are those of the records."""
        if model is None:
            model = self.model
        shapes = [tuple(variable.shape) for variable in model.weights]
        if shapes != list(self._shapes):
            self._compare(_weight_keys(model), shapes, f"The model {model.name!r}")
        return model

    def _compare(self, keys: list[str], shapes: list[tuple[int, ...]], what: str) -> None:
        for i in range(max(len(keys), len(self._keys))):
            found = (keys[i], tuple(shapes[i])) if i < len(keys) else None
            expected = (self._keys[i], self._shapes[i]) if i < len(self._keys) else None
            if found is None or expected is None or found[1] != expected[1]:
                raise ValueError(
                    f"{what} does not fit this pruner: it has {_describe(found)} where the pruner "
                    f"has {_describe(expected)}. Both must be of the same architecture."
                )


def _describe(weight: tuple[str, tuple[int, ...]] | None) -> str:
    if weight is None:
        return "no further weight"
    layer, _, name = weight[0].rpartition("/")
    return f"{name!r} of layer {layer!r} with shape {weight[1]}"


def is_masked(model: keras.Model) -> bool:
    """Whether any weight of the model has a mask."""
    return any(ref.mask is not None for ref in ml.weight_refs(model))


def _prunables(model: keras.Model) -> dict[int, WeightRef]:
    """The masked weights, in a plain model all maskable ones, by position among the weights."""
    positions = {id(variable): i for i, variable in enumerate(model.weights)}
    refs = {positions[id(ref.variable)]: ref for ref in ml.weight_refs(model)}
    return {i: ref for i, ref in refs.items() if ref.mask is not None} or refs


def _weight_keys(model: keras.Model) -> list[str]:
    """A path for each of the model's weights, in their order, each different."""
    names = {
        id(variable): paths.join(path, variable.name)
        for path, layer in paths.walk(model)
        for variable in _keras.own_variables(layer)
    }
    names |= {id(ref.variable): ref.path for ref in ml.weight_refs(model)}
    keys: dict[str, None] = {}
    for variable in model.weights:
        key = name = names.get(id(variable), variable.path)
        count = 0
        while key in keys:
            count += 1
            key = f"{name}_{count}"
        keys[key] = None
    return list(keys)


def _masks(model: keras.Model) -> list[ml.Mask]:
    return [ref.mask for ref in ml.masked_refs(model)]


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def _assign(variables: list[keras.Variable], values: Any) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def freeze_at_zero(model: keras.Model) -> None:
    """Lets the pruned weights of masks that hold them frozen read as zero, like all others."""
    for ref in ml.masked_refs(model):
        if ref.mask.frozen is not None:
            ref.mask.freeze(np.zeros(ref.variable.shape))


@contextlib.contextmanager
def restored(model: keras.Model) -> Iterator[None]:
    """Puts every variable of the model back at the end, and hides its optimizer until then."""
    ml.sync(model)
    variables = {id(v): v for v in [*model.variables, *model.metrics_variables]}.values()
    before = [fitting.read(variable) for variable in variables]
    try:
        # `evaluate` builds an optimizer that is not, and some copy weights then.
        with _keras.replaced(model, "optimizer", None):
            yield
    finally:
        # An evaluation that failed left the state outside the variables.
        with contextlib.suppress(RuntimeError):
            ml.sync(model)
        model.reset_metrics()  # those that the evaluation created
        _assign(list(variables), before)


def _set_rescale(model: keras.Model, flags: Mapping[ml.Mask, bool], *, around: bool = True) -> bool:
    """Switches the factor of each mask; functions compiled with another one are made again."""
    changed = {mask: rescale for mask, rescale in flags.items() if mask.rescale != rescale}
    for mask, rescale in changed.items():
        mask.rescale = rescale
    if changed:
        fitting.remake_functions(model, around=around)
    return bool(changed)


@contextlib.contextmanager
def rescaling(model: keras.Model, flags: Mapping[ml.Mask, bool]) -> Iterator[None]:
    """Evaluates with other factors, and gives back the flags and the compiled functions."""
    names = [f"{kind}_function" for kind in ("train", "test", "predict")]
    functions = {name: getattr(model, name, None) for name in names}
    before = {mask: mask.rescale for mask in flags}
    changed = _set_rescale(model, flags, around=False)
    try:
        yield
    finally:
        if changed:
            for mask, rescale in before.items():
                mask.rescale = rescale
            for name, function in functions.items():
                setattr(model, name, function)


def _read_file(file: str | os.PathLike) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The state and the arrays of a pruner's file, each as `save` writes them."""
    try:
        arrays = read_npz(file)
        state = json.loads(str(arrays.pop("state")))
        if state["format"] != _FORMAT or state["version"] != _FORMAT_VERSION:
            raise ValueError(f"format {state['format']} {state['version']}")
        _check_state(state, arrays)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{file} is not a file that `LotteryTicketPruner.save` of this version wrote: {error}"
        ) from error
    return state, arrays


def _check_state(state: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Refuses arrays that are not numbers of the shape of their weight, and names them."""
    for number, path in enumerate(state["paths"]):
        there = {"initial weights": arrays[f"initial/{number}"]}
        shape = there["initial weights"].shape
        if state["final"]:
            there["final weights"] = arrays[f"final/{number}"]
        if number in state["masked"]:
            there["mask"] = arrays[f"mask/{number}"]
        if f"frozen/{number}" in arrays:
            there["frozen values"] = arrays[f"frozen/{number}"]
        if f"unscaled/{number}" in arrays:
            there["weights before rescaling"] = arrays[f"unscaled/{number}"]
        for what, array in there.items():
            if array.shape != shape or array.dtype.kind not in ("b" if what == "mask" else "fiub"):
                raise ValueError(
                    f"{what} of {array.dtype}{array.shape} for {path}, which has the shape {shape}"
                )

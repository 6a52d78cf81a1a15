"""The pruner: records weights of a model, and computes masks, rewinds and treats weights."""

from __future__ import annotations

import dataclasses
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
    channels,
    criteria,
    distributions,
    notices,
    one_shot,
    optimizers,
    plain_models,
    probes,
    records,
    selection,
    structures,
    targets,
    treatments,
)
from lottery_ticket_pruner._keras import built_from
from lottery_ticket_pruner.budgets import Latency
from lottery_ticket_pruner.overrides import (
    assign,
    freeze,
    freeze_at_zero,
    rescaling,
    state_restored,
)
from lottery_ticket_pruner.records import is_masked
from lottery_ticket_pruner.variables import read

if TYPE_CHECKING:
    from masked_layers import SparsityReport, WeightRef

_logger = logging.getLogger(__name__)


class LotteryTicketPruner(plain_models.PlainPruning):
    """Prunes a Keras model, rewinds it to recorded weights and evaluates its masks.

    The current weights of the model are recorded as the *initial* weights, to which a ticket is
    rewound. `set_pretrained_weights` records the *final* weights, which most criteria rank. A
    record is a read-only copy of every weight: kernels, biases and statistics. Masks are not
    weights.

    The masks of a masked model are variables of the model, which the pruner reads and writes there.
    For a plain model, the pruner holds the masks itself, and `apply_pruning` and `PrunerCallback`
    zero the pruned weights. `update_masks`, `rewind` and `evaluate_supermask` require a masked
    model.

    To rewind the learning rate too, compile the model before creating the pruner.

    Args:
        model: A built Keras model with at least one kernel-like weight, either plain or created by
            `masked_layers.convert_to_masked`.

    Attributes:
        measured_latency: What the last `update_masks` measured for a budget of latency, or None.
        stored_bytes: What it counted for a budget of bytes, or None.
        multiply_adds: The same for a budget of multiply-adds of single weights.

    Raises:
        ValueError: If the model is not built or has nothing to prune.

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
        self._without_records(model)
        self.set_initial_weights()

    def _without_records(self, model: keras.Model) -> None:
        """Initializes everything but the initial weights and clocks."""
        super().__init__(model)
        self._final: tuple[np.ndarray, ...] | None = None
        self._final_is_new = False
        self._timed_optimizer = getattr(model, "optimizer", None)
        self.followed = channels.Followed()
        self.measured_latency, self.stored_bytes, self.multiply_adds = probes.Reached()

    # Records.

    @property
    def initial_weights(self) -> Mapping[str, np.ndarray]:
        """Initial weights by path, as read-only arrays. `rewind` restores them."""
        return MappingProxyType(dict(zip(self._architecture.paths, self._initial, strict=True)))

    @property
    def final_weights(self) -> Mapping[str, np.ndarray] | None:
        """Final weights by path, as read-only arrays. None before they are recorded."""
        if self._final is None:
            return None
        return MappingProxyType(dict(zip(self._architecture.paths, self._final, strict=True)))

    def set_initial_weights(self, model: keras.Model | None = None) -> None:
        """Records the current weights as the initial weights, which `rewind` restores.

        Call this after k steps of training to rewind to step k. The step count and the learning
        rate of the optimizer are recorded as well.

        Args:
            model: A model of the same architecture to record. By default the pruner's model.

        Raises:
            ValueError: If the model has other weights. The message names the layer and both shapes.
        """
        model = self._checked(model)
        self._initial = records.snapshot(model)
        self._clocks = optimizers.read_clocks(getattr(model, "optimizer", None))
        self._timed_optimizer = getattr(model, "optimizer", None)
        _logger.info("Recorded %d initial weights of %r.", len(self._initial), model.name)

    def set_pretrained_weights(self, model: keras.Model | None = None) -> None:
        """Records the current weights as the final weights, which most criteria rank.

        Args:
            model: A model of the same architecture to record. By default the pruner's model.

        Raises:
            ValueError: If the model has other weights. The message names the layer and both shapes.
        """
        model = self._checked(model)
        final = list(records.snapshot(model))
        for position, ref in self._prunables(model).items():
            if ref.mask is not None and ref.mask.frozen is not None:
                # Criteria that compare a frozen weight with w0 need its frozen value, because its
                # raw value is meaningless.
                kept = self._mask(position, ref)
                final[position] = np.where(kept, final[position], read(ref.mask.frozen))
        self._final = records.read_only(final)
        self._final_is_new = True
        _logger.info("Recorded %d final weights of %r.", len(self._final), model.name)

    # Masked models.

    def update_masks(
        self,
        strategy: criteria.Identifier = "large_final",
        *,
        rate: selection.Share | None = None,
        sparsity: selection.Share | None = None,
        budget: Mapping[str, float | Latency] | None = None,
        scope: str | None = None,
        seed: int | None = None,
        structure: structures.Identifier | None = None,
        distribution: distributions.Identifier | None = None,
        data: Any = None,
        reconstruct: bool = False,
        sequential: bool = True,
    ) -> SparsityReport:
        """Prunes the masked model further, by removing the lowest-ranked weights from its masks.

        Pruned weights never come back; `reset_masks` starts over. Raw weights are only changed by
        `reconstruct`.

        Args:
            strategy: A criterion: name, configuration, `criteria.Criterion` or function.
            rate: Share of the kept weights to prune now, in [0, 1). A mapping from patterns of
                paths to shares, with a `"default"`, gives each layer its own.
            sparsity: Share of all weights that are pruned afterwards, in the same form as `rate`.
                Exactly one of `rate`, `sparsity` and `budget` must be given.
            budget: With `structure="channels"`, the shares of multiply-adds, weights and latency on
                this machine that are left, of one or several: `{"macs": 0.5, "latency": 0.6}`. See
                `Latency` for batches and milliseconds. For single weights one of `{"macs": 0.1}`
                (kept weights times uses), `{"latency": 0.5}` (that of `export_sparse_torch`) and
                `{"bytes": 200_000}` or a share (what a sparse SavedModel stores of the weights).
            scope: Weights that are ranked together. With `"layer"` (the default for most
                criteria), every layer loses the same share. With `"global"`, the weights with the
                lowest scores of the whole model are pruned, wherever they are. With `"output"`,
                every output of a layer loses the same share. For channels also `"isomorphic"`:
                layers of equal shapes share a ranking.
            seed: Seed for random scores and ties. The default is the number of updates since the
                masks were last reset, so updates differ but repeated runs agree.
            structure: Weights that are pruned together: `"channels"` (filters and units with all
                weights tied to them), `"filters"`, `"units"`, blocks such as `"4x1"`, N:M patterns
                such as `"2:4"` (without rate, sparsity or scope), or any other identifier for
                `structures.get`. Weights that it does not apply to are left unchanged, and a logged
                warning names them.
            distribution: How a single `sparsity` of the whole model is divided among layers:
                `"uniform"`, `"erk"`, or any other identifier for `distributions.get`.
            data: Data for criteria of gradients or activations: arrays `(x, y)` or
                `(x, y, sample_weight)`, `x` alone if no targets are needed, or a data set of
                batches, which is read into memory (see `training.to_arrays`). Other criteria
                ignore it, but `reconstruct` needs `x`: a few hundred examples.
            reconstruct: Whether to fit the kept weights and biases of each masked layer to the
                outputs that it had before the update, by least squares on `data`, and to estimate
                the statistics of batch normalization again, in place of training. It changes the
                current weights of the model, and no recorded ones. Not with a budget of bytes.
            sequential: Whether `reconstruct`, and criteria of activations that rank each layer
                separately (`"wanda"`), measure the inputs of a layer after the layers before it
                have been pruned and reconstructed. Otherwise all are measured before the update.

        Returns:
            A report of the model's sparsity.

        Raises:
            ValueError: If the model is not masked, a record or data are missing, or an argument is
                wrong. In that case nothing is changed.

        Warns:
            UserWarning: If the criterion ranks final weights recorded before the last update, a
                mask keeps no weight, nothing was pruned, or layers could not be reconstructed.
        """
        self._require_masked("update_masks")
        manner = one_shot.Manner(reconstruct=reconstruct, sequential=sequential)
        request = selection.Request.of(
            strategy,
            rate=rate,
            sparsity=sparsity,
            budget=budget,
            scope=scope,
            seed=self._updates if seed is None else seed,
            structure=structure,
            distribution=distribution,
        )
        stale = "final" in request.criterion.needs and not self._final_is_new
        self.prune(request, data=data, manner=manner)
        if stale:
            warnings.warn(
                "The final weights were recorded before the last mask update, so the same weights "
                "were ranked again. Call `set_pretrained_weights` after training.",
                stacklevel=2,
            )
        return ml.sparsity_report(self.model)

    def masks_at(
        self,
        strategy: criteria.Identifier = "large_final",
        *,
        sparsities: Sequence[selection.Share],
        scope: str | None = None,
        seed: int = 0,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Computes masks for many sparsities from one ranking of all weights, without setting them.

        Each result is what `update_masks` would set after `reset_masks`, including ties.

        Args:
            strategy: A criterion: name, configuration, `criteria.Criterion` or function.
            sparsities: The sparsities, in any order: shares of all weights, or mappings from
                patterns of paths to shares.
            scope: Weights that are ranked together: `"layer"`, `"global"` or `"output"`.
            seed: Seed for random scores and ties.

        Returns:
            An iterator over dicts from path to bool mask, one for each sparsity.

        Raises:
            ValueError: If a record is missing, or an argument is wrong.

        Warns:
            UserWarning: If a mask keeps nothing, once, for the first such sparsity.
        """
        request = selection.Request.of(strategy, scope=scope, seed=seed)
        ml.sync(self.model)
        kernels = self._kernels(self._prunables(self.model), request.criterion)
        whole = {p: dataclasses.replace(k, mask=np.ones_like(k.mask)) for p, k in kernels.items()}
        masks = selection.select_many(request, whole, sparsities)
        return notices.watched(masks, sparsities)

    def rewind(self, optimizer: bool = True) -> None:
        """Restores the initial weights. Masks are not changed.

        Args:
            optimizer: Whether to reset the optimizer as well. Slots become as after `build`. The
                learning rate is restored to the recorded one, if it is a variable and the model has
                not been compiled with another optimizer since. The step count becomes 0, or the
                recorded one if a learning-rate schedule reads it. Compiled functions stay valid.

        Raises:
            ValueError: If the model is not masked, or its trainable weights have changed since the
                optimizer was built. In that case nothing is changed.
        """
        self._require_masked("rewind")
        self._restart(self._initial, optimizer)
        _logger.info("Rewound %d weights of %r.", len(self._initial), self.model.name)

    def treat(
        self,
        kept: treatments.KeptIdentifier = "rewind",
        pruned: treatments.PrunedIdentifier = "zero",
        *,
        seed: int = 0,
        optimizer: bool = True,
    ) -> None:
        """Sets the values that kept weights start from and the values that pruned weights have.

        Zhou et al. call these mask-1 and mask-0 actions. `treat()` is `rewind()` with pruned
        weights at zero; see `lottery_ticket_pruner.treatments` for the others. All values derive
        from the recorded initial and final weights, so repeated treatments do not accumulate. All
        other weights (biases, statistics) are restored to their initial values, or to their final
        values with `kept="finetune"`. Nonzero values of pruned weights are frozen in the mask: they
        are part of the graph and saved with it, but not trained. `rewind` keeps them, `treat` and
        `reset_masks` remove them. Do not call this method while `fit` is running.

        Args:
            kept: A treatment of kept weights: name, configuration, `treatments.Treatment` or
                function.
            pruned: A treatment of pruned weights, in one of the same forms.
            seed: Seed for new values, permutations and signs.
            optimizer: Whether to reset the optimizer as well, as in `rewind`.

        Raises:
            ValueError: If the model is not masked, a treatment is unknown or reads final weights
                that were not recorded, or a layer has no initializer to draw from. In that case
                nothing is changed.

        Reference:
            - [Zhou et al., arXiv 1905.01067](https://arxiv.org/abs/1905.01067), sections 3 and 4
        """
        self._require_masked("treat")
        kept, pruned = treatments.get_kept(kept), treatments.get_pruned(pruned)
        final = self._final
        for treatment in (kept, pruned):
            if treatment.needs_final and final is None:
                raise ValueError(
                    f"The treatment {treatment.name!r} reads the final weights. Call "
                    "`set_pretrained_weights` after training."
                )
        ml.sync(self.model)
        tuned = kept is treatments.get_kept("finetune")
        zeroed = pruned is treatments.get_pruned("zero")
        values = list(self._initial if final is None or not tuned else final)
        frozen = {}
        for position, ref in self._prunables(self.model).items():
            kernel = self._kernel(position, ref, seed)
            effective = treatments.treat(kernel, kept, pruned)
            values[position] = np.where(kernel.mask, effective, kernel.initial)
            # Zeros of other treatments are kept too, because later rounds read final values.
            used = not zeroed and not kernel.mask.all()
            # Entries pruned by a later update read as w0 until they are treated.
            frozen[position] = np.where(kernel.mask, kernel.initial, effective) if used else None
        self._restart(values, optimizer)
        self._freeze(frozen)
        names = self.model.name, kept.name, pruned.name
        _logger.info("Treated kept weights of %r by %s, pruned ones by %s.", *names)

    def reset_masks(self) -> None:
        """Sets all masks to ones and the count of updates to 0. Raw weights are not changed.

        Frozen values of pruned weights are removed.
        """
        if is_masked(self.model):
            masks = ml.get_masks(self.model)
            ml.set_masks(self.model, {path: np.ones_like(mask) for path, mask in masks.items()})
            self._freeze(dict.fromkeys(self._prunables(self.model)))
        self._reset_held()
        _logger.info("Reset the masks of %r: all weights are kept.", self.model.name)

    def evaluate_supermask(
        self,
        x: Any = None,
        y: Any = None,
        *,
        weights: str = "initial",
        dwr: bool = False,
        **evaluate_kwargs: Any,
    ) -> dict[str, float]:
        """Evaluates the masks over the initial weights, and returns the metrics of the model.

        The model is left unchanged, even if the evaluation fails: weights, masks, optimizer,
        metrics and compiled functions.

        Args:
            x: Input data, as for `keras.Model.evaluate`.
            y: Targets, as for `keras.Model.evaluate`.
            weights: `"initial"` for the initial weights, or `"signed_constant"` for sign(w0) times
                the standard deviation of w0, per masked weight. Weights without a mask always have
                their initial values.
            dwr: Whether masked weights are multiplied by size / ones(mask).
            **evaluate_kwargs: Further arguments of `keras.Model.evaluate`.

        Returns:
            The metrics by name.

        Raises:
            ValueError: If the model is not masked or not compiled, or `weights` is not supported.

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
        masks = [ref.mask for ref in ml.masked_refs(model)]
        with state_restored(model), rescaling(model, dict.fromkeys(masks, dwr)):
            assign(model.weights, values)
            freeze_at_zero(model)
            size, weight = (evaluate_kwargs.get(key) for key in ("batch_size", "sample_weight"))
            with targets.explained(model, x, y), built_from(model, size or 32, (x, y, weight)):
                return model.evaluate(x, y, **evaluate_kwargs, return_dict=True)

    def prune(
        self,
        request: selection.Request,
        *,
        data: Any = None,
        model: keras.Model | None = None,
        manner: one_shot.Manner = one_shot.ALL_AT_ONCE,
    ) -> None:
        """Computes and sets new masks of a model, for `update_masks` and schedules.

        Args:
            request: The pruning request.
            data: Data for criteria of gradients or activations, as in `update_masks`.
            model: A model of the pruner's architecture to prune. By default the pruner's model.
            manner: Whether to prune layer by layer, and to reconstruct.

        Raises:
            ValueError: If a record or data are missing, or the amount is wrong. In that case
                nothing is changed.
        """
        model = self.model if model is None else model
        criterion = request.criterion
        ml.sync(model)
        # Measurements may change the model temporarily, and with it what is only viewed.
        measured = bool(criterion.evidence) or manner.reconstruct or request.budget is not None
        kernels = self._kernels(prunables := self._prunables(model), criterion, copies=measured)
        graph = self.followed.of(model, request)
        probe = probes.probe_of(model, graph, request, reconstruct=manner.reconstruct)
        masks, values = one_shot.masks_and_values(
            model, request, kernels, graph, data, manner, self._final, probe
        )
        notices.of_update(request, kernels, masks)
        channels.note_limits(request, graph, kernels, masks)
        del kernels  # It may hold the masks before, whose memory can be used for the new ones.
        self._write_masks(model, {i: masks[self._architecture.paths[i]] for i in prunables})
        channels.leave_out(model, graph, masks)
        for variable, value in values:
            variable.assign(value)
        self._final_is_new = False
        self._updates += 1
        notices.log_kept(model.name, criterion.name, masks)
        reached = probes.reached(probe, masks)
        self.measured_latency, self.stored_bytes, self.multiply_adds = reached

    def note_changed_masks(self) -> None:
        """Marks the final weights as outdated, because the masks of the model were changed."""
        self._final_is_new = False

    # Files.

    def save(self, file: str | os.PathLike[str]) -> None:
        """Writes the complete state of the pruner to a file: records, masks and counts.

        This includes the frozen values of pruned weights of a masked model (see `treat`). The file
        contains arrays and JSON, without pickled objects. An existing file is replaced completely
        or not at all.

        Args:
            file: Path of the file, used as given (without adding an extension).
        """
        prunables = self._prunables(self.model)
        same = getattr(self.model, "optimizer", None) is self._timed_optimizer
        frozen = {
            position: read(ref.mask.frozen)
            for position, ref in prunables.items()
            if ref.mask is not None and ref.mask.frozen is not None
        }
        records.Saved(
            paths=self._architecture.paths,
            initial=self._initial,
            final=self._final,
            final_is_new=self._final_is_new,
            updates=self._updates,
            clocks=[(step, rate if same else None) for step, rate in self._clocks],
            masks={i: self._mask(i, ref) for i, ref in self._with_masks(self.model).items()},
            frozen=frozen,
            factors=self._rescaling.factors,
            unscaled=self._rescaling.unscaled,
        ).write(file)
        _logger.info("Saved the pruner of %r to %s.", self.model.name, file)

    @classmethod
    def load(cls, file: str | os.PathLike[str], model: keras.Model) -> LotteryTicketPruner:
        """Reads a pruner from a file written by `save`, for a model of the same architecture.

        A masked model gets the saved masks and frozen values. Its weights are not changed; call
        `rewind` to restore the recorded ones.

        Args:
            file: Path of the file.
            model: The model that the pruner is used with.

        Raises:
            masked_layers.FileContentError: If the file was not written by `save`, or the model has
                different weights (the message names the layer and both shapes) or different masks.
                In that case the model is not changed.
        """
        saved = records.Saved.read(file)
        pruner = cls.__new__(cls)
        pruner._without_records(model)  # Which are those of the file.
        shapes = [array.shape for array in saved.initial]
        pruner._architecture.compare(saved.paths, shapes, f"The file {file}", ml.FileContentError)
        masked, paths = pruner._with_masks(model), pruner._architecture.paths
        if list(masked) != list(saved.masks):
            raise ml.FileContentError(
                f"The file {file} has masks for {[saved.paths[i] for i in saved.masks]}, the model "
                f"{model.name!r} for {[paths[i] for i in masked]}. Convert the model the same "
                "way as when the pruner was saved."
            )
        pruner._initial, pruner._final = saved.initial, saved.final
        pruner._final_is_new, pruner._updates = saved.final_is_new, saved.updates
        pruner._clocks = list(saved.clocks)
        pruner._rescaling = plain_models.Rescaling(saved.factors, saved.unscaled)
        pruner._write_masks(model, saved.masks)
        if is_masked(model):
            pruner._freeze({i: saved.frozen.get(i) for i in pruner._prunables(model)})
        _logger.info("Loaded the pruner of %r from %s.", model.name, file)
        return pruner

    # Inside.

    def _restart(self, values: Sequence[np.ndarray], optimizer: bool) -> None:
        """Assigns all weights and resets the optimizer to its recorded step."""
        model = self._checked(self.model)
        compiled = getattr(model, "optimizer", None) if optimizer else None
        fresh = optimizers.unbuilt_copy(compiled) if compiled is not None else None
        # A copy of all weights only where the reset may fail.
        fits = compiled is None or optimizers.is_built_for(compiled, model.trainable_variables)
        before = [] if fits else [read(variable) for variable in model.weights]
        assign(model.weights, values)
        if compiled is not None:
            # After the weights, because some optimizers initialize slots with copies of them.
            same = compiled is self._timed_optimizer
            steps = [step for step, _ in self._clocks]
            rates = [rate if same else None for _, rate in self._clocks]
            try:
                optimizers.reset_optimizer(compiled, fresh, model.trainable_variables, steps, rates)
            except Exception:
                if before:
                    assign(model.weights, before)
                raise

    def _kernel(self, position: int, ref: WeightRef, seed: int) -> treatments.Kernel:
        """Returns the mask and records of a weight, for treatments."""
        rng = treatments.generator(seed, ref.path)
        draw_seed = int(rng.integers(2**31))
        return treatments.Kernel(
            mask=self._mask(position, ref),
            rng=rng,
            initial=self._initial[position],
            draw=lambda: treatments.draw_again(ref, draw_seed),
            **({} if self._final is None else {"final": self._final[position]}),
        )

    def _freeze(self, frozen: Mapping[int, np.ndarray | None]) -> None:
        """Sets the frozen values of pruned weights, by position. None removes them."""
        refs = self._prunables(self.model)
        values = {ref.mask: frozen[i] for i, ref in refs.items() if ref.mask and i in frozen}
        freeze(self.model, values)

    def _require_masked(self, method: str) -> None:
        records.check_binary_masks(self.model, method)

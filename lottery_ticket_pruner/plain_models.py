"""The earlier API, for plain and masked models, with the masks and factors held for plain ones."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner import criteria, records, selection, zero_hold
from lottery_ticket_pruner.records import is_masked
from lottery_ticket_pruner.variables import read, viewed
from masked_layers.maskable import input_axes, why_quantized

if TYPE_CHECKING:
    from masked_layers import WeightRef

Key = tuple[int, tuple[int, ...]]


class Rescaling:
    """Factors that `LotteryTicketPruner.apply_dwr` has multiplied weights by, by position.

    A plain model can only store a factor in its weights, and these may be replaced between two
    calls. Therefore the weights before the multiplication are kept as well.

    Args:
        factors: Current factors. A weight that is not listed has no factor.
        unscaled: Weights before the multiplication, by position. Missing if the pruner was loaded
            from a file without them.
    """

    def __init__(
        self,
        factors: Mapping[int, float] | None = None,
        unscaled: Mapping[int, np.ndarray] | None = None,
    ) -> None:
        self.factors = dict(factors or {})
        self.unscaled = dict(unscaled or {})
        # Weights with their factor at the end of the last training that is known of.
        self._trained: dict[int, np.ndarray] = {}

    def remember(self, position: int, weight: np.ndarray) -> None:
        """Notes that these values of a weight contain its factor, however far they have moved."""
        if position in self.factors:
            self._trained[position] = np.array(weight)

    def apply(
        self,
        position: int,
        weight: np.ndarray,
        mask: np.ndarray,
        initial: np.ndarray,
    ) -> np.ndarray | None:
        """Returns the weight multiplied by `size / ones(mask)`, exactly once.

        Args:
            position: Position of the weight.
            weight: Current values, with or without the factor of an earlier call.
            mask: Mask of the weight, True where an entry is kept.
            initial: Recorded initial values, which have no factor. (The final values may have one,
                because they are recorded after training.)

        Returns:
            The new values with pruned entries set to 0, or None if the factor is already applied.
        """
        ones = int(mask.sum())
        factor = mask.size / ones if ones else 0.0
        carried = self._factor_in(position, weight, mask, initial)
        if factor == carried:
            return None
        unscaled = np.where(mask, weight / carried, 0.0)
        # A factor of 0 cannot be undone, so it is not stored.
        self.factors[position] = factor or 1.0
        self.unscaled[position] = unscaled.astype(weight.dtype)
        return np.where(mask, weight * (factor / carried), 0.0).astype(weight.dtype)

    def _factor_in(
        self,
        position: int,
        weight: np.ndarray,
        mask: np.ndarray,
        initial: np.ndarray,
    ) -> float:
        """Returns the factor that the kept entries of a weight currently contain.

        Since it was applied, the weights may have been trained, which moves them a little, or
        replaced by weights without a factor. Values that were remembered are recognized. For others
        the closer of the two candidates decides.
        """
        factor = self.factors.get(position, 1.0)
        kept = weight[mask].astype("float64")
        if position in self._trained and np.array_equal(kept, self._trained[position][mask]):
            return factor
        if np.array_equal(kept, initial[mask]):
            return 1.0
        if position in self.unscaled:
            unscaled = self.unscaled[position][mask].astype("float64")
            if np.linalg.norm(kept - unscaled) <= np.linalg.norm(kept - factor * unscaled):
                return 1.0
        return factor


class PlainPruning(abc.ABC):
    """Base class of `LotteryTicketPruner` with the earlier API, for plain and masked models.

    The subclass holds the records and computes new masks. The masks of a masked model are stored in
    the model. Those of a plain model are held here, by position among its weights.

    Args:
        model: A built Keras model with at least one kernel-like weight.

    Attributes:
        model: The model.
        masks_version: A number that increases whenever the held masks change.

    Raises:
        TypeError: If it is not a Keras model.
        ValueError: If the model is not built or has nothing to prune.
    """

    # Records, created by the subclass.
    _initial: tuple[np.ndarray, ...]
    _final: tuple[np.ndarray, ...] | None

    def __init__(self, model: keras.Model) -> None:
        if not isinstance(model, keras.Model):
            raise TypeError(f"Expected a `keras.Model`. Received: {model!r}")
        if not model.built or not model.weights:
            raise ValueError(
                f"The model {model.name!r} has no weights yet. Build it first: call it on a batch, "
                "or `model.build(input_shape)`."
            )
        self.model = model
        self._architecture = records.Architecture.of(model)
        shapes = self._architecture.shapes
        # Views of one value: of a masked model, they are never read or replaced.
        self._masks = {i: np.broadcast_to(np.True_, shapes[i]) for i in records.prunables(model)}
        if not self._masks:
            why = why_quantized(model) or (
                "kernels of Keras layers are prunable; weights of other layers are after "
                "`masked_layers.register`."
            )
            raise ValueError(f"The model {model.name!r} has no prunable weight: {why}")
        self.masks_version = 0
        self._rescaling = Rescaling()
        self._updates = 0

    @abc.abstractmethod
    def prune(
        self, request: selection.Request, *, data: Any = None, model: keras.Model | None = None
    ) -> None:
        """Computes and sets new masks of a model."""

    def calc_prune_mask(
        self, model: keras.Model, prune_percentage: float, prune_strategy: Any = "large_final"
    ) -> None:
        """Computes masks that prune a share of the kept weights: 0.5, then 0.2, gives 0.6.

        In a masked model the masks take effect at once. The weights of a plain model stay as they
        are until `apply_pruning`.

        Args:
            model: The model to prune, of the pruner's architecture.
            prune_percentage: Share of the kept weights to prune, above 0 and below 1.
            prune_strategy: A criterion: name, configuration, `criteria.Criterion` or function.

        Raises:
            ValueError: If the share is out of bounds, a record is missing, the strategy is unknown
                or the model has other weights. In that case nothing is changed.
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
        """Zeroes the pruned weights of a plain model. Masked models read them as zero anyway.

        Args:
            model: The model, of the pruner's architecture.

        Raises:
            ValueError: If the model has other weights. The message names the layer and both shapes.
        """
        model = self._checked(model)
        if is_masked(model):
            return
        ml.sync(model)
        for variable, mask in self.held_masks(model):
            variable.assign(zero_hold.zero_pruned(mask, variable))

    def apply_dwr(self, model: keras.Model) -> None:
        """Rescales the kept weights of each layer by size / ones(mask) (dynamic weight rescaling).

        In a masked model this switches on a factor in the forward pass, which follows the masks. In
        a plain model the masked weights are multiplied, and pruned ones are zero afterwards. The
        factor is applied at most once: a second call has no effect, and after a change of the masks
        the factor is replaced. The factor of a mask without ones is 0.

        Weights count as not rescaled if the caller has put earlier weights back, if they equal the
        initial weights or if their masks were reset. Weights that were trained since count as
        rescaled. In a plain model the closer match decides: the weights before the last rescaling
        or those after it. Only weights at the end of a `fit` with a `PrunerCallback`, and those
        that another callback restored in it with the state of the optimizer, are known to be
        rescaled, however far they have moved.

        Args:
            model: The model, of the pruner's architecture.

        Raises:
            ValueError: If the model has other weights. The message names the layer and both shapes.

        Reference:
            - [Zhou et al., arXiv 1905.01067](https://arxiv.org/abs/1905.01067), section 5.2
        """
        model = self._checked(model)
        if is_masked(model):
            ml.set_rescale(model, True)
            return
        ml.sync(model)
        for position, ref in self._prunables(model).items():
            scaled = self._rescaling.apply(
                position,
                read(ref.variable),
                self._masks[position],
                self._initial[position],
            )
            if scaled is not None:
                ref.variable.assign(scaled)

    def remember_rescaled(self, model: keras.Model) -> None:
        """Notes that the current weights of a plain model contain the factors of `apply_dwr`."""
        for position, ref in self._prunables(self._checked(model)).items():
            self._rescaling.remember(position, read(ref.variable))

    @property
    def prunable_tuples(self) -> list[Key]:
        """Positions `(in model.layers, in layer.weights)` of each layer with prunable weights."""
        refs = self._prunables(self.model).values()
        return prunable_tuples(self.model, [ref.variable for ref in refs])

    @property
    def prune_masks_map(self) -> dict[Key, list[np.ndarray | None]]:
        """Current masks: for each of `prunable_tuples` one per weight of the layer, or None.

        The masks are read-only copies with float64 zeros and ones. `calc_prune_mask` and
        `update_masks` make new ones.
        """
        refs = self._prunables(self.model).items()
        masks = {id(ref.variable): self._mask(position, ref) for position, ref in refs}
        return masks_by_layer(self.model, masks)

    @property
    def cumulative_pruning_rate(self) -> float:
        """Share of prunable weights that is currently pruned. 0.0 after `reset_masks`.

        Computed from the masks: after 0.5 and 0.2 it is 0.6, up to rounding to whole
        weights.
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
        """Yields the records, current values and mask of each prunable weight.

        Args:
            model: The model, of the pruner's architecture.

        Yields:
            `(key, layer, index, initial, pretrained, current, mask)`: the path of the weight, the
            layer that holds it, its position in `layer.weights`, the recorded initial and final
            weights (final is None before it is recorded), the current raw weight and the bool
            mask. Changing these arrays does not affect the records or the model.

        Raises:
            ValueError: If the model has other weights. The message names the layer and both shapes.
        """
        model = self._checked(model)
        ml.sync(model)
        for position, ref in self._prunables(model).items():
            index = next(i for i, v in enumerate(ref.layer.weights) if v is ref.variable)
            yield (
                self._architecture.paths[position],
                ref.layer,
                index,
                self._initial[position],
                None if self._final is None else self._final[position],
                read(ref.variable),
                self._mask(position, ref),
            )

    def held_masks(self, model: keras.Model) -> list[tuple[keras.Variable, np.ndarray]]:
        """Returns the masks held for a plain model, each with the variable of `model`."""
        return [
            (ref.variable, self._masks[position])
            for position, ref in self._prunables(model).items()
        ]

    def _prunables(self, model: keras.Model) -> dict[int, WeightRef]:
        """Returns the weights that have a mask, in the model or in the pruner, by position."""
        refs = records.prunables(model).items()
        return {i: ref for i, ref in refs if ref.mask is not None or i in self._masks}

    def _with_masks(self, model: keras.Model) -> dict[int, WeightRef]:
        """Returns these weights, then the scales of normalizations with a mask, by position."""
        return {**self._prunables(model), **records.channel_scales(model)}

    def _mask(self, position: int, ref: WeightRef) -> np.ndarray:
        """Returns a copy of the mask of a weight."""
        if ref.mask is None:
            return self._masks[position].copy()
        return ref.mask.to_numpy()

    def _kernels(
        self,
        prunables: Mapping[int, WeightRef],
        criterion: criteria.Criterion,
        *,
        copies: bool = True,
    ) -> dict[str, selection.Weights]:
        """Returns the mask, layout and records of these weights by path, for selection.

        Without `copies`, masks and current weights are only valid until something is assigned.
        """
        reads_current = "current" in criterion.needs | criterion.optional
        value = read if copies else viewed

        def mask(position: int, ref: WeightRef) -> np.ndarray:
            if copies or ref.mask is None or ref.mask.learned:
                return self._mask(position, ref)
            return viewed(ref.mask.value)

        return {
            self._architecture.paths[position]: selection.Weights(
                mask=mask(position, ref),
                output_axes=ref.output_axes,
                input_axes=input_axes(ref.layer, ref.name),
                initial=self._initial[position],
                final=None if self._final is None else self._final[position],
                current=value(ref.variable) if reads_current else None,
            )
            for position, ref in prunables.items()
        }

    def _write_masks(self, model: keras.Model, masks: Mapping[int, np.ndarray]) -> None:
        """Sets masks by position, in the model if it is masked, otherwise in the pruner."""
        if is_masked(model):
            refs = self._with_masks(model)
            ml.set_masks(model, {refs[position].path: mask for position, mask in masks.items()})
        else:
            self._masks = {position: mask.astype(bool) for position, mask in masks.items()}
            self.masks_version += 1

    def _reset_held(self) -> None:
        """Sets the held masks to ones, and resets the update count and the factors."""
        self._masks = {i: np.broadcast_to(np.True_, mask.shape) for i, mask in self._masks.items()}
        self.masks_version += 1
        self._rescaling = Rescaling()
        self._updates = 0

    def _checked(self, model: keras.Model | None) -> keras.Model:
        """Returns `model` (default: the pruner's) after checking that it has the same weights."""
        if model is None:
            model = self.model
        self._architecture.check(model)
        return model


def prunable_tuples(model: keras.Model, variables: Iterable[keras.Variable]) -> list[Key]:
    """Returns the positions of variables in `model.layers`.

    Args:
        model: The model.
        variables: Some of its weights.

    Returns:
        `(position in model.layers, positions in the weights of that layer)` of each layer that
        holds any of them, itself or further inside. A shared variable counts for the first layer.
    """
    wanted = {id(variable) for variable in variables}
    found = []
    for number, layer in enumerate(model.layers):
        own = [i for i, variable in enumerate(layer.weights) if id(variable) in wanted]
        wanted -= {id(layer.weights[i]) for i in own}
        if own:
            found.append((number, tuple(own)))
    return found


def masks_by_layer(
    model: keras.Model, masks: Mapping[int, np.ndarray]
) -> dict[Key, list[np.ndarray | None]]:
    """Returns masks in the format of the earlier API.

    Args:
        model: The model.
        masks: The mask of each prunable weight, by the id of its variable.

    Returns:
        A dict from each of `prunable_tuples` to a list with the read-only mask of each weight of
        that layer (float64, 0 where pruned), None for weights that cannot be pruned.
    """
    found: dict[Key, list[np.ndarray | None]] = {}
    weights = {id(variable): variable for variable in model.weights}
    for number, indices in prunable_tuples(model, [weights[key] for key in masks]):
        layer = model.layers[number]
        found[number, indices] = [
            _read_only(masks[id(variable)]) if i in indices else None
            for i, variable in enumerate(layer.weights)
        ]
    return found


def _read_only(mask: np.ndarray) -> np.ndarray:
    # Of floats, as the earlier API made them: programs multiply weights of any type by them.
    mask = mask.astype("float64")
    mask.flags.writeable = False
    return mask

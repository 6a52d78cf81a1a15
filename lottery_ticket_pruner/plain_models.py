"""Plain models under the earlier API: factors of rescaling in their weights, masks by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import keras
import numpy as np

Key = tuple[int, tuple[int, ...]]


class Rescaling:
    """Factors that `LotteryTicketPruner.apply_dwr` has left in weights, by position of the weight.

    A plain model has no place for a factor but its weights, and a caller may put other weights
    there between two calls. So the weights are kept as they were before the factor, too.

    Attributes:
        factors: Factors now in the weights; a weight that is not listed has none.
        unscaled: The weights before their factor, of the same positions. Missing where a pruner was
            loaded from a file that has none.
    """

    def __init__(self) -> None:
        self.factors: dict[int, float] = {}
        self.unscaled: dict[int, np.ndarray] = {}

    def apply(
        self,
        position: int,
        weight: np.ndarray,
        mask: np.ndarray,
        initial: np.ndarray,
    ) -> np.ndarray | None:
        """Returns the weight with the factor `size / ones(mask)` in it, once.

        Args:
            position: Position of the weight.
            weight: Its values now, with or without the factor of an earlier call.
            mask: Its mask, True where an entry is kept.
            initial: Its recorded initial values, which have no factor. The final ones may have
                one: they are recorded after a training.

        Returns:
            The new values, pruned entries being 0; None where the factor is in the weight already.
        """
        ones = int(mask.sum())
        factor = mask.size / ones if ones else 0.0
        carried = self._factor_in(position, weight, mask, initial)
        if factor == carried:
            return None
        unscaled = np.where(mask, weight / carried, 0.0)
        # Weights times 0 are lost: no factor can be taken out of them again.
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
        """Returns the factor that the kept entries of a weight have in them.

        They may have been trained since it was put there, which moves them a little, or replaced by
        weights without a factor. Whichever is closer, with the factor or without it, decides.
        """
        factor = self.factors.get(position, 1.0)
        kept = weight[mask].astype("float64")
        if np.array_equal(kept, initial[mask]):
            return 1.0
        if position in self.unscaled:
            unscaled = self.unscaled[position][mask].astype("float64")
            if np.linalg.norm(kept - unscaled) <= np.linalg.norm(kept - factor * unscaled):
                return 1.0
        return factor


def prunable_tuples(model: keras.Model, variables: Iterable[keras.Variable]) -> list[Key]:
    """Returns where in `model.layers` these variables are.

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
    """Returns masks as the earlier API kept them.

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

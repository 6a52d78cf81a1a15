"""The mask: a small Keras layer that decides what a layer reads in place of its raw weight."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from masked_layers import _keras, compiled
from masked_layers.packing import MaskState

_raw_view: contextvars.ContextVar[bool] = contextvars.ContextVar("raw_view", default=False)


@contextlib.contextmanager
def raw_view() -> Iterator[None]:
    """Makes masked layers read their raw weights (the variables themselves) while it is open.

    Some Keras layers save and load what their `kernel` property returns; without this view the
    values under a mask would be lost on disk.
    """
    token = _raw_view.set(True)
    try:
        yield
    finally:
        _raw_view.reset(token)


def is_raw_view() -> bool:
    """True inside `raw_view()`."""
    return _raw_view.get()


@keras.saving.register_keras_serializable(package="masked_layers")
class Mask(keras.layers.Layer):
    """A binary mask over one weight: kept entries pass, pruned entries read as exactly 0.

    After `freeze(values)` pruned entries read as these constants in place of 0: part of the forward
    pass, not trained, saved with the mask. Without it there is no variable for them.

    The product is a selection, `where(mask, weight, 0)`, and not a multiplication: a pruned entry
    is +0.0 even where the raw weight is negative, infinite or NaN, no gradient of the loss reaches
    it, and a mask of ones changes no bit of the weight or of its gradient.

    A mask is state of the model but not one of its weights: `value` is among `model.variables`
    and in every saved file, and not among `model.weights`, so that `get_weights`, `set_weights`
    and `count_params` are those of the plain model.

    Args:
        initializer: Initializer of the mask; entries other than 0 are kept. Default: keep all.
        rescale: Whether to multiply the kept weights by `size / ones(mask)` (dynamic weight
            rescaling, arXiv 1905.01067, section 5.2; factor 0 for a mask without ones). It is a
            property of the forward pass and never changes a stored weight. Change it later with
            `masked_layers.set_rescale`, which has functions compiled before compiled again.
        **kwargs: `name` and the other arguments of `keras.layers.Layer`.

    Attributes:
        value: `keras.Variable` of dtype bool and of the weight's shape; not trainable.
        frozen: What pruned entries read as: `keras.Variable` of the weight's shape, not trainable;
            None for 0.
        moved_at: The step of training at which dynamic sparse training last changed the mask, saved
            with it; None without such a training. A resumed one learns from it what it has done.
    """

    learned = False  # Whether training changes it.

    def __init__(self, *, initializer: Any = "ones", rescale: bool = False, **kwargs: Any) -> None:
        super().__init__(trainable=self.learned, **kwargs)
        self.initializer = keras.initializers.get(initializer)
        self.rescale = rescale
        self.frozen: keras.Variable | None = None
        self.moved_at: int | None = None
        self._start: MaskState | None = None
        self._lent_value: Any = None
        self._lent_frozen: Any = None

    def build(self, shape: tuple[int, ...]) -> None:
        """Creates `value`.

        Args:
            shape: Shape of the weight.
        """
        start, self._start = self._start, None

        def keep(shape: tuple[int, ...], dtype: Any = None) -> Any:
            if start is not None:
                return ops.convert_to_tensor(start.kept)
            return ops.not_equal(self.initializer(shape, dtype="float32"), 0.0)

        self.value = self.add_weight(
            name="value", shape=shape, dtype="bool", initializer=keep, trainable=False
        )
        if start is not None and start.frozen is not None:
            self._add_frozen(start.frozen)

    @property
    def weights(self) -> list[keras.Variable]:
        """Always empty: a mask is state, not a weight."""
        return []

    def apply(self, weight: Any) -> Any:
        """Returns the effective weight as a tensor.

        Args:
            weight: Raw weight, variable or tensor, of the mask's shape and any float dtype. A
                variable is cast as the layer around it would cast it (mixed precision).
        """
        weight = ops.convert_to_tensor(weight)
        if self.frozen is not None:
            kept = weight * ops.cast(self._factor(), weight.dtype) if self.rescale else weight
            return self.select(kept, self.pruned(weight.dtype))
        effective = self.select(weight, self.pruned(weight.dtype))
        if self.rescale:
            effective = effective * ops.cast(self._factor(), weight.dtype)
        return effective

    call = apply

    def select(self, kept: Any, pruned: Any) -> Any:
        """Returns `kept` where the mask keeps an entry and `pruned` elsewhere."""
        return ops.where(self._keep(), kept, pruned)

    def pruned(self, dtype: str) -> Any:
        """Returns what pruned entries read as: 0, or the frozen values in the weight's shape."""
        if self.frozen is None:
            return ops.cast(0, dtype)
        return ops.cast(self._read("frozen"), dtype)

    def freeze(self, values: Any) -> bool:
        """Makes pruned entries read as constants; kept ones are not concerned.

        A call that adds or removes the variable of these values changes what the model computes:
        functions compiled before must be compiled again. `LotteryTicketPruner.treat` does so.

        Args:
            values: Array of the weight's shape, or None for 0 again.

        Returns:
            Whether the variable was added or removed.

        Raises:
            ValueError: If the values have another shape.
        """
        before = self.frozen
        if values is None:
            if before is not None:
                _keras.untrack_variable(self, "frozen")
                self.frozen = None
        else:
            values = np.asarray(values)
            if not np.issubdtype(values.dtype, np.floating):
                values = values.astype("float32")
            if values.shape != tuple(self.value.shape):
                raise ValueError(
                    f"The frozen values of '{self.path or self.name}' must have the shape of the "
                    f"weight, {tuple(self.value.shape)}. Received: {values.shape}"
                )
            if before is None:
                with _keras.unlocked(self), _keras.layer_scope(self):
                    self._add_frozen(values)
            else:
                before.assign(values)
        if changed := (before is None) != (self.frozen is None):
            _keras.refresh_parameters(self)
        return changed

    def _add_frozen(self, values: np.ndarray) -> None:
        self.frozen = self.add_weight(
            name="frozen",
            shape=values.shape,
            dtype=values.dtype.name,
            initializer=lambda shape, dtype: ops.convert_to_tensor(values, dtype),
            trainable=False,
            autocast=False,
        )
        _keras.match_layout(self.frozen, self.value)

    @property
    def state(self) -> MaskState:
        """All that the mask is at the moment, as arrays."""
        frozen = None if self.frozen is None else np.array(ops.convert_to_numpy(self.frozen))
        return MaskState(self.to_numpy(), self.rescale, frozen)

    def restore(self, state: MaskState) -> None:
        """Brings a state back; a mask that is not built starts from it when it is.

        Functions compiled before must be compiled again where it rescales, or freezes pruned
        entries, and the state does not, or the other way round.
        """
        self.rescale = state.rescale
        if self.built:
            self.value.assign(state.kept)
            self.freeze(state.frozen)
        else:
            self._start = state

    def to_numpy(self) -> np.ndarray:
        """Returns a copy of the mask as a bool array, True where an entry is kept."""
        return np.array(ops.convert_to_numpy(self._keep()), dtype=bool)

    def _keep(self) -> Any:
        return self._read("value")

    def _read(self, name: str) -> Any:
        variable, lent = getattr(self, name), f"_lent_{name}"
        if _keras.is_withdrawn(variable):
            # Inside the optimizer's part of a training step on JAX, where the variables are empty
            # and only the optimizer's own are at hand: the forward pass of the same step, just
            # before, was given the mask.
            return getattr(self, lent)
        value = ops.convert_to_tensor(variable)
        setattr(self, lent, value if _keras.is_lent(variable) else None)
        return value

    def _factor(self) -> Any:
        ones = ops.cast(ops.count_nonzero(self._keep()), "float32")
        size = math.prod(self.value.shape)
        return ops.where(ones > 0, size / ops.maximum(ones, 1.0), 0.0)

    def quantize(self, *args: Any, **kwargs: Any) -> None:
        """Refuses: a quantized layer would read its raw weight and skip the mask.

        Raises:
            ValueError: Always; it names `strip_masks`.
        """
        raise ValueError(
            "A masked model cannot be quantized: its masks would be skipped. Call "
            "`masked_layers.strip_masks(model)` first and quantize what it returns; pruned "
            "weights stay zero."
        )

    def save_own_variables(self, store: Any) -> None:
        """Saves the mask, its frozen values, whether it rescales and when it last moved."""
        store["0"] = self.value
        if self.frozen is not None:
            store["frozen"] = self.frozen
        if self.rescale:
            store["rescale"] = np.ones((), "bool")
        if self.moved_at is not None:
            store["moved_at"] = np.array(self.moved_at, "int64")

    def load_own_variables(self, store: Any) -> None:
        """Loads a saved mask; a file of the plain model holds none and leaves the mask alone.

        Raises:
            ValueError: If the file holds a learned mask, or the saved one has another shape.
        """
        if "scores" in store:
            raise ValueError(
                f"The file holds a learned mask for '{self.path or self.name}', which is binary. "
                "Load it into a model with such masks, and harden that: `masked_layers.harden`."
            )
        if "0" not in store:
            return
        value = np.asarray(store["0"])
        if value.shape != tuple(self.value.shape):
            raise ValueError(
                f"The saved mask '{self.path}' has shape {value.shape}, but the weight it is for "
                f"has shape {tuple(self.value.shape)}. Load it into the model it was saved from."
            )
        self.value.assign(value.astype("bool"))
        changed = self.freeze(np.asarray(store["frozen"]) if "frozen" in store else None)
        if changed or self.rescale != ("rescale" in store):
            self.rescale = "rescale" in store
            compiled.forget_while_loading(self)
        self.moved_at = int(np.asarray(store["moved_at"])) if "moved_at" in store else None

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        config = super().get_config()
        del config["trainable"]
        return {
            **config,
            "initializer": keras.initializers.serialize(self.initializer),
            "rescale": self.rescale,
        }

    def compute_output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns `shape`: the effective weight has the shape of the raw one."""
        return shape


class MaskedRegularizer(keras.regularizers.Regularizer):
    """The penalty of the effective weight, so that a raw value under the mask costs nothing."""

    def __init__(self, plain: keras.regularizers.Regularizer, mask: Mask) -> None:
        self.plain = plain
        self.mask = mask

    def __call__(self, x: Any) -> Any:
        """Returns the penalty of `mask(x)`."""
        return self.plain(self.mask.apply(x))


class MaskedConstraint(keras.constraints.Constraint):
    """A constraint of the effective weight, which leaves out raw values under the mask."""

    def __init__(self, plain: keras.constraints.Constraint, mask: Mask) -> None:
        self.plain = plain
        self.mask = mask

    def __call__(self, w: Any) -> Any:
        """Returns the constrained weight."""
        w = ops.convert_to_tensor(w)
        constrained = self.plain(self.mask.select(w, self.mask.pruned(w.dtype)))
        return self.mask.select(constrained, w)

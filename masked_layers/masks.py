"""The mask: a small Keras layer that computes the effective weight from the raw one."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import Any, NoReturn

import keras
import numpy as np
from keras import ops

from masked_layers import _keras, compiled, workers
from masked_layers.packing import MaskState
from masked_layers.quantization import LEVELS, check, fake_quantized
from masked_layers.types import Tensor

# In `strategy.run` of a `tf.distribute` strategy, replicas may assign different masks, which would
# stay different without an error. With this aggregation, all get the mask of the first replica.
_ONE_DECIDES = "only_first_replica"
_raw_view: contextvars.ContextVar[bool] = contextvars.ContextVar("raw_view", default=False)


@contextlib.contextmanager
def raw_view() -> Iterator[None]:
    """Makes masked layers return their raw weights (the variables themselves) inside the scope.

    Some Keras layers save and load the value of their `kernel` property. Without the raw view, the
    raw values of pruned weights would be lost in files.
    """
    token = _raw_view.set(True)
    try:
        yield
    finally:
        _raw_view.reset(token)


def is_raw_view() -> bool:
    """Returns whether the code runs inside `raw_view()`."""
    return _raw_view.get()


@keras.saving.register_keras_serializable(package="masked_layers")
class Mask(keras.layers.Layer):
    """Binary mask over one weight: kept entries are unchanged, pruned entries are exactly 0.

    After `freeze(values)`, pruned entries are these constants in place of 0. The constants are part
    of the forward pass, not trained, and saved with the mask.

    The mask is applied as a selection, `where(mask, weight, 0)`, and not as a product. A pruned
    entry is therefore +0.0 even if the raw weight is negative, infinite or NaN, no gradient of the
    loss reaches it, and a mask of ones changes no bit of the weight or its gradient.

    A mask is state of the model but not one of its weights: `value` is in `model.variables` and in
    every saved file, but not in `model.weights`. `get_weights`, `set_weights` and `count_params`
    therefore behave as in the plain model.

    Args:
        initializer: Initializer of the mask; entries other than 0 are kept. Default: keep all.
        rescale: Whether to multiply the kept weights by `size / ones(mask)` (dynamic weight
            rescaling, arXiv 1905.01067, section 5.2; the factor is 0 for a mask without ones). This
            is part of the forward pass and never changes a stored weight. To change it later, call
            `masked_layers.set_rescale`, which recompiles functions that were compiled before.
        quantization: `"int8"` or `"int4"` to round kept weights in the forward pass, as described
            for `convert_to_masked(quantize=...)`; weights with fewer than two axes are not rounded.
            Default: None.
        **kwargs: `name` and the other arguments of `keras.layers.Layer`.

    Attributes:
        value: `keras.Variable` of dtype bool with the weight's shape; not trainable.
        frozen: Values of pruned entries: `keras.Variable` with the weight's shape, not trainable;
            None for 0.
        moved_at: Training step at which dynamic sparse training last changed the mask, or None. It
            is saved with the mask, so that a resumed training does not repeat this change.
    """

    learned = False  # Whether training changes it.

    def __init__(
        self,
        *,
        initializer: Any = "ones",
        rescale: bool = False,
        quantization: str | None = None,
        **kwargs: Any,
    ) -> None:
        check(quantization)
        if self.learned and quantization is not None:
            raise ValueError(
                "Only binary masks quantize their weights. Train the mask, call "
                "`masked_layers.harden(model)`, and convert the result with `quantize`. "
                f"Received: quantization={quantization!r}"
            )
        super().__init__(trainable=self.learned, **kwargs)
        self.initializer = keras.initializers.get(initializer)
        self.rescale = rescale
        self.quantization = quantization
        self.frozen: keras.Variable | None = None
        self.moved_at: int | None = None
        self._start: MaskState | None = None
        self._lent_value: Tensor = None
        self._lent_frozen: Tensor = None

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
            name="value",
            shape=shape,
            dtype="bool",
            initializer=keep,
            trainable=False,
            aggregation=_ONE_DECIDES,
        )
        if start is not None and start.frozen is not None:
            self._add_frozen(start.frozen)

    @property
    def weights(self) -> list[keras.Variable]:
        """Always empty: a mask is state, not a weight."""
        return []

    def apply(self, weight: Tensor) -> Tensor:
        """Returns the effective weight as a tensor.

        Args:
            weight: Raw weight, a variable or tensor of the mask's shape and any float dtype. A
                variable is cast as its layer would cast it (mixed precision).
        """
        if self.quantization is None or len(self.value.shape) < 2:
            return self.unquantized(weight)
        dtype = ops.convert_to_tensor(weight).dtype
        with _keras.no_autocast():  # The codes are those of the variable, as in an export.
            # A cast, because TensorFlow's variables of other types are not taken for tensors.
            raw = ops.cast(weight, weight.dtype)
            exact = ops.cast(self.unquantized(raw), "float32")
        rounded = fake_quantized(self.select(exact, ops.cast(0, "float32")), self.quantization)
        return ops.cast(self.select(rounded, exact), dtype)

    call = apply

    def unquantized(self, weight: Tensor) -> Tensor:
        """Returns the effective weight as a tensor, before quantization.

        Args:
            weight: The same as in `apply`.
        """
        weight = ops.convert_to_tensor(weight)
        if self.frozen is not None:
            kept = weight * ops.cast(self._factor(), weight.dtype) if self.rescale else weight
            return self.select(kept, self.pruned(weight.dtype))
        effective = self.select(weight, self.pruned(weight.dtype))
        if self.rescale:
            effective = effective * ops.cast(self._factor(), weight.dtype)
        return effective

    def select(self, kept: Tensor, pruned: Tensor) -> Tensor:
        """Returns `kept` where the mask keeps an entry and `pruned` elsewhere."""
        return ops.where(self.keep(), kept, pruned)

    def pruned(self, dtype: str) -> Tensor:
        """Returns the values of pruned entries: 0, or the frozen values in the weight's shape."""
        if self.frozen is None:
            return ops.cast(0, dtype)
        return ops.cast(self._read("frozen"), dtype)

    def freeze(self, values: Any) -> bool:
        """Sets the constant values of pruned entries; kept entries are not affected.

        If a call adds or removes the variable of these values, functions compiled before must be
        compiled again. `LotteryTicketPruner.treat` does this.

        Args:
            values: Array of the weight's shape, or None to return to 0.

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
        with workers.devices_of(self.value):
            self.frozen = self.add_weight(
                name="frozen",
                shape=values.shape,
                dtype=values.dtype.name,
                initializer=lambda shape, dtype: ops.convert_to_tensor(values, dtype),
                trainable=False,
                autocast=False,
                aggregation=_ONE_DECIDES,
            )
        _keras.match_layout(self.frozen, self.value)

    @property
    def state(self) -> MaskState:
        """Current state of the mask, as arrays."""
        frozen = None if self.frozen is None else np.array(ops.convert_to_numpy(self.frozen))
        return MaskState(self.to_numpy(), self.rescale, frozen, self.quantization)

    def restore(self, state: MaskState) -> None:
        """Restores a state, or uses it as the initial one if the mask is not built yet.

        If this turns rescaling, quantization or the freezing of pruned entries on or off, functions
        compiled before must be compiled again.
        """
        check(state.quantization)
        self.rescale = state.rescale
        self.quantization = state.quantization
        if self.built:
            self.value.assign(state.kept)
            self.freeze(state.frozen)
        else:
            self._start = state

    def to_numpy(self) -> np.ndarray:
        """Returns a copy of the mask as a bool array, True where an entry is kept."""
        return np.array(ops.convert_to_numpy(self.keep()), dtype=bool)

    def keep(self) -> Tensor:
        """Returns a bool tensor of the weight's shape, True where an entry is kept."""
        return self._read("value")

    def _read(self, name: str) -> Tensor:
        variable, lent = getattr(self, name), f"_lent_{name}"
        if _keras.is_withdrawn(variable):
            # In the optimizer's part of a training step on JAX, variables are empty except those of
            # the optimizer. The forward pass of the same step, just before, had the mask.
            return getattr(self, lent)
        value = ops.convert_to_tensor(variable)
        setattr(self, lent, value if _keras.is_lent(variable) else None)
        return value

    def _factor(self) -> Tensor:
        ones = ops.cast(ops.count_nonzero(self.keep()), "float32")
        size = math.prod(self.value.shape)
        return ops.where(ones > 0, size / ops.maximum(ones, 1.0), 0.0)

    @staticmethod
    def quantize(*args: Any, **kwargs: Any) -> NoReturn:
        """Raises an error, because a quantized layer would ignore its mask.

        Raises:
            ValueError: Always. The message names `strip_masks`.
        """
        raise ValueError(
            "A masked model cannot be quantized, because its masks would be ignored. Call "
            "`masked_layers.strip_masks(model)` first and quantize the model that it returns; "
            "pruned weights stay zero. For training with rounded weights, there is "
            "`masked_layers.convert_to_masked(model, quantize=...)`."
        )

    def save_own_variables(self, store: Any) -> None:
        """Saves the mask, its frozen values, `rescale`, `quantization` and `moved_at`."""
        store["0"] = self.value
        if self.frozen is not None:
            store["frozen"] = self.frozen
        if self.rescale:
            store["rescale"] = np.ones((), "bool")
        if self.quantization is not None:
            store["quantization"] = np.array(LEVELS[self.quantization], "uint8")
        if self.moved_at is not None:
            store["moved_at"] = np.array(self.moved_at, "int64")

    def load_own_variables(self, store: Any) -> None:
        """Loads a saved mask. Files of the plain model contain no mask and do not change it.

        Files of a model without quantization do not turn it off.

        Raises:
            ValueError: If the file contains a learned mask, or a mask of another shape.
        """
        if "scores" in store:
            raise ValueError(
                f"The file contains a learned mask for '{self.path or self.name}', which is a "
                "binary mask. Load the file into a model with learned masks and convert that with "
                "`masked_layers.harden`."
            )
        if "0" not in store:
            return
        value = np.asarray(store["0"])
        if value.shape != tuple(self.value.shape):
            raise ValueError(
                f"The saved mask '{self.path}' has shape {value.shape}, but its weight has shape "
                f"{tuple(self.value.shape)}. Load the file into the model it was saved from."
            )
        self.value.assign(value.astype("bool"))
        changed = self.freeze(np.asarray(store["frozen"]) if "frozen" in store else None)
        if "quantization" in store:
            kind = _kind(int(np.asarray(store["quantization"])))
            changed |= kind != self.quantization
            self.quantization = kind
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
            **({} if self.quantization is None else {"quantization": self.quantization}),
        }

    def compute_output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns `shape`: the effective weight has the shape of the raw one."""
        return shape


def _kind(levels: int) -> str:
    for name, known in LEVELS.items():
        if known == levels:
            return name
    raise ValueError(f"The file is damaged: a mask quantizes to {levels} levels.")


class MaskedRegularizer(keras.regularizers.Regularizer):
    """Regularizer that penalizes the effective weight, without the raw values of pruned entries.

    Quantized weights are penalized as they are before rounding.
    """

    def __init__(self, plain: keras.regularizers.Regularizer, mask: Mask) -> None:
        self.plain = plain
        self.mask = mask

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the penalty of the effective weight."""
        return self.plain(self.mask.unquantized(x))


class MaskedConstraint(keras.constraints.Constraint):
    """Constraint on the effective weight that does not change the raw values of pruned entries."""

    def __init__(self, plain: keras.constraints.Constraint, mask: Mask) -> None:
        self.plain = plain
        self.mask = mask

    def __call__(self, w: Tensor) -> Tensor:
        """Returns the constrained weight."""
        w = ops.convert_to_tensor(w)
        constrained = self.plain(self.mask.select(w, self.mask.pruned(w.dtype)))
        return self.mask.select(constrained, w)

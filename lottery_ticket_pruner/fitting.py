"""Recompiles the functions of a compiled model and resets its optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from lottery_ticket_pruner import _keras
from masked_layers import compiled


def variable_scope(model: keras.Model) -> contextlib.AbstractContextManager:
    """The scope in which variables that the model's own functions read must be created."""
    if keras.backend.backend() == "tensorflow":
        return model.distribute_strategy.scope()
    return contextlib.nullcontext()


def remake_function(model: keras.Model, kind: str) -> None:
    """Replaces a compiled function of the model by a new one, which is traced again.

    Args:
        model: A compiled model.
        kind: `"train"`, `"test"` or `"predict"`.
    """
    step = getattr(model, f"{kind}_step")
    # `jax.jit` finds earlier traces by equality, and the bound method is equal to that of the
    # function to be replaced: without a new identity the old trace would be used again.
    with _keras.replaced(model, f"{kind}_step", lambda *args, **kwargs: step(*args, **kwargs)):
        getattr(model, f"make_{kind}_function")(force=True)


def remake_functions(model: keras.Model, *, around: bool = True) -> None:
    """Replaces all compiled functions that the model has, as `remake_function` does.

    Args:
        model: A model that computes something else than before.
        around: Whether to have all others compiled again, too, that layers of it are part of.
    """
    kinds = [
        kind
        for kind in ("train", "test", "predict")
        if getattr(model, f"{kind}_function", None) is not None
    ]
    traces = compiled.forget_functions(model) if around else []
    for kind in kinds:
        remake_function(model, kind)
    compiled.warn_of_traces(model, model.weights, traces)


def read_clocks(optimizer: keras.Optimizer | None) -> list[tuple[int, float | None]]:
    """Returns (step, learning rate) of an optimizer and of each optimizer inside it.

    The learning rate is None where a schedule gives it.
    """
    if optimizer is None:
        return []
    return [
        (int(step.numpy()), None if rate is None else float(rate.numpy()))
        for step, rate in _clock_variables(optimizer)
    ]


def fresh_optimizer(optimizer: keras.Optimizer) -> keras.Optimizer:
    """An unbuilt optimizer with the configuration of this one."""
    return type(optimizer).from_config(optimizer.get_config())


def reset_optimizer(
    optimizer: keras.Optimizer,
    fresh: keras.Optimizer,
    variables: Sequence[keras.Variable],
    steps: Sequence[int] = (),
    rates: Sequence[float | None] = (),
) -> None:
    """Gives an optimizer, in place, the state of one that was just built.

    Step counts are 0 and slots have their first values, which are not zero for all optimizers
    (Adagrad's accumulators, the dynamic loss scale, the copies of ScheduleFreeAdamW). Functions
    that were compiled with the optimizer stay valid.

    Args:
        optimizer: The optimizer to reset.
        fresh: What `fresh_optimizer(optimizer)` returned; it is built here.
        variables: The trainable variables of the model, with the values to start from.
        steps: Step counts to restore where a learning-rate schedule reads them; elsewhere a step
            count other than 0 would only spoil the bias corrections of the fresh slots.
        rates: Learning rates to restore where they are variables; None keeps the present one.

    Raises:
        ValueError: The optimizer was built for other variables. Nothing has changed then.
    """
    if optimizer.built:
        fresh.build(list(variables))
    old, new = optimizer.variables, fresh.variables
    if [tuple(v.shape) for v in old] != [tuple(v.shape) for v in new]:
        raise ValueError(
            f"The optimizer {optimizer.name!r} was built for {len(old)} variables of its own, but "
            f"the model needs {len(new)} now. Were layers frozen or unfrozen after `compile()`? "
            "Compile the model again, or call `rewind(optimizer=False)`."
        )
    for target, source in zip(old, new, strict=True):
        # Through numpy: on JAX `assign` would share the buffer.
        target.assign(read(source))
    clocks = _clock_variables(optimizer)
    if len(steps) == len(rates) == len(clocks):
        for (step, rate), old_step, old_rate in zip(clocks, steps, rates, strict=True):
            if rate is None:
                step.assign(old_step)
            elif old_rate is not None:
                rate.assign(old_rate)


def advance(optimizer: keras.Optimizer, steps: int) -> None:
    """Moves the step count on where a learning-rate schedule reads it, and only there."""
    for step, rate in _clock_variables(optimizer):
        if rate is None:
            step.assign(step + steps)


def start_over(optimizer: keras.Optimizer) -> None:
    """Sets the step count to 0 where a learning-rate schedule reads it, and only there."""
    for step, rate in _clock_variables(optimizer):
        if rate is None:
            step.assign(0)


def optimizer_slots(optimizer: keras.Optimizer) -> dict[int, list[keras.Variable]]:
    """Returns an optimizer's slots by variable: momenta, averages, accumulated gradients.

    Args:
        optimizer: The optimizer; one that is not built yet keeps nothing.

    Returns:
        A dict from the id of a variable to those variables of the optimizer that have its shape.

    Raises:
        ValueError: The configuration of the optimizer does not make the same one again.
    """
    if not optimizer.built:
        return {}
    # An optimizer does not tell which slot is whose: a second one is watched as it is built.
    twin = fresh_optimizer(optimizer)
    made: dict[int, list[keras.Variable]] = {}
    _keras.watch_slots(twin, lambda variable, slot: made.setdefault(id(variable), []).append(slot))
    twin.build(_keras.optimized_variables(optimizer))
    position = {id(variable): i for i, variable in enumerate(twin.variables)}
    own = optimizer.variables
    if [variable.shape for variable in own] != [variable.shape for variable in twin.variables]:
        raise ValueError(
            f"Which variables of the optimizer {optimizer.name!r} belong to which weight cannot be "
            "told: one made from its configuration has others."
        )
    return {
        key: [own[position[id(slot)]] for slot in slots if id(slot) in position]
        for key, slots in made.items()
    }


def _clock_variables(
    optimizer: keras.Optimizer,
) -> list[tuple[keras.Variable, keras.Variable | None]]:
    """(iteration, learning rate) variables; every optimizer creates them first, in this order."""
    variables = optimizer.variables
    following = [*variables[1:], None]
    return [
        (step, rate if getattr(rate, "name", None) == "learning_rate" else None)
        for step, rate in zip(variables, following, strict=True)
        if step.name == "iteration"
    ]


def read(variable: keras.Variable) -> np.ndarray:
    """A copy of a variable's value that shares no memory with it; bfloat16 becomes float32."""
    return widened(np.array(variable.numpy()))


def widened(array: np.ndarray) -> np.ndarray:
    """The array, in float32 where it is bfloat16: NumPy has no such type, nor do its files."""
    return array.astype("float32") if array.dtype.name == "bfloat16" else array


class ZeroHold:
    """Holds chosen entries of a plain model's variables at zero while the model trains.

    Optimizers apply a variable's constraint after each update, inside their own graph. The hold
    appends to it, so that entries are zero after every step whatever the number of steps per
    execution, on the device alone. It lasts until `release()`.

    Args:
        model: A compiled model, inside `fit`.
        masks: Pairs of a variable and a bool array of its shape, True where entries are free.
    """

    def __init__(
        self, model: keras.Model, masks: Iterable[tuple[keras.Variable, np.ndarray]]
    ) -> None:
        self._model = model
        self._free_function = model.train_function
        self._constraints: list[tuple[keras.Variable, _ZeroConstraint]] = []
        with variable_scope(model):
            for variable, mask in masks:
                left_over = variable.constraint
                if isinstance(left_over, _ZeroConstraint):  # of a `fit` that did not end
                    left_over.hold.release()
                    self._free_function = model.train_function
                constraint = _ZeroConstraint(self, mask, variable.constraint)
                _keras.match_layout(constraint.mask, variable)
                variable.constraint = constraint
                self._constraints.append((variable, constraint))
        self._remake()

    def change(self, masks: Iterable[tuple[keras.Variable, np.ndarray]]) -> None:
        """Holds other entries from the next step on."""
        of = {id(variable): constraint for variable, constraint in self._constraints}
        for variable, mask in masks:
            of[id(variable)].mask.assign(mask)
        # Compiled functions may have the masks as constants (JAX).
        self._remake()

    def release(self) -> None:
        """Gives the variables and the model back as they were before the hold."""
        for variable, constraint in self._constraints:
            if variable.constraint is constraint:
                variable.constraint = constraint.inner
        if self._model.train_function is self._held_function:
            self._model.train_function = self._free_function

    def _remake(self) -> None:
        remake_function(self._model, "train")
        self._held_function = self._model.train_function


class _ZeroConstraint(keras.constraints.Constraint):
    """The constraint that a variable had, on its free entries; zero on the others."""

    def __init__(self, hold: ZeroHold, mask: np.ndarray, inner: Any) -> None:
        self.hold = hold
        self.inner = inner
        self.mask = keras.Variable(mask, dtype="bool", trainable=False, name="free")

    def __call__(self, weight: Any) -> Any:
        weight = zero_pruned(self.mask.value, weight)
        if self.inner is None:
            return weight
        return zero_pruned(self.mask.value, self.inner(weight))


def zero_pruned(mask: Any, weight: Any) -> Any:
    """`where(mask, weight, 0)` as a tensor: pruned entries are +0.0 even where they were NaN."""
    weight = ops.convert_to_tensor(weight)
    return ops.where(ops.convert_to_tensor(mask), weight, ops.cast(0, weight.dtype))

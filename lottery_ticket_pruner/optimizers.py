"""Optimizers of compiled models: their step counts, their slots, and how to reset them."""

from __future__ import annotations

from collections.abc import Sequence

import keras

from lottery_ticket_pruner import _keras
from lottery_ticket_pruner.variables import read


def read_clocks(optimizer: keras.Optimizer | None) -> list[tuple[int, float | None]]:
    """Returns (step, learning rate) of an optimizer and of each optimizer inside it.

    The learning rate is None if it is given by a schedule.
    """
    if optimizer is None:
        return []
    return [
        (int(step.numpy()), None if rate is None else float(rate.numpy()))
        for step, rate in _clock_variables(optimizer)
    ]


def learning_rate(optimizer: keras.Optimizer | None) -> float | None:
    """Returns the learning rate of the next step, also if a schedule gives it, or None."""
    if optimizer is None:
        return None
    return float(keras.ops.convert_to_numpy(optimizer.learning_rate))


def unbuilt_copy(optimizer: keras.Optimizer) -> keras.Optimizer:
    """Returns an unbuilt optimizer with the same configuration."""
    return type(optimizer).from_config(optimizer.get_config())


def is_built_for(optimizer: keras.Optimizer, variables: Sequence[keras.Variable]) -> bool:
    """Returns whether an optimizer is not built, or built for just these variables."""
    if not optimizer.built:
        return True
    return [*map(id, _keras.optimized_variables(optimizer))] == [*map(id, variables)]


def reset_optimizer(
    optimizer: keras.Optimizer,
    fresh: keras.Optimizer,
    variables: Sequence[keras.Variable],
    steps: Sequence[int] = (),
    rates: Sequence[float | None] = (),
) -> None:
    """Resets an optimizer in place to the state right after it was built.

    Step counts are 0 and slots have their initial values, which are not zero for all optimizers
    (accumulators of Adagrad, the dynamic loss scale, copies in ScheduleFreeAdamW). Functions
    compiled with the optimizer stay valid.

    Args:
        optimizer: The optimizer to reset.
        fresh: The result of `unbuilt_copy(optimizer)`, which is built here.
        variables: Trainable variables of the model, with the values to start from.
        steps: Step counts to restore if a learning-rate schedule reads them. Otherwise a step count
            other than 0 would only make the bias corrections of the new slots wrong.
        rates: Learning rates to restore if they are variables. None keeps the current rate.

    Raises:
        ValueError: If the optimizer was built for other variables. In that case nothing is changed.
    """
    if optimizer.built:
        fresh.build(list(variables))
    old, new = optimizer.variables, fresh.variables
    if [tuple(v.shape) for v in old] != [tuple(v.shape) for v in new]:
        raise ValueError(
            f"The optimizer {optimizer.name!r} was built with {len(old)} variables of its own, but "
            f"the model now needs {len(new)}. Were layers frozen or unfrozen after `compile()`? "
            "Compile the model again, or call `rewind(optimizer=False)`."
        )
    for target, source in zip(old, new, strict=True):
        # Through NumPy, because `assign` shares the buffer on JAX.
        target.assign(read(source))
    clocks = _clock_variables(optimizer)
    if len(steps) == len(rates) == len(clocks):
        for (step, rate), old_step, old_rate in zip(clocks, steps, rates, strict=True):
            if rate is None:
                step.assign(old_step)
            elif old_rate is not None:
                rate.assign(old_rate)


def advance_schedule(optimizer: keras.Optimizer, steps: int) -> None:
    """Advances the step count if a learning-rate schedule reads it, and only then."""
    for step, rate in _clock_variables(optimizer):
        if rate is None:
            step.assign(step + steps)


def rewind_schedule(optimizer: keras.Optimizer) -> None:
    """Sets the step count to 0 if a learning-rate schedule reads it, and only then."""
    for step, rate in _clock_variables(optimizer):
        if rate is None:
            step.assign(0)


def optimizer_slots(optimizer: keras.Optimizer) -> dict[int, list[keras.Variable]]:
    """Returns the slots of an optimizer by variable: momenta, averages, accumulated gradients.

    Args:
        optimizer: The optimizer. If it is not built, it has no slots.

    Returns:
        A dict from the id of a variable to those variables of the optimizer that have its shape.

    Raises:
        ValueError: If the optimizer cannot be recreated from its configuration.
    """
    if not optimizer.built:
        return {}
    # Optimizers do not say which slot belongs to which variable, so a second one is watched.
    twin = unbuilt_copy(optimizer)
    made: dict[int, list[keras.Variable]] = {}
    _keras.watch_slots(twin, lambda variable, slot: made.setdefault(id(variable), []).append(slot))
    twin.build(_keras.optimized_variables(optimizer))
    position = {id(variable): i for i, variable in enumerate(twin.variables)}
    own = optimizer.variables
    if [variable.shape for variable in own] != [variable.shape for variable in twin.variables]:
        raise ValueError(
            f"The variables of the optimizer {optimizer.name!r} cannot be assigned to weights, "
            "because an optimizer created from its configuration has other variables."
        )
    return {
        key: [own[position[id(slot)]] for slot in slots if id(slot) in position]
        for key, slots in made.items()
    }


def _clock_variables(
    optimizer: keras.Optimizer,
) -> list[tuple[keras.Variable, keras.Variable | None]]:
    """Returns (iteration, learning rate) variables, which every optimizer creates first."""
    variables = optimizer.variables
    following = [*variables[1:], None]
    return [
        (step, rate if getattr(rate, "name", None) == "learning_rate" else None)
        for step, rate in zip(variables, following, strict=True)
        if step.name == "iteration"
    ]

"""Optimizers of compiled models: their clocks, their slots, and a fresh start."""

from __future__ import annotations

from collections.abc import Sequence

import keras

from lottery_ticket_pruner import _keras
from lottery_ticket_pruner.variables import read


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

"""Iterative pruning with rewinding: a lottery ticket and the controls it has to beat."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner import training
from lottery_ticket_pruner.pruner import LotteryTicketPruner

CONTROLS = ("random_reinit", "random_mask")

Share = float | Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class TicketResult:
    """A ticket and how it was found.

    Attributes:
        ticket: the masked model, holding the masks of the last round and the weights trained
            under them. `ticket.set_weights(initial_weights)` makes it the untrained ticket:
            weights do not include masks.
        initial_weights: what every round was rewound to, as `get_weights` gives it.
        masks: the masks after each round, by weight path; `masks[0]` are all ones.
        rows: one dict per round and arm, in the order they were trained: `round`, `arm`
            (`"dense"` in round 0, then `"ticket"` and the controls), `replicate`, `sparsity` (the
            share of pruned weights), `test_<metric>` for each compiled metric and the loss (at
            the end of training), `validation_loss` (its minimum), `early_stop_step` (the step of
            that minimum, found afterwards), `seconds`. Ready for `pandas.DataFrame(rows)`.
    """

    ticket: keras.Model
    initial_weights: list[np.ndarray]
    masks: list[dict[str, np.ndarray]]
    rows: list[dict[str, Any]]


def find_ticket(
    model: keras.Model,
    x: training.Arrays,
    y: training.Arrays,
    *,
    rounds: int,
    steps: int,
    batch_size: int = 60,
    rate: Share | None = None,
    sparsity: Share | None = None,
    strategy: Any = "large_final",
    scope: str | None = None,
    rewind_to: int = 0,
    controls: Sequence[str] = CONTROLS,
    validation_data: tuple[training.Arrays, training.Arrays] | None = None,
    test_data: tuple[training.Arrays, training.Arrays] | None = None,
    eval_every: int | None = None,
    seed: int = 0,
    replicate: int = 0,
    on_result: Callable[[dict[str, Any]], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> TicketResult:
    """Train, prune and rewind for a number of rounds, next to controls at the same sparsity.

    The dense model trains for `steps` steps; its weights after `rewind_to` of them are the
    rewinding point. Every round then updates the masks from the weights trained last, brings all
    weights and the optimiser back to the rewinding point, and trains the remaining `steps -
    rewind_to` steps under the masks (Frankle & Carbin, arXiv 1803.03635; rewinding later than
    step 0: Frankle et al., arXiv 1912.05671).

    Controls train as long under as many weights per layer: `"random_reinit"` keeps the ticket's
    masks and draws the weights afresh from each layer's own initialiser (the rest starts from
    step 0); `"random_mask"` keeps the weights of the rewinding point and shuffles each mask.

    The order of the examples and what dropout draws are functions of `seed`, arm and round alone,
    so an arm's result does not depend on which other arms run (on torch give dropout layers a
    seed: without one Keras draws from torch's global generator). All of them share one model,
    whose values are reassigned: nothing is compiled twice.

    Args:
        model: compiled. A plain one is left untouched: a masked copy is trained. One that is
            masked already is trained itself, from dense masks on, so that several calls can
            share its compiled functions.
        x: training inputs in memory: an array, or a list or dict of them.
        y: training targets, likewise.
        rounds: rounds of pruning after the dense run, at least 1.
        steps: optimiser steps of a full run.
        batch_size: examples per step.
        rate: share of alive weights that each round drops, or a mapping of patterns to shares,
            see `LotteryTicketPruner.update_masks`. Default 0.2, unless `sparsity` is given.
        sparsity: instead of `rate`: the share of pruned weights after the last round, reached in
            rounds of equal rates; also as a mapping.
        strategy: the pruning criterion.
        scope: who competes, the criterion's own default if None.
        rewind_to: the step to rewind to, 0 <= rewind_to < steps.
        controls: which of `CONTROLS` to train.
        validation_data: `(x, y)` for the early-stop step, None: not measured.
        test_data: `(x, y)` for the metrics, None: not measured.
        eval_every: steps between evaluations on the validation data; None: at the end only.
        seed: of everything random here; not of the initial weights, which are the model's.
        replicate: goes into the rows as it is.
        on_result: called with each row as soon as it is known.
        on_progress: called with the number of new steps done.

    Raises:
        ValueError: a number out of its range, both of `rate` and `sparsity`, an unknown control,
            a model that is not compiled, a weight to draw again that has no initialiser, and
            whatever `update_masks` refuses. No step was trained then.
    """
    _check(rounds, steps, rewind_to, rate, sparsity, controls, seed)
    if not getattr(model, "compiled", False):
        raise ValueError(f"{model.name} is not compiled: call compile() before find_ticket().")
    if all(ref.mask is None for ref in ml.weight_refs(model)):
        model = ml.convert_to_masked(model)
    pruner = LotteryTicketPruner(model)
    pruner.reset_masks()
    # A rehearsal: what cannot be pruned or drawn is refused now, not after the dense run.
    pruner.set_pretrained_weights()
    pruner.update_masks(strategy, scope=scope, **_amount(rate, sparsity, 1 / rounds))
    pruner.reset_masks()
    if "random_reinit" in controls:
        _draw_again(model, (seed,))
    pruner.rewind()
    weights_at_0 = model.get_weights()
    rows: list[dict[str, Any]] = []

    def train(arm: str, number: int, todo: int, stage: str = "train") -> training.History:
        _restart_randomness(model, (seed, arm, number, stage))
        return training.train(
            model,
            x,
            y,
            steps=todo,
            batch_size=batch_size,
            seed=_seed(seed, arm, number, stage),
            eval_every=eval_every,
            validation_data=validation_data,
            on_progress=on_progress,
        )

    def measure(arm: str, number: int) -> None:
        history = train(arm, number, steps - rewind_to)
        row = {"round": number, "arm": arm, "replicate": replicate}
        row["sparsity"] = ml.sparsity_report(model).sparsity
        if test_data is not None:
            results = training.evaluate(model, *test_data)
            row |= {f"test_{name}": value for name, value in results.items()}
        if history.early_stop is not None:
            row["validation_loss"] = history.validation[history.early_stop]["loss"]
            row["early_stop_step"] = rewind_to + history.steps[history.early_stop]
        row["seconds"] = history.seconds
        rows.append(row)
        if on_result is not None:
            on_result(row)

    train("dense", 0, rewind_to, stage="to the rewinding point")
    if rewind_to:
        pruner.set_initial_weights()
    initial_weights = model.get_weights()
    measure("dense", 0)
    masks = [ml.get_masks(model)]
    for number in range(1, rounds + 1):
        pruner.set_pretrained_weights()
        pruner.update_masks(
            strategy,
            scope=scope,
            seed=_integer(seed, "masks", number),
            **_amount(rate, sparsity, number / rounds),
        )
        masks.append(ml.get_masks(model))
        for arm in controls:
            pruner.rewind()
            if arm == "random_reinit":
                model.set_weights(weights_at_0)
                _draw_again(model, (seed, arm, number))
            else:
                ml.set_masks(model, _shuffled(masks[-1], (seed, arm, number)))
            measure(arm, number)
            ml.set_masks(model, masks[-1])
        # The ticket comes last, so that the model holds it, optimiser state included.
        pruner.rewind()
        measure("ticket", number)
    return TicketResult(model, initial_weights, masks, rows)


def _check(
    rounds: int,
    steps: int,
    rewind_to: int,
    rate: Share | None,
    sparsity: Share | None,
    controls: Sequence[str],
    seed: int,
) -> None:
    if rounds < 1 or not 0 <= rewind_to < steps:
        raise ValueError(
            "Expected rounds >= 1 and 0 <= rewind_to < steps. Received: "
            f"rounds={rounds}, steps={steps}, rewind_to={rewind_to}."
        )
    if rate is not None and sparsity is not None:
        raise ValueError(
            f"Give rate or sparsity, not both. Received: rate={rate}, sparsity={sparsity}."
        )
    if isinstance(controls, str) or not set(controls) <= set(CONTROLS):
        raise ValueError(f"`controls` must be a list of some of {CONTROLS}. Received: {controls!r}")
    if seed < 0:
        raise ValueError(f"`seed` must not be negative. Received: {seed}.")


def _amount(rate: Share | None, sparsity: Share | None, progress: float) -> dict[str, Share]:
    """What to ask of `update_masks` when this share of the rounds is reached."""
    if sparsity is None:
        return {"rate": 0.2 if rate is None else rate}
    if isinstance(sparsity, Mapping):
        return {"sparsity": {key: _eased(share, progress) for key, share in sparsity.items()}}
    return {"sparsity": _eased(sparsity, progress)}


def _eased(final: float, progress: float) -> float:
    return 1 - (1 - final) ** progress


def _seed(*parts: int | str) -> list[int]:
    """Entropy for NumPy's generators: distinct parts give independent streams."""
    return [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in parts]


def _integer(*parts: int | str) -> int:
    return int(np.random.SeedSequence(_seed(*parts)).generate_state(1)[0] >> 1)


def _shuffled(
    masks: Mapping[str, np.ndarray], parts: tuple[int | str, ...]
) -> dict[str, np.ndarray]:
    """Masks with the same counts per weight, every arrangement equally likely."""
    return {
        path: np.random.default_rng(_seed(*parts, path))
        .permutation(mask.reshape(-1))
        .reshape(mask.shape)
        for path, mask in masks.items()
    }


def _draw_again(model: keras.Model, parts: tuple[int | str, ...]) -> None:
    """Give every trainable kernel a new value from its layer's own initialiser."""
    for ref in ml.weight_refs(model):
        if ref.variable.trainable:
            initializer = _reseeded(_initializer(ref), _integer(*parts, ref.path))
            drawn = initializer(ref.variable.shape, dtype=ref.variable.dtype)
            ref.variable.assign(drawn)


def _restart_randomness(model: keras.Model, parts: tuple[int | str, ...]) -> None:
    """Set what dropout and its like draw from, which goes on from arm to arm otherwise."""
    states = [v for v in model.variables if v.name == "seed_generator_state"]
    for number, state in enumerate(states):
        state.assign([_integer(*parts, "layers", number) % 2**31, 0])  # the seed, draws so far


def _initializer(ref: ml.WeightRef) -> keras.initializers.Initializer:
    # `recurrent_kernel` is drawn by `recurrent_initializer`, `kernel` by `kernel_initializer`.
    for name in (ref.name, ref.name.removesuffix("_kernel")):
        initializer = getattr(ref.layer, f"{name}_initializer", None)
        if initializer is not None:
            return keras.initializers.get(initializer)
    raise ValueError(
        f"{ref.path} cannot be drawn again: {type(ref.layer).__name__} has no "
        f"`{ref.name}_initializer`. Leave 'random_reinit' out of the controls, or give the layer "
        "that attribute."
    )


def _reseeded(
    initializer: keras.initializers.Initializer, seed: int
) -> keras.initializers.Initializer:
    config = initializer.get_config()
    if "seed" not in config:
        return initializer
    return type(initializer).from_config({**config, "seed": seed})

"""Trainings that diverge: weights or losses that are no longer numbers, and where it happened."""

import contextlib
from collections.abc import Iterator

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner.variables import read
from masked_layers.text_tables import shortened

_SHOWN = 3


class DivergenceError(ArithmeticError):
    """An error for a training in which weights or the validation loss became NaN or infinite."""


def check_weights(model: keras.Model, where: str) -> None:
    """Checks that all weights that the model uses are finite.

    Raw values of pruned weights may be infinite or NaN, because nothing depends on them.

    Args:
        model: A model, plain or masked, after a training.
        where: Which training it was and how far it went, for the message.

    Raises:
        DivergenceError: If weights, or statistics of layers, are NaN or infinite.
    """
    ml.sync(model)
    if wrong := _not_finite(model):
        raise _error(where, f"weights are NaN or infinite: {shortened(wrong, _SHOWN)}")


def check_loss(model: keras.Model, loss: float, where: str) -> None:
    """Checks a validation loss, and the weights if it is NaN.

    Args:
        model: The model.
        loss: The loss.
        where: Which training it was and how far it went, for the message.

    Raises:
        DivergenceError: If it is NaN.
    """
    if np.isnan(loss):
        check_weights(model, where)
        raise _error(where, "the validation loss is NaN, although all weights are finite")


class SeedFailures:
    """The seeds of an experiment whose trainings diverged, while the others go on."""

    def __init__(self) -> None:
        self._failures: dict[int, DivergenceError] = {}

    @contextlib.contextmanager
    def seed(self, seed: int) -> Iterator[None]:
        """Runs a block for a seed, and notes if its training diverges."""
        try:
            yield
        except DivergenceError as error:
            self._failures[seed] = error

    def check(self) -> None:
        """Raises an error if any seed failed.

        Raises:
            DivergenceError: If so. Its message names the seeds and where each diverged.
        """
        if self._failures:
            each = " ".join(f"Seed {seed}: {error}" for seed, error in self._failures.items())
            raise DivergenceError(
                f"{each} The results of all other seeds are complete; the run is not finished. "
                "Repeat it with other options, or with --seeds without "
                f"{', '.join(map(str, self._failures))}."
            )


def _error(where: str, what: str) -> DivergenceError:
    return DivergenceError(
        f"The training diverged {where}: {what}. Use a smaller learning rate, clip gradients "
        "(`clipnorm`), or look for unsuitable values and labels in the data."
    )


def _not_finite(model: keras.Model) -> list[str]:
    """Returns the paths of weights that are used and contain NaN or infinity."""
    refs = [ref for ref in ml.weight_refs(model) if isinstance(ref, ml.MaskedRef)]
    kept = {id(ref.variable): ref for ref in refs if not ref.mask.learned}
    wrong = []
    for variable in model.weights:
        array = read(variable)
        if array.dtype.kind != "f" or (finite := np.isfinite(array)).all():
            continue
        ref = kept.get(id(variable))
        if ref is None or not (finite | ~ref.mask.to_numpy()).all():
            wrong.append(variable.path if ref is None else ref.path)
    return wrong

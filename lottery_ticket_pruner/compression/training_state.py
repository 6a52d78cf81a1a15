"""Tells whether a model is trained."""

import keras
import numpy as np

from lottery_ticket_pruner import arms, training
from lottery_ticket_pruner.compression.parts import sample_of
from lottery_ticket_pruner.compression.states import State
from lottery_ticket_pruner.training import Arrays

# Examples, and newly drawn models, whose losses are compared with that of the model.
_EXAMPLES, _DRAWS = 1_000, 8
_DEVIATIONS = 2.0


def is_trained(model: keras.Model, pair: tuple[Arrays, Arrays]) -> bool:
    """Returns whether a masked model is trained, judged by its weights and its loss.

    It is not if every trainable weight whose initializer has only one result, such as a bias, has
    this value. Otherwise it is if its loss is below those of the same model with new kernels.
    Part of a model may be trained, as under a new head for other classes: its loss is then not.

    Args:
        model: A compiled masked model. It is left as it was.
        pair: Inputs and targets.
    """
    if has_initial_weights(model):
        return False
    x, y = sample_of(pair, _EXAMPLES)
    loss = training.evaluate(model, x, y)["loss"]
    before, losses = State.of(model), []
    try:
        for number in range(_DRAWS):
            arms.draw_again(model, (0, "untrained", number))
            losses.append(training.evaluate(model, x, y)["loss"])
    except ValueError:  # A layer has no initializer, so its kernel is not from one.
        return True
    finally:
        before.restore(model)
    return bool(loss < np.mean(losses) - _DEVIATIONS * np.std(losses, ddof=1))


def has_initial_weights(model: keras.Model) -> bool:
    """Returns whether all trainable weights that are always initialized alike have these values.

    False if there are no such weights, or the model cannot be created again.
    """
    try:
        first, second = (keras.models.clone_model(model).get_weights() for _ in range(2))
    except Exception:  # A subclassed model may raise anything.
        return False
    alike = [
        np.array_equal(weight, one)
        for weight, one, other, variable in zip(
            model.get_weights(), first, second, model.weights, strict=True
        )
        if variable.trainable and np.array_equal(one, other)
    ]
    return bool(alike) and all(alike)

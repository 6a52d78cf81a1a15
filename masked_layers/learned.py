"""Masks that are learned: a score per weight is trained, the weight itself stays as it is."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from masked_layers import _keras, compiled
from masked_layers.masks import Mask


class LearnedMask(Mask):
    """A mask that follows from a trainable score per weight; the weights under it are frozen.

    A mask is a step function of the scores, without a gradient of its own. The gradient goes
    straight through it to a *surrogate*: with a mask `m` of the scores, effective weight `w m` and
    surrogate `h(s)`, dL/ds is (dL/d(w m)) w h'(s), for kept and pruned weights alike. The forward
    pass itself holds exact zeros and the exact bits of the kept weights.

    The scores are weights of the model, as they are what it trains: `get_weights` of a model with
    learned masks holds them beside those of the plain model, until `harden` turns the masks into
    binary ones. All weights of a layer with a learned mask, its bias too, are not trainable.

    Subclasses define `surrogate` and `decide`, and `draw` where training samples its masks.

    Args:
        initializer: Initializer of the scores.
        rescale: Whether to multiply the kept weights by `size / ones(mask)` (dynamic weight
            rescaling, arXiv 1905.01067, section 5.2). The mask in it is the one in use, sampled or
            not, and the factor carries gradient to the scores like the mask does.
        seed: Of the initial scores and of samples. `convert_to_masked` derives another one from it
            for each weight. Default: drawn from Keras' global seed.
        **kwargs: `name` and the other arguments of `keras.layers.Layer`.

    Attributes:
        scores: `keras.Variable` of the weight's shape, float32, trainable.
    """

    learned = True

    def __init__(
        self, *, initializer: Any, rescale: bool = False, seed: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(initializer=initializer, rescale=rescale, **kwargs)
        self.seed = seed
        self.scores: keras.Variable | None = None
        self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, shape: tuple[int, ...]) -> None:
        """Creates `scores`.

        Args:
            shape: Shape of the weight.
        """
        initializer = self.initializer
        config = initializer.get_config()
        if self.seed is not None and "seed" in config:
            initializer = type(initializer).from_config({**config, "seed": self.seed})
        self.scores = self.add_weight(
            name="scores", shape=shape, dtype="float32", initializer=initializer, autocast=False
        )

    @property
    def weights(self) -> list[keras.Variable]:
        """The scores: an optimizer finds what to train among the weights."""
        return [] if self.scores is None else [self.scores]

    def surrogate(self, scores: Any) -> Any:
        """Returns the function of the scores that the gradient sees in place of the mask."""
        raise NotImplementedError

    def decide(self, scores: Any) -> Any:
        """Returns the mask without chance: a bool tensor, a function of the scores alone."""
        raise NotImplementedError

    def draw(self, scores: Any) -> Any:
        """Returns the mask that a training step uses: a bool tensor; by default `decide`'s."""
        return self.decide(scores)

    def draws_now(self) -> bool:
        """Returns True where `draw` gives the mask in use: in training mode."""
        return _keras.is_training()

    def sample(self, rng: np.random.Generator) -> np.ndarray:
        """Returns a mask that training could have used, drawn from a NumPy generator."""
        return self.to_numpy()

    def apply(self, weight: Any) -> Any:
        """Returns the effective weight as a tensor.

        Args:
            weight: Raw weight, variable or tensor, of the mask's shape and any float dtype.
        """
        weight = ops.convert_to_tensor(weight)
        scores = ops.convert_to_tensor(self.scores)
        keep = self.draw(scores) if self.draws_now() else self.decide(scores)
        surrogate = self.surrogate(scores)
        slope = surrogate - ops.stop_gradient(surrogate)  # 0, with the gradient of the surrogate
        effective = ops.where(keep, weight, ops.cast(0, weight.dtype))
        effective = effective + weight * ops.cast(slope, weight.dtype)
        if self.rescale:
            ones = ops.cast(ops.count_nonzero(keep), "float32")
            factor = math.prod(self.scores.shape) / (ops.maximum(ones, 1.0) + ops.sum(slope))
            effective = effective * ops.cast(factor, weight.dtype)
        return effective

    call = apply

    def _keep(self) -> Any:
        return self.decide(ops.convert_to_tensor(self.scores))

    def freeze(self, values: Any) -> bool:
        """Refuses: pruned weights are frozen under binary masks.

        Raises:
            ValueError: Always; it names `harden`.
        """
        raise ValueError(
            f"'{self.path or self.name}' is learned, and only a binary mask freezes pruned "
            "weights. Call `masked_layers.harden(model)` first."
        )

    def save_own_variables(self, store: Any) -> None:
        """Saves the scores and whether the mask rescales."""
        store["scores"] = self.scores
        if self.rescale:
            store["rescale"] = np.ones((), "bool")

    def load_own_variables(self, store: Any) -> None:
        """Loads saved scores; a file of the plain model holds none and leaves them alone.

        Raises:
            ValueError: If the file holds a binary mask, or scores of another shape.
        """
        if "0" in store:
            raise ValueError(
                f"The file holds a binary mask for '{self.path or self.name}', which is learned. "
                "Load it into a model with binary masks: `masked_layers.harden(model)`."
            )
        if "scores" not in store:
            return
        scores = np.asarray(store["scores"])
        if scores.shape != tuple(self.scores.shape):
            raise ValueError(
                f"The saved scores of '{self.path}' have shape {scores.shape}, but the weight they "
                f"are for has shape {tuple(self.scores.shape)}. Load them into the model they were "
                "saved from."
            )
        self.scores.assign(scores)
        if self.rescale != ("rescale" in store):
            self.rescale = "rescale" in store
            compiled.forget_while_loading(self)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {**super().get_config(), "seed": self.seed}


@keras.saving.register_keras_serializable(package="masked_layers")
class BernoulliMask(LearnedMask):
    """A mask whose entries are kept with probability sigmoid(score), independently.

    In training every reading of the weight draws a new mask; the gradient goes straight through to
    sigmoid(score). A layer that is called twice in a step sees two masks, and weights that are read
    once per time step (those of recurrent cells) cannot have one. Like dropout, it draws only where
    the model passes `training=True` on to its layers.

    Args:
        initializer: Initializer of the scores. Default: zeros, that is, probability 1/2.
        rescale: See `LearnedMask`.
        evaluation: What `evaluate` and `predict` use: `"deterministic"`, the more probable value of
            each entry (kept at probability 1/2), or `"sampled"`, a new mask for every batch. The
            paper's accuracy, the mean over ten sampled masks, is what
            `lottery_ticket_pruner.learned.evaluate_sampled` gives.
        seed: See `LearnedMask`.
        **kwargs: `name` and the other arguments of `keras.layers.Layer`.

    Reference:
        - [Zhou et al., arXiv 1905.01067](https://arxiv.org/abs/1905.01067), section 5.1
    """

    def __init__(
        self,
        *,
        initializer: Any = "zeros",
        rescale: bool = False,
        evaluation: str = "deterministic",
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        if evaluation not in ("deterministic", "sampled"):
            raise ValueError(
                '`evaluation` must be "deterministic" or "sampled". '
                f"Received: evaluation={evaluation!r}"
            )
        super().__init__(initializer=initializer, rescale=rescale, seed=seed, **kwargs)
        self.evaluation = evaluation

    def surrogate(self, scores: Any) -> Any:
        """Returns sigmoid(scores), the probabilities."""
        return ops.sigmoid(scores)

    def decide(self, scores: Any) -> Any:
        """Keeps entries of probability 1/2 or more."""
        return ops.greater_equal(scores, 0.0)

    def draw(self, scores: Any) -> Any:
        """Keeps each entry with its probability."""
        uniform = keras.random.uniform(ops.shape(scores), dtype="float32", seed=self.seed_generator)
        return ops.less(uniform, ops.sigmoid(scores))

    def draws_now(self) -> bool:
        """Returns True in training mode, and in evaluation where it samples, too."""
        return self.evaluation == "sampled" or super().draws_now()

    def sample(self, rng: np.random.Generator) -> np.ndarray:
        """Returns a mask drawn from a NumPy generator."""
        probabilities = ops.convert_to_numpy(ops.sigmoid(self.scores))
        return rng.random(probabilities.shape) < probabilities

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {**super().get_config(), "evaluation": self.evaluation}


@keras.saving.register_keras_serializable(package="masked_layers")
class EdgePopupMask(LearnedMask):
    """A mask that keeps the weights with the largest abs(score), a fixed share of each kernel.

    The gradient goes straight through to abs(score), so that it carries the sign of the score. Of
    equal scores the first ones are kept.

    Args:
        sparsity: Share of weights to prune, in [0, 1): `floor(sparsity * size + 1e-6)` of them.
        initializer: Initializer of the scores. Default: Kaiming-uniform.
        rescale: See `LearnedMask`. The paper has it done once, to the weights: see
            `lottery_ticket_pruner.learned.learn_supermask`.
        seed: See `LearnedMask`.
        **kwargs: `name` and the other arguments of `keras.layers.Layer`.

    Reference:
        - [Ramanujan et al., arXiv 1911.13299](https://arxiv.org/abs/1911.13299), section 3
    """

    def __init__(
        self,
        *,
        sparsity: float = 0.5,
        initializer: Any = "he_uniform",
        rescale: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not 0 <= sparsity < 1:
            raise ValueError(f"`sparsity` must be in [0, 1). Received: sparsity={sparsity!r}")
        super().__init__(initializer=initializer, rescale=rescale, seed=seed, **kwargs)
        self.sparsity = sparsity

    def surrogate(self, scores: Any) -> Any:
        """Returns abs(scores)."""
        return ops.abs(scores)

    def decide(self, scores: Any) -> Any:
        """Keeps the largest abs(scores)."""
        size = math.prod(scores.shape)
        kept = size - math.floor(self.sparsity * size + 1e-6)
        return _largest(ops.abs(ops.stop_gradient(scores)), kept)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {**super().get_config(), "sparsity": self.sparsity}


def _largest(values: Any, kept: int) -> Any:
    """Marks the `kept` largest of non-negative values; of equal ones the first.

    By bisection of the threshold, which costs some comparisons: sorting the scores of a kernel of
    300 x 784 takes several times as long on a CPU. Values that are closer to each other than 2^-40
    of the largest count as equal; the number of marks is exact.
    """

    def count(marks: Any) -> Any:
        return ops.sum(ops.cast(marks, "int32"))

    def halve(_: Any, interval: tuple[Any, Any]) -> tuple[Any, Any]:
        low, high = interval
        middle = (low + high) / 2
        enough = count(values > middle) >= kept
        return ops.where(enough, middle, low), ops.where(enough, high, middle)

    # At least as many as wanted are above `low`, and not more than wanted above `high`.
    low, high = ops.fori_loop(0, 40, halve, (-ops.ones((), values.dtype), ops.max(values)))
    above = values > high
    equal = ops.logical_and(values > low, ops.logical_not(above))
    rank = ops.cumsum(ops.reshape(ops.cast(equal, "int32"), (-1,)))
    first = ops.reshape(rank <= kept - count(above), values.shape)
    return ops.logical_or(above, ops.logical_and(equal, first))


_NAMES = {"binary": Mask, "bernoulli": BernoulliMask, "edge_popup": EdgePopupMask}


def get(identifier: str | Mapping | Mask | Callable[[], Mask]) -> Mask:
    """Turns whatever names a kind of mask into a prototype of it, a mask that is not built.

    Args:
        identifier: `"binary"`, `"bernoulli"` or `"edge_popup"`; a dict from Keras'
            `serialize_keras_object`; a mask that is not built; or a function without arguments,
            such as a subclass of `Mask`, that returns one.

    Raises:
        ValueError: An unknown name, or something that is none of these.
    """
    mask: Any = identifier
    if isinstance(identifier, str) and identifier in _NAMES:
        mask = _NAMES[identifier](name="mask")
    elif isinstance(identifier, Mapping):
        mask = keras.saving.deserialize_keras_object(dict(identifier))
    elif callable(identifier) and not isinstance(identifier, Mask):
        mask = identifier()
    if not isinstance(mask, Mask) or _keras.own_variables(mask):
        raise ValueError(
            f"`mask` must be one of {list(_NAMES)}, the config of a mask, a `Mask` that is not "
            f"built, or a function that makes one. Received: {identifier!r}"
        )
    return mask


def for_weight(prototype: Mask, name: str, path: str) -> Mask:
    """Makes the mask of the weight at a path; its seed is derived from the prototype's."""
    config = {**prototype.get_config(), "name": name, "dtype": "float32"}
    if config.get("seed") is not None:
        parts = [config["seed"], zlib.crc32(path.encode())]
        config["seed"] = int(np.random.SeedSequence(parts).generate_state(1)[0] >> 1)
    return type(prototype).from_config(config)

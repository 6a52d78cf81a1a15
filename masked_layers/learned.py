"""Learned masks: a score per weight is trained while the weights do not change."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from masked_layers import _keras, compiled, randomness
from masked_layers.masks import Mask
from masked_layers.types import Tensor


class LearnedMask(Mask):
    """Mask computed from a trainable score per weight, over weights that are not trained.

    The mask is a step function of the scores and has no useful gradient. The gradient therefore
    passes straight through the mask to a *surrogate*: with a mask `m` of the scores `s`, effective
    weight `w m` and surrogate `h(s)`, dL/ds is (dL/d(w m)) w h'(s), for kept and pruned weights
    alike. The forward pass itself gives exact zeros and the exact bits of the kept weights.

    The scores are weights of the model, because training changes them: `get_weights` returns them
    together with the weights of the plain model, until `harden` converts the masks to binary ones.
    In a layer with a learned mask, no weight is trainable, including the bias.

    Subclasses define `surrogate` and `decide`, and also `draw` if training samples the masks.

    Args:
        initializer: Initializer of the scores.
        rescale: Whether to multiply the kept weights by `size / ones(mask)` (dynamic weight
            rescaling, arXiv 1905.01067, section 5.2). This uses the mask of the current call,
            sampled or not, and the gradient of the scores includes the factor.
        seed: Seed of the initial scores and of samples. `convert_to_masked` derives a different
            seed from it for each weight. Default: drawn from Keras' global seed.
        **kwargs: `name` and the other arguments of `keras.layers.Layer`.

    Attributes:
        scores: `keras.Variable` of the weight's shape, float32, trainable.
    """

    learned = True
    scores: keras.Variable

    def __init__(
        self, *, initializer: Any, rescale: bool = False, seed: int | None = None, **kwargs: Any
    ) -> None:
        # With a seed, `build` replaces the one that an initializer given by name draws.
        with contextlib.nullcontext() if seed is None else _keras.drawn_apart():
            super().__init__(initializer=initializer, rescale=rescale, **kwargs)
        self.seed = seed
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
        """The scores, which optimizers look for among the weights."""
        return [self.scores] if hasattr(self, "scores") else []

    def surrogate(self, scores: Tensor) -> Tensor:
        """Returns the function of the scores whose gradient replaces that of the mask."""
        raise NotImplementedError

    def decide(self, scores: Tensor) -> Tensor:
        """Returns the deterministic mask, a bool tensor that depends only on the scores."""
        raise NotImplementedError

    def draw(self, scores: Tensor) -> Tensor:
        """Returns the mask of a training step as a bool tensor. Default: that of `decide`."""
        return self.decide(scores)

    def draws_now(self) -> bool:
        """Returns whether the current call uses `draw` and not `decide`: in training mode."""
        return _keras.is_training()

    def sample(self, rng: np.random.Generator) -> np.ndarray:
        """Returns a mask as training uses it, sampled with a NumPy generator, as a bool array."""
        return self.to_numpy()

    def unquantized(self, weight: Tensor) -> Tensor:
        """Returns the effective weight as a tensor.

        Args:
            weight: Raw weight, a variable or tensor of the mask's shape and any float dtype.
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

    def keep(self) -> Tensor:
        """Returns the deterministic mask as a bool tensor."""
        return self.decide(ops.convert_to_tensor(self.scores))

    def freeze(self, values: Any) -> bool:
        """Raises an error, because only binary masks can freeze pruned weights.

        Raises:
            ValueError: Always. The message names `harden`.
        """
        raise ValueError(
            f"'{self.path or self.name}' is learned, and only a binary mask can freeze pruned "
            "weights. Call `masked_layers.harden(model)` first."
        )

    def save_own_variables(self, store: Any) -> None:
        """Saves the scores and `rescale`."""
        store["scores"] = self.scores
        if self.rescale:
            store["rescale"] = np.ones((), "bool")

    def load_own_variables(self, store: Any) -> None:
        """Loads saved scores. Files of the plain model contain no scores and do not change them.

        Raises:
            ValueError: If the file contains a binary mask, or scores of another shape.
        """
        if "0" in store:
            raise ValueError(
                f"The file contains a binary mask for '{self.path or self.name}', which is a "
                "learned mask. Load it into a model with binary masks, such as the one that "
                "`masked_layers.harden(model)` returns."
            )
        if "scores" not in store:
            return
        scores = np.asarray(store["scores"])
        if scores.shape != tuple(self.scores.shape):
            raise ValueError(
                f"The saved scores of '{self.path}' have shape {scores.shape}, but their weight "
                f"has shape {tuple(self.scores.shape)}. Load the file into the model it was saved "
                "from."
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
    """Learned mask that keeps each entry independently with probability sigmoid(score).

    In training, a new mask is sampled each time the weight is read, and the gradient passes
    straight through to sigmoid(score). A layer that is called twice in a step uses two masks.
    Weights that are read once per time step (those of recurrent cells) cannot have this mask. As
    with dropout, masks are sampled only if the model passes `training=True` to its layers.

    Args:
        initializer: Initializer of the scores. Default: zeros, which means probability 1/2.
        rescale: Whether to multiply the kept weights by `size / ones(mask)`, as described in
            `LearnedMask`.
        evaluation: Masks in `evaluate` and `predict`: `"deterministic"`, the more probable value of
            each entry (kept at probability 1/2), or `"sampled"`, a new mask for every batch. The
            paper reports the mean accuracy over ten sampled masks, which
            `lottery_ticket_pruner.learned.evaluate_sampled` computes.
        seed: Seed of the initial scores and of samples. Default: drawn from Keras' global seed.
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

    def surrogate(self, scores: Tensor) -> Tensor:
        """Returns sigmoid(scores), the probabilities."""
        return ops.sigmoid(scores)

    def decide(self, scores: Tensor) -> Tensor:
        """Keeps entries of probability 1/2 or more."""
        return ops.greater_equal(scores, 0.0)

    def draw(self, scores: Tensor) -> Tensor:
        """Keeps each entry with its probability."""
        uniform = keras.random.uniform(ops.shape(scores), dtype="float32", seed=self.seed_generator)
        return ops.less(uniform, ops.sigmoid(scores))

    def draws_now(self) -> bool:
        """Returns whether the current call samples: in training mode, or always if requested."""
        return self.evaluation == "sampled" or super().draws_now()

    def sample(self, rng: np.random.Generator) -> np.ndarray:
        """Returns a mask sampled with a NumPy generator, as a bool array."""
        probabilities = ops.convert_to_numpy(ops.sigmoid(self.scores))
        return rng.random(probabilities.shape) < probabilities

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {**super().get_config(), "evaluation": self.evaluation}


@keras.saving.register_keras_serializable(package="masked_layers")
class EdgePopupMask(LearnedMask):
    """Learned mask that keeps a fixed share of each kernel, the weights of largest abs(score).

    The gradient passes straight through to abs(score), so it includes the sign of the score. Of
    equal scores the first ones are kept.

    Args:
        sparsity: Share of weights to prune, in [0, 1): `floor(sparsity * size + 1e-6)` of them.
        initializer: Initializer of the scores. Default: Kaiming-uniform.
        rescale: Whether to multiply the kept weights by `size / ones(mask)`, as described in
            `LearnedMask`. The paper scales the weights once instead, as
            `lottery_ticket_pruner.learned.learn_supermask` can.
        seed: Seed of the initial scores. Default: drawn from Keras' global seed.
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

    def surrogate(self, scores: Tensor) -> Tensor:
        """Returns abs(scores)."""
        return ops.abs(scores)

    def decide(self, scores: Tensor) -> Tensor:
        """Keeps the largest abs(scores)."""
        size = math.prod(scores.shape)
        kept = size - math.floor(self.sparsity * size + 1e-6)
        return _largest(ops.abs(ops.stop_gradient(scores)), kept)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {**super().get_config(), "sparsity": self.sparsity}


def _largest(values: Tensor, kept: int) -> Tensor:
    """Marks the `kept` largest of non-negative values, and of equal values the first ones.

    The threshold is found by bisection. Sorting the scores of a kernel of 300 x 784 takes several
    times as long on a CPU. Values whose difference is less than 2^-40 of the largest value count as
    equal. The number of marks is exact.
    """

    def count(marks: Tensor) -> Tensor:
        return ops.sum(ops.cast(marks, "int32"))

    def halve(_: Tensor, interval: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        low, high = interval
        middle = (low + high) / 2
        enough = count(values > middle) >= kept
        return ops.where(enough, middle, low), ops.where(enough, high, middle)

    # At least `kept` values are above `low`, and at most `kept` values are above `high`.
    low, high = ops.fori_loop(0, 40, halve, (-ops.ones((), values.dtype), ops.max(values)))
    above = values > high
    equal = ops.logical_and(values > low, ops.logical_not(above))
    rank = ops.cumsum(ops.reshape(ops.cast(equal, "int32"), (-1,)))
    first = ops.reshape(rank <= kept - count(above), values.shape)
    return ops.logical_or(above, ops.logical_and(equal, first))


_NAMES: dict[str, type[Mask]] = {
    "binary": Mask,
    "bernoulli": BernoulliMask,
    "edge_popup": EdgePopupMask,
}


Identifier = str | Mapping[str, Any] | Mask | Callable[[], Mask]


def get(identifier: Identifier) -> Mask:
    """Returns the prototype of a kind of mask: a mask that is not built.

    Args:
        identifier: `"binary"`, `"bernoulli"` or `"edge_popup"`; a dict from Keras'
            `serialize_keras_object`; a mask that is not built; or a function without arguments,
            such as a subclass of `Mask`, that returns one.

    Raises:
        ValueError: If `identifier` is an unknown name or another kind of object.
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
            f"built, or a function that returns one. Received: {identifier!r}"
        )
    return mask


def for_weight(prototype: Mask, name: str, path: str, *, kernel: bool) -> Mask:
    """Creates the mask of the weight at a path, with a seed derived from the prototype's.

    Only kernels are quantized; some biases have two axes, too.
    """
    config = {**prototype.get_config(), "name": name, "dtype": "float32"}
    if not kernel:
        config.pop("quantization", None)
    if config.get("seed") is not None:
        config["seed"] = randomness.integer("scores of masks", config["seed"], path)
    return type(prototype).from_config(config)

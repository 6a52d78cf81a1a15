"""How many weights of the models of the table other libraries prune.

TensorFlow Model Optimization works with Keras 2 only: in its process, `tf_keras` takes the place of
Keras before the models are made. PQuantML prunes models of Keras 3.
"""

import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from benchmarks.conformance.reasons import plain

if TYPE_CHECKING:
    from benchmarks.conformance.makers import Maker

Cell = tuple[str, str]
PACKAGES = {
    "tfmot": ("tensorflow-model-optimization", "tf_keras", "tensorflow"),
    "pquant": ("pquant-ml", "keras", "tensorflow"),
}


def versions(peer: str) -> str:
    """Returns the versions that a peer's rows depend on, in one line."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES[peer])


def prepared(peer: str) -> "Callable[[Maker], Iterator[tuple[str, Cell]]]":
    """Imports a peer, before anything else imports Keras; returns the function of a row."""
    count = {"tfmot": tfmot, "pquant": pquant}[peer]()

    def cells(maker: "Maker") -> Iterator[tuple[str, Cell]]:
        yield "masked", answered(count, maker)

    return cells


def answered(count: "Callable[[Maker], Cell]", maker: "Maker") -> Cell:
    try:
        return count(maker)
    except Exception as error:  # Whatever the peer raises.
        text = " ".join(plain(str(error)).split())
        return "refused", f"{type(error).__name__}: {text[:200]}"


def tfmot() -> "Callable[[Maker], Cell]":
    """Returns a function that wraps a model, or else each layer that tfmot knows."""
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    import tf_keras

    sys.modules["keras"] = tf_keras
    from tensorflow_model_optimization.sparsity.keras import prune_low_magnitude

    from benchmarks.conformance.makers import kernels

    def wrapped(layer: Any) -> Any:
        try:
            return prune_low_magnitude(layer)
        except ValueError:
            return layer

    def count(maker: "Maker") -> Cell:
        if not maker.legacy:
            return "no model", "needs Keras 3"
        model = maker.make()
        size, note = len(kernels(model)), ""
        try:
            pruned = prune_low_magnitude(model)
        except Exception as error:  # Layers that it does not know, or faults of its own.
            text = " ".join(plain(str(error)).split())
            note = f"layer by layer, for the model as a whole is refused: {text[:160]}"
            pruned = tf_keras.models.clone_model(model, clone_function=wrapped)
        masked = {
            id(variables[0])
            for layer in pruned.submodules
            for variables in getattr(layer, "pruning_vars", ())
        }
        return f"{len(masked)} of {size}", note

    return count


def pquant() -> "Callable[[Maker], Cell]":
    """Returns a function that replaces the layers that PQuantML knows."""
    import keras
    import pquant as library

    from benchmarks.conformance.makers import kernels
    from masked_layers._keras import flatten

    config = library.pdp_config()
    config.quantization_parameters.enable_quantization = False

    def count(maker: "Maker") -> Cell:
        model = maker.make()
        size = len(kernels(model))
        shape = tuple(model.inputs[0].shape)
        # It takes the first layer for an input, which a Sequential model does not list.
        model = keras.Model(model.inputs, model.outputs)
        pruned = library.add_compression_layers(model, config, shape)
        found = [layer for layer in flatten(pruned) if hasattr(layer, "pruning_layer")]
        return f"{sum(bool(layer.enable_pruning) for layer in found)} of {size}", ""

    return count

"""Keras models that compute their outputs with a TorchScript program with sparse kernels."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import keras
import numpy as np

from masked_layers import _keras
from masked_layers.devices import computes_on_cpu
from masked_layers.inference import inferred
from masked_layers.notices import warn_outside
from masked_layers.torchscript.job import Job
from masked_layers.torchscript.preparation import prepare
from masked_layers.torchscript.report import TorchReport


def accelerate(
    model: keras.Model,
    *,
    batch_size: int = 32,
    threads: int | None = None,
    timings: TorchReport | str | os.PathLike[str] | None = None,
    shrink: bool = False,
    sample_inputs: Any = None,
) -> AcceleratedModel:
    """Returns a Keras model for inference that runs pruned weights with sparse kernels.

    It requires the torch backend, on the CPU. It has the inputs and outputs of the model, and
    `predict`, `evaluate` and calls run the program that `export_sparse_torch` would write:
    for each product with a pruned weight the fastest measured kernel, and as a whole not slower
    than the program with dense kernels. The program holds a copy of the weights, so that later
    changes of the given model have no effect on it. The given model is not changed.

    If the model is compiled, its loss and metrics are used for `evaluate`, unless the model has
    methods of its own for that, or passes masks on. Penalties of regularizers are left out.

    Args:
        model: A built model, either masked, or plain with zeros in its kernels.
        batch_size: Number of rows for which kernels are chosen. Other numbers work, too. The
            default is that of `predict`.
        threads: Number of threads for which kernels are chosen. Default: PyTorch's setting, which
            is also the number that runs them.
        timings: The report of an earlier call for the same model, or of `export_sparse_torch`, or
            the path of its JSON file. Kernels are then chosen by its times, without measuring.
        shrink: Whether to remove channels without effect first, as `masked_layers.shrink` does.
        sample_inputs: As in `export_sparse_torch`.

    Returns:
        The model. Its `report` lists kernels and times by layer.

    Raises:
        RuntimeError: If the backend is not torch, or it uses an accelerator; or if the outputs of
            the program differ from those of the model.
        NotImplementedError, TypeError, ValueError: As in `export_sparse_torch`.

    Warns:
        UserWarning: If only the lengths of the sample inputs are accepted along axes for which the
            model has no fixed length; if the loss and metrics cannot be copied; or if `predict`
            and `evaluate` of the model do what the program does not.
    """
    backend = keras.backend.backend()
    if backend != "torch":
        raise RuntimeError(
            "`accelerate` runs PyTorch's kernels and needs Keras on the torch backend: set the "
            f"environment variable KERAS_BACKEND=torch. This process uses {backend!r}, from which "
            "`masked_layers.export_sparse_torch` writes the same program to a file."
        )
    if not computes_on_cpu():
        raise RuntimeError(
            "`accelerate` has kernels for the CPU only. Set the environment variable "
            "KERAS_TORCH_DEVICE=cpu before Keras is imported."
        )
    plain, job = prepare(
        model,
        batch_size=batch_size,
        threads=threads,
        timings=timings,
        shrink=shrink,
        sample_inputs=sample_inputs,
    )
    accelerated = _model(plain, job)
    for note in accelerated.report.notes:
        warn_outside(note, "masked_layers")
    return accelerated


class AcceleratedModel(keras.Model):
    """A model for inference that `accelerate` returns.

    Attributes:
        report: Kernels and times by layer.
    """

    report: TorchReport

    def fit(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises an error, because the program has no trainable weights."""
        raise NotImplementedError(_NO_TRAINING)

    def train_on_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises an error, as `fit` does."""
        raise NotImplementedError(_NO_TRAINING)

    def save(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises an error, because the program is not a part of a Keras file."""
        raise NotImplementedError(_NO_COPY)

    def export(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises an error, as `save` does."""
        raise NotImplementedError(_NO_COPY)

    def save_weights(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises an error, because Keras would write a file without weights."""
        raise NotImplementedError(_NO_COPY)

    def load_weights(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises an error, because the weights are in the program."""
        raise NotImplementedError(_NO_LOADING)

    def get_config(self) -> NoReturn:
        """Raises an error, as `save` does."""
        raise NotImplementedError(_NO_COPY)


_NO_LOADING = (
    "An accelerated model cannot load weights: it has a copy of them in a program. Load them into "
    "the model that `masked_layers.accelerate` was given, and accelerate it again."
)
_NO_TRAINING = (
    "An accelerated model is for inference: its weights are a copy in a program. Train the model "
    "that `masked_layers.accelerate` was given, and accelerate it again."
)
_NO_COPY = (
    "An accelerated model cannot be copied or saved by Keras. Save the model that "
    "`masked_layers.accelerate` was given, or write the program to a file with "
    "`masked_layers.export_sparse_torch`."
)


@dataclass(frozen=True, eq=False)
class _Held:
    """A program and its outputs, held without Keras' tracking, which takes modules for layers.

    Attributes:
        program: A TorchScript program.
        outputs: Symbolic outputs of the model that it computes.
    """

    program: Any
    outputs: Any


class _Program(keras.layers.Layer):
    """A layer that calls a TorchScript program.

    Args:
        held: The program.
        name: Name of the layer.
    """

    def __init__(self, held: _Held, name: str) -> None:
        super().__init__(name=name, autocast=False, trainable=False)
        self._held = held
        self.built = True

    def call(self, *args: Any, training: bool | None = None) -> Any:
        """Calls the program."""
        import torch

        if training:
            raise NotImplementedError(_NO_TRAINING)
        with torch.no_grad():
            found = keras.tree.flatten(self._held.program(*args))
        return keras.tree.pack_sequence_as(self._held.outputs, found)

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the symbolic outputs of the model."""
        return keras.tree.map_structure(
            lambda x: keras.KerasTensor(x.shape, x.dtype), self._held.outputs
        )

    def get_config(self) -> NoReturn:
        """Raises an error, as that of the model does."""
        raise NotImplementedError(_NO_COPY)


def _model(plain: keras.Model, job: Job) -> AcceleratedModel:
    """Returns the model that runs the program of a plain model."""
    import torch

    from masked_layers.torchscript import program

    content, report = program.build(plain, job)
    with program.quiet():
        loaded = torch.jit.load(io.BytesIO(content))
    rows = None if job.free_batch else len(keras.tree.flatten(job.arguments)[0])

    def symbolic(spec: Any, sample: np.ndarray) -> Any:
        # Notes are about lengths: for others the program computes something else without an error.
        lengths = sample.shape[1:] if report.notes else spec.shape[1:]
        return keras.Input(batch_shape=(rows, *lengths), dtype=spec.dtype, name=spec.name)

    specs = list(_keras.export_specs(plain))
    inputs = keras.tree.map_structure(symbolic, specs, list(job.arguments))
    names = list(getattr(plain, "output_names", None) or ())
    given = {x.name: x for x in keras.tree.flatten(inputs)}
    name = "program"
    while name in {*given, *names}:
        name = f"{name}_"
    layer = _Program(_Held(loaded, plain.compute_output_spec(*inputs)), name)
    accelerated = AcceleratedModel(
        inputs=inputs[0] if len(inputs) == 1 else inputs,
        outputs=_named(layer(*inputs), names, given),
        name=plain.name,
    )
    accelerated.report = report
    if _says_what_differs(plain, job):
        _compile_like(plain, accelerated)
    return accelerated


def _named(outputs: Any, names: list[str], inputs: Mapping[str, Any]) -> Any:
    """Returns outputs from layers with the names of several outputs, by which losses find them."""
    leaves = keras.tree.flatten(outputs)
    if len(leaves) < 2 or len({*names}) != len(leaves):
        return outputs
    named = [
        # Names of layers differ, so an output with the name of an input is this input.
        inputs[name] if name in inputs else keras.layers.Identity(name=name, dtype=leaf.dtype)(leaf)
        for name, leaf in zip(names, leaves, strict=True)
    ]
    return keras.tree.pack_sequence_as(outputs, named)


_STEPS = (
    *("compute_loss", "compute_metrics", "predict_step", "test_step"),
    *("make_predict_function", "make_test_function"),
)


def _says_what_differs(plain: keras.Model, job: Job) -> bool:
    """Warns about what `predict` and `evaluate` of a model do and those of its program do not.

    Returns:
        Whether `evaluate` may compute the same metrics.
    """
    with keras.StatelessScope(collect_losses=True) as scope:
        outputs = keras.tree.flatten(inferred(plain, *job.arguments))
    masked = any(map(_keras.carries_mask, outputs))
    penalties = len(scope.losses) + sum(bool(x.regularizer) for x in plain.trainable_weights)
    own = [name for name in _STEPS if _is_own(getattr(type(plain), name))]
    parts = []
    if own:
        parts.append(f"The methods {own} of {type(plain).__name__} are not called.")
    if masked:
        parts.append(
            "Masks of its outputs, such as those of an `Embedding` with `mask_zero=True`, are not "
            "passed on: losses, metrics and layers count all steps."
        )
    if own or masked:
        parts.append(
            "Its loss and metrics are therefore not copied; call `compile` before `evaluate`."
        )
    if penalties:
        parts.append(
            f"Losses that are added to that of `compile` ({penalties}, of regularizers or "
            "`add_loss`) are left out of the loss of `evaluate`."
        )
    if parts:
        warn_outside(
            f"The accelerated model does not do all that '{plain.name}' does. {' '.join(parts)}",
            "masked_layers",
        )
    return not (own or masked)


def _is_own(method: Any) -> bool:
    return method.__module__.partition(".")[0] != "keras"


def _compile_like(plain: keras.Model, accelerated: AcceleratedModel) -> None:
    if not getattr(plain, "compiled", False):
        return
    try:
        config = dict(plain.get_compile_config() or {})
        config.pop("optimizer", None)
        config["jit_compile"] = False  # The program is compiled already.
        accelerated.compile_from_config(config)
    except Exception as error:  # Losses and metrics of users raise any error.
        warn_outside(
            f"The loss and metrics of '{plain.name}' cannot be copied from its compile config: "
            f"{error}\nCall `compile` on the accelerated model before `evaluate`.",
            "masked_layers",
        )

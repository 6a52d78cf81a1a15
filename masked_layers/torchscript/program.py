"""Makes the TorchScript program of a Keras model on the torch backend."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import torch

from masked_layers import _keras
from masked_layers.inference import inferred
from masked_layers.model_state import state_variables
from masked_layers.serving import relative_difference
from masked_layers.torchscript import timing
from masked_layers.torchscript.calls import Calls, Constant, Site
from masked_layers.torchscript.costs import SPARSE_FROM
from masked_layers.torchscript.job import Job
from masked_layers.torchscript.report import KernelRow, TorchReport
from masked_layers.torchscript.storage import StoredDense, packed_nbytes

_OVERHEAD = 1024
"""Bytes that a module with a weight takes in a file in addition to the weight."""

_PROGRAMS = {"sparse": False, "sparse, rows first": True}
"""The layouts of the outputs of sparse kernels: what follows may run faster in one of them."""


class Program(torch.nn.Module):
    """A call of a Keras model with kernels and weights that TorchScript saves.

    Args:
        model: The model; not a part of this module.
        calls: Its constants and sites.
        kernels: Sparse kernels of sites. All others stay dense.
    """

    def __init__(
        self, model: keras.Model, calls: Calls, kernels: Mapping[Site, torch.nn.Module]
    ) -> None:
        super().__init__()
        # In a list, because a model in an attribute would become a part of this module.
        self._model = [model]
        self._calls = calls
        self._kernels: dict[Site, str] = {}
        self._used: set[Site] = set()
        self._weights: dict[int, tuple[str, bool]] = {}
        for site, kernel in kernels.items():
            name = self._kernels[site] = self._name(site.constant)
            self.add_module(name, kernel)
        for constant in _dense(calls, kernels):
            name = self._name(constant)
            stored = compact(constant)
            self._weights[id(constant)] = name, stored
            if stored:
                self.add_module(name, torch.jit.script(StoredDense(constant.tensor)))
            else:
                self.register_buffer(name, constant.tensor.detach())

    def _name(self, constant: Constant) -> str:
        base = re.sub(r"\W", "_", "_".join(constant.paths))
        name, count = base, 1
        while hasattr(self, name):
            name, count = f"{base}_{count}", count + 1
        return name

    def forward(self, *args: Any) -> Any:
        """Calls the model."""
        calls = self._calls
        calls.compute = self._compute
        calls.replace = self._replace
        with calls, keras.StatelessScope() as scope:
            outputs = inferred(self._model[0], *args)
        check_stateless(scope)
        if unused := [site for site in self._kernels if site not in self._used]:
            names = [name for site in unused for name in site.constant.paths]
            raise NotImplementedError(
                f"PyTorch traces other operations with {names} than the model computes."
            )
        return outputs

    def _compute(self, site: Site, x: torch.Tensor, dense: Callable[[], Any]) -> Any:
        if site not in self._kernels:
            return dense()
        self._used.add(site)
        return getattr(self, self._kernels[site])(x)

    def _replace(self, constant: Constant) -> torch.Tensor:
        if id(constant) not in self._weights:
            # Only traced calls read it, as with a size that is a tensor in them: it is inlined.
            return constant.tensor
        name, stored = self._weights[id(constant)]
        return getattr(self, name)() if stored else getattr(self, name)


def check_stateless(scope: keras.StatelessScope) -> None:
    """Checks that a call has changed no variable.

    Raises:
        NotImplementedError: If it has.
    """
    if scope.state_mapping:
        raise NotImplementedError(
            f"A call of the model changes {len(scope.state_mapping)} of its variables, as stateful "
            "layers do. A TorchScript file cannot do this; `export_sparse_saved_model` can."
        )


def compact(constant: Constant) -> bool:
    """Returns whether a dense weight is stored without its zeros."""
    tensor = constant.tensor
    if constant.sparsity < 0.1 or tensor.nbytes < _OVERHEAD:
        return False
    return packed_nbytes(tensor) + _OVERHEAD < tensor.nbytes


def _dense(calls: Calls, kernels: Mapping[Site, Any]) -> list[Constant]:
    """Returns the constants that the program reads densely."""
    needed = {id(constant): constant for constant in calls.constants.values() if constant.elsewhere}
    for site in calls.sites.values():
        if site not in kernels:
            needed[id(site.constant)] = site.constant
    return list(needed.values())


def build(model: keras.Model, job: Job) -> tuple[bytes, TorchReport]:
    """Returns the TorchScript file of a model, and a report.

    Args:
        model: A plain model on the torch backend and on the CPU.
        job: How the file is made.

    Raises:
        NotImplementedError: If the model cannot be written as TorchScript.
        RuntimeError: If the outputs of the file differ.
        ValueError: If the job has the times of another model.
    """
    with recorded(model, job) as (calls, run, batch, threads):
        names = _site_names(calls)
        seconds = _site_seconds(calls, run, names, job.timings)
        chosen = {site: timing.fastest(seconds[site]) for site in seconds}
        programs = _programs(model, calls, chosen, batch)
        whole = _program_seconds(programs, batch, job.timings)
        best = timing.fastest(whole, gain=1.0) if whole else timing.DENSE
        if best == timing.DENSE:
            chosen = dict.fromkeys(chosen, timing.DENSE)
        file, error, notes = _verified(programs[best], model, job, batch)
    report = TorchReport(
        rows=_rows(calls, names, chosen, seconds),
        programs=whole,
        program=best,
        batch_size=job.batch_size,
        threads=threads,
        dense_nbytes=sum(tensor.nbytes for tensor in _tensors(model).values()),
        file_nbytes=len(file.getvalue()),
        output_error=error,
        notes=notes,
    )
    return file.getvalue(), report


@contextlib.contextmanager
def recorded(
    model: keras.Model, job: Job, sparse_from: float = SPARSE_FROM
) -> Iterator[tuple[Calls, Callable[[], None], tuple[Any, ...], int]]:
    """Calls a model once, and yields its calls, with the settings in which it is measured.

    Args:
        model: A plain model on the torch backend and on the CPU.
        job: The inputs and the number of threads.
        sparse_from: Share of zeros in a weight from which its operations are sites.

    Yields:
        The calls, a function that calls the model on a batch again, the batch, and the number of
        threads.
    """
    tensors = _tensors(model)
    batch = _torch(job.arguments, job.batch_size if job.free_batch else None)
    settings = (torch.no_grad(), _without_gradients(tensors.values()), quiet())
    with contextlib.ExitStack() as stack:
        threads = stack.enter_context(_threads(job.threads))
        for setting in settings:
            stack.enter_context(setting)
        calls = Calls(tensors, sparse_from)

        def run() -> None:
            with calls, keras.StatelessScope() as scope:
                inferred(model, *batch)
            check_stateless(scope)

        run()
        yield calls, run, batch, threads


def _tensors(model: keras.Model) -> dict[str, torch.Tensor]:
    return {path: variable.value for path, (variable, _) in state_variables(model).items()}


def dense_program(
    model: keras.Model, calls: Calls, batch: tuple[Any, ...]
) -> torch.jit.ScriptModule:
    """Returns the program of a model with dense kernels."""
    return _traced(Program(model, calls, {}), batch)


# --- Kernels --------------------------------------------------------------------------------------


def _site_names(calls: Calls) -> dict[Site, str]:
    """Returns a name for each site, the same for every export of a model."""
    names: dict[Site, str] = {}
    for site in calls.sites.values():
        base = f"{'+'.join(site.constant.paths)}:{site.operation.name}"
        name, count = base, 1
        while name in names.values():
            count += 1
            name = f"{base}#{count}"
        names[site] = name
    return names


def _site_seconds(
    calls: Calls,
    run: Callable[[], None],
    names: Mapping[Site, str],
    timings: TorchReport | None,
) -> dict[Site, dict[str, float]]:
    if not names:
        return {}
    if timings is None:
        return timing.site_seconds(calls, run)
    known = {row.site: dict(row.seconds) for row in timings if row.seconds}
    if missing := sorted(set(names.values()) - known.keys()):
        raise ValueError(
            f"`timings` has no times of {missing}, so it belongs to another model. It has those of "
            f"{sorted(known)}."
        )
    return {site: known[name] for site, name in names.items()}


def _programs(
    model: keras.Model, calls: Calls, chosen: Mapping[Site, str], batch: tuple[Any, ...]
) -> dict[str, torch.jit.ScriptModule]:
    """Returns the dense program and those with the chosen kernels in all layouts."""
    programs = {timing.DENSE: dense_program(model, calls, batch)}
    sparse = {site: name for site, name in chosen.items() if name != timing.DENSE}
    if sparse:
        for name, rows_first in _PROGRAMS.items():
            kernels = {site: timing.kernel(site, sparse[site], rows_first) for site in sparse}
            programs[name] = _traced(Program(model, calls, kernels), batch)
    return programs


def _traced(program: Program, batch: tuple[Any, ...]) -> torch.jit.ScriptModule:
    try:
        # Outputs may be dicts and lists, which `strict` refuses.
        return torch.jit.trace(program.eval(), batch, strict=False, check_trace=False)
    except NotImplementedError:
        raise
    except RuntimeError as error:
        raise NotImplementedError(
            f"PyTorch cannot record a call of the model as TorchScript: {str(error)[:1000]}"
        ) from error


def _program_seconds(
    programs: Mapping[str, torch.jit.ScriptModule],
    batch: tuple[Any, ...],
    timings: TorchReport | None,
) -> dict[str, float]:
    if len(programs) == 1:
        return {}
    if timings is None:
        return timing.program_seconds(
            {name: functools.partial(call, *batch) for name, call in programs.items()}
        )
    if set(timings.programs) != set(programs):
        raise ValueError(
            f"`timings` has times of the programs {sorted(timings.programs)}; expected those of "
            f"{sorted(programs)}. Export without `timings` to measure them."
        )
    return dict(timings.programs)


def _rows(
    calls: Calls,
    names: Mapping[Site, str],
    chosen: Mapping[Site, str],
    seconds: Mapping[Site, Mapping[str, float]],
) -> tuple[KernelRow, ...]:
    rows = []
    for constant in calls.constants.values():
        sites = [site for site in names if site.constant is constant]
        dense = constant.elsewhere or any(chosen[site] == timing.DENSE for site in sites)
        stored = compact(constant)
        nbytes = packed_nbytes(constant.tensor) if stored else constant.tensor.nbytes
        fields = ("+".join(constant.paths), tuple(constant.tensor.shape), constant.alive)
        for site in sites:
            if chosen[site] != timing.DENSE:
                matrix = site.operation.matrix(constant.tensor)
                rows.append(
                    KernelRow(
                        *fields, names[site], chosen[site], seconds[site], packed_nbytes(matrix)
                    )
                )
            else:
                rows.append(
                    KernelRow(*fields, names[site], timing.DENSE, seconds[site], nbytes * dense)
                )
                dense = False  # Its bytes are counted once.
        if dense:
            rows.append(KernelRow(*fields, "", timing.DENSE, {}, nbytes))
    return tuple(rows)


# --- The file -------------------------------------------------------------------------------------


def _verified(
    program: torch.jit.ScriptModule, model: keras.Model, job: Job, batch: tuple[Any, ...]
) -> tuple[io.BytesIO, float, tuple[str, ...]]:
    """Returns a file with a program, and what `_verify` returns for it."""
    file = io.BytesIO()
    torch.jit.save(program, file)
    error, notes = _verify(file, model, job)
    if notes:
        file = io.BytesIO()
        torch.jit.save(_traced(_OfLengths(program), batch), file)
        error, notes = _verify(file, model, job)
    return file, error, notes


class _OfLengths(torch.nn.Module):
    """A program that refuses inputs of other lengths than those with which it is traced.

    Args:
        program: The program.
    """

    def __init__(self, program: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.program = program

    def forward(self, *args: Any) -> Any:
        """Calls the program."""
        check = torch.jit.script(_of_lengths)
        return self.program(
            *keras.tree.map_structure(lambda x: check(x, list(map(int, x.shape[1:]))), args)
        )


def _of_lengths(x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Returns a tensor, after a check that is a part of the program."""
    if list(x.shape[1:]) != lengths:
        raise ValueError(
            f"The program accepts inputs of the shape {lengths} (without the batch) only. "
            f"Received: {list(x.shape[1:])}"
        )
    return x


def _verify(file: io.BytesIO, model: keras.Model, job: Job) -> tuple[float, tuple[str, ...]]:
    """Compares a file with its model.

    Returns:
        The largest difference of an output from `expected`, and notes about inputs that the file
        does not accept.

    Raises:
        RuntimeError: If outputs differ by more than rounding.
    """
    arguments, expected = job.arguments, job.expected
    infer = functools.partial(inferred, model)
    file.seek(0)
    loaded = torch.jit.load(file)
    size = len(keras.tree.flatten(arguments)[0])
    for rows in sorted({1, size, size + 1}) if job.free_batch else (None,):
        inputs = _torch(arguments, rows)
        got, wanted = _outputs(loaded, inputs), _outputs(infer, inputs)
        _check(got, wanted, _tolerance(wanted), f"the model's for {rows or size} rows")
    got = _outputs(loaded, _torch(arguments, None))
    # Other backends add up in another order.
    _check(got, expected, _tolerance(expected) ** 0.5, "the outputs on the original backend")
    error = max(map(relative_difference, got, expected), default=0.0)
    notes = []
    if job.free_axes and not _is_free(loaded, model, arguments):
        shapes = [tuple(x.shape[1:]) for x in keras.tree.flatten(arguments)]
        notes.append(
            f"The file accepts only inputs of the shapes {shapes} (without the batch), those of "
            "the sample inputs: the model's operations depend on lengths that it leaves free. "
            "Pass `sample_inputs` with the lengths that will be served."
        )
    return error, tuple(notes)


def _check(
    got: Sequence[np.ndarray], wanted: Sequence[np.ndarray], tolerance: float, what: str
) -> None:
    same = len(got) == len(wanted)
    error = max(map(relative_difference, got, wanted), default=0.0) if same else float("inf")
    if error > tolerance:
        raise RuntimeError(
            f"Outputs of the file differ from {what} by {error:.2g} of the largest one, which "
            "rounding does not explain. Nothing was written. A model with random outputs, or whose "
            "code depends on the values of its inputs, cannot be exported."
        )


def _tolerance(outputs: Sequence[np.ndarray]) -> float:
    kinds = {x.dtype.name for x in outputs}
    return 1e-5 if kinds <= {"float32", "float64"} or not kinds else 1e-2


def _is_free(loaded: Any, model: keras.Model, arguments: Sequence[Any]) -> bool:
    """Returns whether a file computes what its model does for inputs with longer free axes."""
    specs = _keras.export_specs(model)

    def longer(spec: Any, array: np.ndarray) -> np.ndarray:
        widths = [(0, int(axis > 0 and length is None)) for axis, length in enumerate(spec.shape)]
        return np.pad(array, widths, "edge")

    try:
        padded = keras.tree.map_structure(longer, list(specs), list(arguments))
        inputs = _torch(padded, None)
        wanted = _outputs(functools.partial(inferred, model), inputs)
    except Exception:  # The model itself does not accept them.
        return True
    try:
        got = _outputs(loaded, inputs)
        _check(got, wanted, _tolerance(wanted), "the model's")
    except (RuntimeError, torch.jit.Error):
        return False
    return True


def _outputs(call: Any, inputs: tuple[Any, ...]) -> list[np.ndarray]:
    with torch.no_grad(), keras.StatelessScope():
        outputs = keras.tree.flatten(call(*inputs))
    return [
        output.float().numpy() if output.dtype == torch.bfloat16 else output.numpy()
        for output in outputs
    ]


def _torch(arguments: Sequence[Any], rows: int | None) -> tuple[Any, ...]:
    """Returns arguments as tensors, with their rows repeated up to a number."""

    def tensor(array: np.ndarray) -> torch.Tensor:
        if rows is not None:
            array = array[np.arange(rows) % len(array)]
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.astype("float32")).bfloat16()
        return torch.from_numpy(np.ascontiguousarray(array))

    return tuple(keras.tree.map_structure(tensor, list(arguments)))


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[int]:
    """Sets PyTorch's number of threads for a block, and yields it."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _without_gradients(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Lets tracing record weights, which it refuses if they require gradients."""
    changed = [tensor for tensor in tensors if tensor.requires_grad]
    for tensor in changed:
        tensor.requires_grad_(False)
    try:
        yield
    finally:
        for tensor in changed:
            tensor.requires_grad_(True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides warnings that tracing and sparse tensors cause in every export."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        # PyTorch does not develop TorchScript further, but loads it.
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)", category=UserWarning)
        yield

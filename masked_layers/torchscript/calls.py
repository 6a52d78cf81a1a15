"""Finds the weights that PyTorch's functions receive while a model is called, and replaces them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from masked_layers.torchscript.costs import SPARSE_FROM
from masked_layers.torchscript.operations import Operation, product_of

_FOLDED = frozenset(
    (
        *("permute", "transpose", "t", "swapaxes", "moveaxis", "movedim", "reshape", "view"),
        *("flatten", "squeeze", "unsqueeze", "contiguous", "clone", "detach", "unbind", "split"),
        *("chunk", "cat", "concat", "stack", "to", "type", "float", "double", "half", "bfloat16"),
        *("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "neg"),
        *("square", "sqrt", "rsqrt", "sqrt_", "rsqrt_", "abs", "exp", "where"),
        *("__get__", "size", "dim", "stride", "is_contiguous", "numel", "__len__"),
    )
)
"""Functions whose result depends on nothing but the weights that they receive: not on the batch, as
that of `expand` would. Their results are computed once, at export. (The name of the functions that
read attributes is `__get__`.)"""


@dataclasses.dataclass
class Constant:
    """A weight, or what functions compute from weights alone.

    Attributes:
        tensor: Its values.
        paths: Paths of the weights.
        elsewhere: Whether a function that has no sparse form receives it.
    """

    tensor: Tensor
    paths: tuple[str, ...]
    elsewhere: bool = False

    def __post_init__(self) -> None:
        self.alive = int(torch.count_nonzero(self.tensor))

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return 1.0 - self.alive / self.tensor.numel() if self.tensor.numel() else 0.0


@dataclasses.dataclass(eq=False)
class Site:
    """The calls of one operation with one weight.

    Attributes:
        constant: The weight.
        operation: The operation.
    """

    constant: Constant
    operation: Operation


class Calls(TorchFunctionMode):
    """Intercepts the functions that a model calls.

    Attributes:
        constants: Constants by the identity of their tensors.
        sites: Sites by the identity of the tensor and the operation.
        compute: Computes the result at a site, given the input and a function that computes it
            densely.
        replace: Returns what functions receive in place of a constant.

    Args:
        weights: Tensors of the model by path.
        sparse_from: Share of zeros in a weight from which its operations are sites.
    """

    def __init__(self, weights: Mapping[str, Tensor], sparse_from: float = SPARSE_FROM) -> None:
        super().__init__()
        self._sparse_from = sparse_from
        self.constants: dict[int, Constant] = {}
        self.sites: dict[tuple[int, Operation], Site] = {}
        self.compute: Callable[[Site, Tensor, Callable[[], Any]], Any]
        self.compute = lambda site, x, dense: dense()
        self.replace: Callable[[Constant], Tensor] = lambda constant: constant.tensor
        self._folded: dict[Any, Any] = {}
        for path, tensor in weights.items():
            self.constants[id(tensor)] = Constant(tensor, (path,))
        self._weights = frozenset(self.constants)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls a function, or uses what is known about its arguments."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        tensors = _tensors((args, kwargs))
        inside = [tensor for tensor in tensors if self._is_constant(tensor)]
        if not inside:
            return func(*args, **kwargs)
        one = name == "__getitem__" and isinstance(args[1], int)
        if one or name in _FOLDED:
            attribute = getattr(getattr(func, "__self__", None), "__name__", "")
            key = (name, attribute, _described((args, kwargs)))
            if key not in self._folded and len(inside) == len(tensors):
                self._folded[key] = self._fold(inside, name, lambda: func(*args, **kwargs))
            if key in self._folded:
                return self._folded[key]
        versions = [tensor._version for tensor in inside]
        result = self._call(func, args, kwargs, inside)
        for tensor, version in zip(inside, versions, strict=True):
            if tensor._version != version:
                raise self._changes(tensor)
        return result

    def _is_constant(self, tensor: object) -> bool:
        return id(tensor) in self.constants

    def _fold(self, inside: list[Tensor], name: str, call: Callable[[], Any]) -> Any:
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place and id(inside[0]) in self._weights:
            raise self._changes(inside[0])
        paths = [path for tensor in inside for path in self.constants[id(tensor)].paths]
        result = call()
        for tensor in _tensors(result):
            if id(tensor) not in self._weights:
                self.constants[id(tensor)] = Constant(tensor, tuple(dict.fromkeys(paths)))
        return result

    def _call(self, func: Any, args: Any, kwargs: Any, inside: list[Tensor]) -> Any:
        def dense() -> Any:
            return func(*_map(self._replaced, args), **_map(self._replaced, kwargs))

        product = product_of(func, args, kwargs, self._is_constant)
        if product is not None:
            constant = self.constants[id(product.weight)]
            if constant.sparsity >= self._sparse_from:
                key = id(product.weight), product.operation
                site = self.sites.setdefault(key, Site(constant, product.operation))
                return self.compute(site, product.x, dense)
        for tensor in inside:
            self.constants[id(tensor)].elsewhere = True
        return dense()

    def _replaced(self, value: Any) -> Any:
        constant = self.constants.get(id(value))
        return value if constant is None else self.replace(constant)

    def _changes(self, tensor: Tensor) -> NotImplementedError:
        paths = ", ".join(self.constants[id(tensor)].paths)
        return NotImplementedError(
            f"A call of the model changes '{paths}', which a TorchScript file cannot do."
        )


def _tensors(structure: Any) -> list[Tensor]:
    if isinstance(structure, Tensor):
        return [structure]
    if isinstance(structure, Mapping):
        structure = list(structure.values())
    if isinstance(structure, list | tuple):
        return [tensor for value in structure for tensor in _tensors(value)]
    return []


def _map(function: Callable[[Any], Any], structure: Any) -> Any:
    if type(structure) in (list, tuple):
        return type(structure)(_map(function, value) for value in structure)
    if type(structure) is dict:
        return {key: _map(function, value) for key, value in structure.items()}
    return function(structure)


def _described(structure: Any) -> str:
    """Returns a text that is equal for calls with the same tensors and the same other arguments.

    In tracing, the length of an axis is a tensor.
    """

    def described(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return type(value), value
        if torch.jit.is_tracing() and value.dim() == 0 and not value.dtype.is_floating_point:
            return int, int(value)
        return id(value)

    return repr(_map(described, structure))

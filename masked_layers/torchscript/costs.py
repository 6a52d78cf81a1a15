"""Measured times of products with sparse kernels, by sparsity, from which budgets are solved."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

SPARSE_FROM = 0.5
"""Share of zeros from which sparse kernels are tried."""

GAIN = 0.95
"""A sparse kernel must take less than this share of the dense time."""


@dataclass(frozen=True)
class ProductCosts:
    """Times of one operation with one weight.

    Attributes:
        paths: Paths of the weights: several if they are joined before they are multiplied.
        dense: Seconds of the dense kernel, for all calls of the operation in one pass.
        sparse: Seconds of the fastest sparse kernel for each of `ProgramCosts.sparsities`.
    """

    paths: tuple[str, ...]
    dense: float
    sparse: tuple[float, ...]


@dataclass(frozen=True)
class ProgramCosts:
    """Times of a program and of its products.

    Attributes:
        sparsities: The sparsities that were measured, in ascending order.
        products: The products that have a sparse form.
        seconds: Median seconds of a call of the whole program with dense kernels.
        threads: Number of threads.
    """

    sparsities: tuple[float, ...]
    products: tuple[ProductCosts, ...]
    seconds: float
    threads: int

    def to_json(self) -> bytes:
        """Returns the times as JSON, for another process."""
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> ProgramCosts:
        """Creates times from JSON; the inverse of `to_json`."""
        content = json.loads(data)
        products = tuple(
            ProductCosts(tuple(each["paths"]), each["dense"], tuple(each["sparse"]))
            for each in content.pop("products")
        )
        sparsities = tuple(content.pop("sparsities"))
        return cls(sparsities=sparsities, products=products, **content)

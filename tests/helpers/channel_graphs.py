"""Families of channels as selection receives them, without a model."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Family:
    layers: tuple
    size: int
    weights: dict
    made: dict
    kind: str = ""
    form: tuple = ()
    scales: tuple = ()
    products: dict = dataclasses.field(default_factory=dict)

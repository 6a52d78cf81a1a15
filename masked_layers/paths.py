"""Names for the layers and weights inside a model that survive saving, loading and masking.

A path is made of the names of layers (inside Sequential and Functional models) and of attributes
(inside every other layer), joined by "/": `encoder/attention/_query_dense/kernel`. Automatic layer
names (`dense_7`) depend on what the process created before; in a path they count from the start of
their own model, so that the same architecture built twice has the same paths.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import keras

from masked_layers import _keras
from masked_layers.masks import Mask

Layer: TypeAlias = keras.layers.Layer

# Attributes in which Keras, torch and TensorFlow list the children of a layer once more.
_BOOKKEEPING = re.compile("_layers|_modules|_tracker|_metrics|_self_.*")


def plain_class(layer: Layer) -> type[Layer]:
    """Returns the class of the layer without its masks."""
    return vars(type(layer)).get("plain_class", type(layer))


def children(layer: Layer) -> list[tuple[str, Layer]]:
    """Returns (name, layer) of the layers directly inside `layer`, each once, masks left out."""
    found: dict[int, tuple[str, Layer]] = {}
    if isinstance(layer, keras.Sequential) or _keras.is_functional(layer):
        for name, child in zip(_names(layer.layers), layer.layers, strict=True):
            found.setdefault(id(child), (name, child))
    tracked = {id(child): child for child in _keras.sublayers(layer)}
    if tracked.keys() - found.keys():
        # On torch, child layers live in `_modules` and not among the attributes.
        attributes = {**vars(layer), **vars(layer).get("_modules", {})}
        for name, value in attributes.items():
            if not _BOOKKEEPING.fullmatch(name):
                for path, child in _layers_in(name, value):
                    if id(child) in tracked and id(child) not in found:
                        taken = [name for name, _ in found.values()]
                        found[id(child)] = (_unique(path, taken), child)
    return [(path, child) for path, child in found.values() if not isinstance(child, Mask)]


def walk(root: Layer) -> Iterator[tuple[str, Layer]]:
    """Yields (path, layer) depth first, each layer once; the root comes first, its path is ""."""
    seen: set[int] = set()

    def visit(path: str, layer: Layer) -> Iterator[tuple[str, Layer]]:
        if id(layer) not in seen:
            seen.add(id(layer))
            yield path, layer
            for name, child in children(layer):
                yield from visit(join(path, name), child)

    return visit("", root)


def resolve(root: Layer, path: str, cache: dict[int, Any] | None = None) -> list[tuple[str, Layer]]:
    """Returns the layers along the path of a weight, each with the rest of the path from there.

    `resolve(model, "encoder/dense/kernel")` is `[("encoder/dense/kernel", model),
    ("dense/kernel", encoder), ("kernel", dense)]`.

    Args:
        root: Where the path starts.
        path: Path of a weight; whether the last layer has that weight is not checked.
        cache: A dict to be handed to many calls on a model that does not change between them.

    Raises:
        KeyError: If there is no such path; its argument is the path.
    """
    cache = {} if cache is None else cache
    chain, rest = [(path, root)], path
    while "/" in rest:
        layer = chain[-1][1]
        if id(layer) not in cache:
            cache[id(layer)] = children(layer)
        for name, child in cache[id(layer)]:
            if rest.startswith(name + "/"):
                rest = rest[len(name) + 1 :]
                chain.append((rest, child))
                break
        else:
            raise KeyError(path)
    return chain


def join(*names: str) -> str:
    """Joins the names that are not empty."""
    return "/".join(name for name in names if name)


def _names(layers: Iterable[Layer]) -> list[str]:
    names: list[str] = []
    for layer in layers:
        stem = _keras.to_snake_case(type(layer).__name__)
        name = stem if re.fullmatch(rf"{re.escape(stem)}_\d+", layer.name) else layer.name
        names.append(_unique(name, names))
    return names


def _unique(name: str, taken: list[str]) -> str:
    unique, count = name, 0
    while unique in taken:
        count += 1
        unique = f"{name}_{count}"
    return unique


def _layers_in(path: str, value: Any) -> Iterator[tuple[str, Layer]]:
    if isinstance(value, Layer):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _layers_in(f"{path}/{key}", item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _layers_in(f"{path}/{index}", item)

"""Paths of the layers and weights inside a model, stable under saving, loading and masking.

A path consists of the names of layers (inside Sequential and Functional models) and attributes
(inside every other layer), joined by "/": `encoder/attention/_query_dense/kernel`. Automatic layer
names (`dense_7`) depend on which layers the process created before. In a path they are numbered
separately in each model, so that the same architecture built twice has the same paths.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import keras

from masked_layers import _keras
from masked_layers.masks import Mask

Layer: TypeAlias = keras.layers.Layer

# Attributes in which Keras, torch and TensorFlow list the children of a layer a second time.
_BOOKKEEPING = re.compile(
    "_layers|_modules|_tracker|_metrics|_self_(unconditional_(checkpoint_dependencies"
    "|dependency_names|deferred_dependencies)|name_based_restores|saveable_object_factories"
    "|extra_variables)"
)


def plain_class(layer: Layer) -> type[Layer]:
    """Returns the class of the layer without its masks."""
    return vars(type(layer)).get("plain_class", type(layer))


def children(layer: Layer) -> list[tuple[str, Layer]]:
    """Returns (name, layer) for the layers directly inside `layer`, each once, without masks.

    These are the layers that Keras tracks in the graph of a model, in attributes, lists, dicts and
    sets. Layers in a set are named and ordered by their layer names. A layer that Keras still
    tracks although its attribute was overwritten is named `_layers/` followed by its layer name.

    Raises:
        ValueError: If two layers in a set have the same name and cannot be told apart.
    """
    found: dict[int, tuple[str, Layer]] = {}
    if isinstance(layer, keras.Sequential) or _keras.is_functional(layer):
        for name, child in zip(_names(layer.layers), layer.layers, strict=True):
            found.setdefault(id(child), (name, child))
    inside = [child for child in _keras.sublayers(layer) if not isinstance(child, Mask)]
    tracked = {id(child): child for child in inside}
    missing = tracked.keys() - found.keys()
    for path, child in _in_attributes(layer) if missing else ():
        if id(child) in missing:
            taken = [name for name, _ in found.values()]
            found[id(child)] = (_unique(path, taken), child)
            missing.remove(id(child))
            if not missing:  # Attributes may hold long lists, so looking takes time.
                break
    rest = [child for key, child in tracked.items() if key not in found]
    for name, child in zip(_names(rest), rest, strict=True):
        found[id(child)] = (f"_layers/{name}", child)
    return [(path, child) for path, child in found.values() if not isinstance(child, Mask)]


def walk(root: Layer) -> Iterator[tuple[str, Layer]]:
    """Yields (path, layer) depth first, each layer once, beginning with the root (path "")."""
    seen: set[int] = set()

    def visit(path: str, layer: Layer) -> Iterator[tuple[str, Layer]]:
        if id(layer) not in seen:
            seen.add(id(layer))
            yield path, layer
            for name, child in children(layer):
                yield from visit(join(path, name), child)

    return visit("", root)


def graph_layers(root: Layer) -> list[Layer]:
    """Returns the layers in the graphs of a model and of the models inside it, in a fixed order.

    They exist before the model is built. Input layers are left out.
    """
    found: dict[int, Layer] = {}
    if isinstance(root, keras.Sequential) or _keras.is_functional(root):
        for layer in root.layers:
            if not isinstance(layer, keras.layers.InputLayer):
                found.update({id(inner): inner for inner in (layer, *graph_layers(layer))})
    return list(found.values())


def name_graph(root: Layer, names: Sequence[str]) -> None:
    """Renames the layers of a graph to the names that `graph_layers` found in the original.

    A model that is given a name may derive the names of its layers from it, as keras-hub's models
    do, and a model made from a config is always given one.
    """
    inside = graph_layers(root)
    if len(inside) == len(names):
        for layer, name in zip(inside, names, strict=True):
            layer.name = name


def resolve(root: Layer, path: str, cache: dict[int, Any] | None = None) -> list[tuple[str, Layer]]:
    """Returns the layers along the path of a weight, each with the remaining path from there.

    `resolve(model, "encoder/dense/kernel")` is `[("encoder/dense/kernel", model),
    ("dense/kernel", encoder), ("kernel", dense)]`.

    Args:
        root: The layer or model where the path starts.
        path: Path of a weight. Whether the last layer has this weight is not checked.
        cache: A dict to share between calls, as long as the model does not change.

    Raises:
        KeyError: If the path does not exist. Its argument is the path.
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
    """Joins the non-empty names with "/"."""
    return "/".join(name for name in names if name)


def check_walk(root: Layer) -> None:
    """Checks that `walk` finds every layer that Keras tracks inside `root`.

    Raises:
        ValueError: If it misses a layer, which the message names.
    """
    found = {id(layer) for _, layer in walk(root)}
    lost = [
        layer
        for layer in _keras.flatten(root)
        if id(layer) not in found and not isinstance(layer, Mask)
    ]
    if lost:
        names = ", ".join(
            f"'{layer.path or layer.name}' ({type(layer).__name__})" for layer in lost
        )
        raise ValueError(
            f"'{root.name}' cannot be masked: Keras tracks layers in it that no path leads to, so "
            f"their weights would be left out: {names}. Store them in attributes of the layer "
            "that contains them, or in lists, dicts or sets there."
        )


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


def left_out_of_files(layer: Layer) -> list[tuple[str, Layer]]:
    """Returns the children that Keras does not save, because they are in a set."""
    saved = {id(child) for child in graph_layers(layer)}
    for name, value in _attributes(layer).items():
        saved.update(id(child) for _, child in _layers_in(name, value, sets=False))
    return [(name, child) for name, child in children(layer) if id(child) not in saved]


def _attributes(layer: Layer) -> dict[str, Any]:
    # On torch, child layers live in `_modules` and not among the attributes.
    attributes = {**vars(layer), **vars(layer).get("_modules", {})}
    return {name: v for name, v in attributes.items() if not _BOOKKEEPING.fullmatch(name)}


def _in_attributes(layer: Layer) -> Iterator[tuple[str, Layer]]:
    """Yields (path, layer) for each attribute, list entry and so on that holds a layer.

    The layers that earlier versions found come first, so that paths in their files remain valid.
    """
    attributes = _attributes(layer)
    for name, value in attributes.items():
        if not name.startswith("_self_"):
            yield from _layers_in(name, value, sets=False)
    for name, value in attributes.items():
        yield from _layers_in(name, value, sets=True)


def _layers_in(path: str, value: object, *, sets: bool) -> Iterator[tuple[str, Layer]]:
    if isinstance(value, keras.layers.Layer):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _layers_in(f"{path}/{key}", item, sets=sets)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _layers_in(f"{path}/{index}", item, sets=sets)
    elif isinstance(value, set) and sets:
        for name, item in _in_order(path, value):
            yield from _layers_in(f"{path}/{name}", item, sets=sets)


def _in_order(path: str, members: set[Any]) -> list[tuple[str, Any]]:
    """Returns (name, member) for the members of a set that contain layers, in a fixed order.

    Python orders a set by memory addresses. Layer names have a fixed order, since automatic ones
    are numbered in the order in which the layers are made.
    """

    def key(layer: Layer) -> tuple[str, int]:
        stem, underscore, number = layer.name.rpartition("_")
        numbered = underscore and number.isdecimal()
        return (stem, int(number)) if numbered else (layer.name, 0)

    first = [(next(_layers_in("", member, sets=True), None), member) for member in members]
    held = sorted(((found[1], member) for found, member in first if found), key=lambda x: key(x[0]))
    names = [layer.name for layer, _ in held]
    if len({*names}) < len(names):
        raise ValueError(
            f"Layers in the set '{path}' have the same name and cannot be told apart: "
            f"{names}. Give them different names, or store them in a list."
        )
    return list(
        zip(_names(layer for layer, _ in held), (member for _, member in held), strict=True)
    )

"""Names for the layers and weights inside a model that survive saving, loading and masking.

A path is made of the names of layers (inside Sequential and Functional models) and of attributes
(inside every other layer), joined by "/": `encoder/attention/_query_dense/kernel`. Automatic layer
names (`dense_7`) depend on what the process created before; in a path they count from the start of
their own model, so that the same architecture built twice has the same paths.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import keras

from masked_layers import _keras
from masked_layers.masks import Mask

Layer: TypeAlias = keras.layers.Layer

# Attributes in which Keras, torch and TensorFlow list the children of a layer once more.
_BOOKKEEPING = re.compile(
    "_layers|_modules|_tracker|_metrics|_self_(unconditional_(checkpoint_dependencies"
    "|dependency_names|deferred_dependencies)|name_based_restores|saveable_object_factories"
    "|extra_variables)"
)


def plain_class(layer: Layer) -> type[Layer]:
    """Returns the class of the layer without its masks."""
    return vars(type(layer)).get("plain_class", type(layer))


def children(layer: Layer) -> list[tuple[str, Layer]]:
    """Returns (name, layer) of the layers directly inside `layer`, each once, masks left out.

    They are those that Keras tracks, whatever holds them: the graph of a model, attributes, lists,
    dicts and sets. In a set they are named, and ordered, by their layer names; one that nothing
    holds any more, as its attribute was given another layer, is `_layers/` and its layer name.

    Raises:
        ValueError: If two layers in one set have the same name, so that nothing tells them apart.
    """
    found: dict[int, tuple[str, Layer]] = {}
    if isinstance(layer, keras.Sequential) or _keras.is_functional(layer):
        for name, child in zip(_names(layer.layers), layer.layers, strict=True):
            found.setdefault(id(child), (name, child))
    tracked = {id(child): child for child in _keras.sublayers(layer)}
    for path, child in _in_attributes(layer) if tracked.keys() - found.keys() else ():
        if id(child) in tracked and id(child) not in found:
            taken = [name for name, _ in found.values()]
            found[id(child)] = (_unique(path, taken), child)
    rest = [child for key, child in tracked.items() if key not in found]
    for name, child in zip(_names(rest), rest, strict=True):
        found[id(child)] = (f"_layers/{name}", child)
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


def graph_layers(root: Layer) -> list[Layer]:
    """Returns the layers in the graph of a model, and in those of models in it, in a fixed order.

    They are there as soon as the model is, before it is built; inputs are left out.
    """
    found: dict[int, Layer] = {}
    if isinstance(root, keras.Sequential) or _keras.is_functional(root):
        for layer in root.layers:
            if not isinstance(layer, keras.layers.InputLayer):
                found.update({id(inner): inner for inner in (layer, *graph_layers(layer))})
    return list(found.values())


def name_graph(root: Layer, names: Sequence[str]) -> None:
    """Gives the layers of a graph the names that `graph_layers` found in the original.

    A model may name its layers after itself where it was given a name, as models of keras-hub do,
    and one that is made from a config was given one.
    """
    inside = graph_layers(root)
    if len(inside) == len(names):
        for layer, name in zip(inside, names, strict=True):
            layer.name = name


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


def check_walk(root: Layer) -> None:
    """Checks that `walk` finds every layer that Keras tracks inside `root`.

    Raises:
        ValueError: If it loses one; it names the layer.
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
            f"that their weights would be left out: {names}. Hold them in attributes of the layer "
            "around them, or in lists, dicts or sets there."
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
    """Returns those children that Keras does not save: it looks into lists and dicts, not sets."""
    saved = {id(child) for child in graph_layers(layer)}
    for name, value in _attributes(layer).items():
        saved.update(id(child) for _, child in _layers_in(name, value, sets=False))
    return [(name, child) for name, child in children(layer) if id(child) not in saved]


def _attributes(layer: Layer) -> dict[str, Any]:
    # On torch, child layers live in `_modules` and not among the attributes.
    attributes = {**vars(layer), **vars(layer).get("_modules", {})}
    return {name: v for name, v in attributes.items() if not _BOOKKEEPING.fullmatch(name)}


def _in_attributes(layer: Layer) -> Iterator[tuple[str, Layer]]:
    """Yields (path, layer) of what attributes hold, a layer held twice also twice.

    What earlier versions found comes first, so that the paths in files of theirs stay.
    """
    attributes = _attributes(layer)
    for name, value in attributes.items():
        if not name.startswith("_self_"):
            yield from _layers_in(name, value, sets=False)
    for name, value in attributes.items():
        yield from _layers_in(name, value, sets=True)


def _layers_in(path: str, value: Any, *, sets: bool) -> Iterator[tuple[str, Layer]]:
    if isinstance(value, Layer):
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
    """Returns (name, member) of what holds layers in a set, in an order that is always the same.

    A set is ordered by where its members are in memory. Their names are in order: automatic ones
    are numbered in the order in which the layers were made.
    """

    def key(layer: Layer) -> tuple[str, int]:
        stem, number = re.fullmatch(r"(.*?)(?:_(\d+))?", layer.name, re.DOTALL).groups()
        return stem, int(number or 0)

    first = [(next(_layers_in("", member, sets=True), None), member) for member in members]
    held = sorted(((found[1], member) for found, member in first if found), key=lambda x: key(x[0]))
    names = [layer.name for layer, _ in held]
    if len({*names}) < len(names):
        raise ValueError(
            f"Layers in the set '{path}' have the same name, so that nothing tells them apart: "
            f"{names}. Give them different names, or hold them in a list."
        )
    return list(
        zip(_names(layer for layer, _ in held), (member for _, member in held), strict=True)
    )

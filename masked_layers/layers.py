"""Masked forms of Keras layers, and how any existing layer becomes one.

A masked layer is the Keras layer it replaces plus one `Mask` child per masked weight. Where the
layer reads `self.kernel` it now reads `mask(raw kernel)`; nothing else of it changes. A composite
layer (an RNN around its cell, attention around its projections, a user's own block) is masked when
layers inside it are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import keras
import numpy as np
from keras import layers
from keras.initializers import Ones

from masked_layers import _keras, learned, sets, states
from masked_layers.effective import EffectiveWeight
from masked_layers.maskable import (
    Maskable,
    mask_of,
    maskable,
    own_weights,
    raw_variable,
    weights_inside,
)
from masked_layers.masks import Mask, MaskedConstraint, MaskedRegularizer, raw_view
from masked_layers.paths import graph_layers, join, name_graph, plain_class, resolve, walk

Layer: TypeAlias = layers.Layer
PACKAGE = "masked_layers"


@dataclasses.dataclass
class _Masking:
    """The masking state of a layer, in one attribute: all other names are the user's.

    Attributes:
        weights: Paths, relative to the layer, of the weights that have a mask; None for all
            kernel-like ones.
        bias: Whether biases have masks too.
        initializer: Initializer of binary masks.
        mask: Prototype of the masks; None for binary ones.
        state: What masks that are not built yet start from, by path: configs of `MaskState`.
        frozen: Variables of the layer that are not trainable because a mask of it is learned.
    """

    weights: tuple[str, ...] | None
    bias: bool
    initializer: keras.initializers.Initializer
    mask: Mask | None = None
    state: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    frozen: list[keras.Variable] = dataclasses.field(default_factory=list)


class MaskedLayer:
    """Base class of all masked layers, for `isinstance`.

    Attributes:
        plain_class: Class of the layer without its masks.
    """

    plain_class: type[Layer]
    _masking: _Masking

    def __repr__(self) -> str:
        return f"<{type(self).__qualname__} name={self.name}, built={self.built}>"

    def __reduce__(self) -> tuple[Any, ...]:
        # Keras names the method of a class that must be found by name; one made here cannot be.
        make, arguments = super().__reduce__()
        return _unpickled, (getattr(plain_class(self), make.__name__), arguments)

    def save_own_variables(self, store: Any) -> None:
        """Saves raw values, also those under a mask, and layers in sets, which Keras leaves out."""
        with raw_view():
            super().save_own_variables(store)
        sets.save(self, store)

    def load_own_variables(self, store: Any) -> None:
        """Loads raw values."""
        own = sets.without(self, store)
        with raw_view():
            super().load_own_variables(own)
        sets.load(self, store)

    def quantize(self, *args: Any, **kwargs: Any) -> None:
        """Refuses: see `Mask.quantize`."""
        if not isinstance(self, MaskedLayer):  # Stripped: Keras still holds this bound method.
            return type(self).quantize(self, *args, **kwargs)
        return Mask.quantize(self, *args, **kwargs)

    def _masking_config(self) -> dict[str, Any]:
        masking = self._masking
        config = {
            "masked_weights": None if masking.weights is None else list(masking.weights),
            "mask_bias": masking.bias,
            "mask_initializer": keras.initializers.serialize(masking.initializer),
        }
        if masking.mask is not None:
            config["mask"] = keras.saving.serialize_keras_object(masking.mask)
        # A config is all that a clone, JSON or an `.h5` file has.
        if not _keras.state_goes_apart():
            plain = masking.mask is None and isinstance(masking.initializer, Ones)
            found = {**masking.state, **states.configs(self, _paths(self), as_made=plain)}
            if found:
                config["mask_state"] = found
        return config


@keras.saving.register_keras_serializable(PACKAGE, "MaskedLayer")
class MaskedByConversion(MaskedLayer):
    """Masked form of a class that `masked_layers.classes` has none for.

    All of these share one registered name: their config is that of the plain layer and the paths
    of the masks in it, so that a saved model needs only the plain class to be known to Keras.
    """

    def get_config(self) -> dict[str, Any]:
        """Returns the config of the plain layer and what is masked in it."""
        names = [layer.name for layer in graph_layers(self)]
        config = {"layer": _plain_config(self), **self._masking_config()}
        return {**config, "layer_names": names} if names else config

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Layer:
        """Makes the plain layer and masks it, once it is built."""
        deserialize = functools.partial(
            keras.saving.deserialize_keras_object, custom_objects=custom_objects
        )
        layer = deserialize(config["layer"])
        name_graph(layer, config.get("layer_names", []))
        initializer = deserialize(config["mask_initializer"])
        mask = deserialize(config["mask"]) if "mask" in config else None
        _change_class(layer, config["masked_weights"], config["mask_bias"], initializer, mask)
        _start_from(layer, config.get("mask_state"))
        _when_built(layer, _mask_built)
        return layer


# --- Classes --------------------------------------------------------------------------------------

by_hand: dict[type[Layer], type[Layer]] = {}


def define(base: type[Layer], module: str) -> type[Layer]:
    """Makes the masked form of a Keras layer: a class that can also be constructed by hand."""

    @functools.wraps(base.__init__)
    def init(
        self: Any,
        *args: Any,
        masked_weights: Sequence[str] | None = None,
        mask_bias: bool = False,
        mask_initializer: Any = "ones",
        mask: Any = None,
        mask_state: Any = None,
        **kwargs: Any,
    ) -> None:
        base.__init__(self, *args, **kwargs)
        prototype = None if mask is None else learned.get(mask)
        _set_masking(self, masked_weights, mask_bias, mask_initializer, prototype)
        _start_from(self, mask_state)

    plain = inspect.signature(base.__init__)
    masking = inspect.signature(init, follow_wrapped=False).parameters.values()
    parameters = [p for p in plain.parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters += [p for p in masking if p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD)]
    init.__signature__ = plain.replace(parameters=parameters)

    @functools.wraps(base.build)
    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        base.build(self, *args, **kwargs)
        self.built = True
        if isinstance(self, MaskedLayer):  # Stripped: Keras still holds this bound method.
            _mask_built(self)

    def get_config(self: Any) -> dict[str, Any]:
        return {**base.get_config(self), **self._masking_config()}

    namespace = {
        "__doc__": f"""`keras.layers.{base.__name__}` with a mask over each of its kernels.

    Every forward pass reads `mask(raw weight)` in place of the weight. Takes the arguments of
    `keras.layers.{base.__name__}`, which describes them, and those below.

    Args:
        masked_weights: Which weights get a mask, by path relative to the layer: `"kernel"`, or
            `"cell/recurrent_kernel"` for a weight of a layer inside. Default: every kernel.
        mask_bias: Whether biases get a mask too. Ignored where `masked_weights` is given.
        mask_initializer: Initializer of binary masks; entries other than 0 are kept. Default: ones.
        mask: Kind of the masks, as for `convert_to_masked`. Default: binary.
        mask_state: What binary masks start as, by path, as `get_config` of a layer gives it whose
            masks are not as they started. Default: what `mask_initializer` makes.

    Raises:
        ValueError: If `mask` is not a mask; when it is built, if `masked_weights` or `mask_state`
            names a weight it does not have, one that cannot have such a mask, or one of another
            shape.
    """,
        "__module__": module,
        "__init__": init,
        "build": build,
        "get_config": get_config,
    }
    cls = _subclass(MaskedLayer, base, maskable(base), namespace)
    by_hand[base] = keras.saving.register_keras_serializable(PACKAGE, cls.__qualname__)(cls)
    return cls


@functools.cache
def _made_for(base: type[Layer], spec: Maskable | None) -> type[Layer]:
    """Makes the masked form of a class that `masked_layers.classes` has none for.

    `spec`, what can be masked in it, is part of the key: a class may be registered later.
    """
    doc = f"`{base.__name__}` with masks over weights of it or of layers inside it."
    cls = _subclass(MaskedByConversion, base, spec, {"__doc__": doc})
    return keras.saving.register_keras_serializable(PACKAGE, "MaskedLayer")(cls)


def _subclass(
    kind: type[MaskedLayer], base: type[Layer], spec: Maskable | None, namespace: dict[str, Any]
) -> type[Layer]:
    names = () if spec is None else spec.weights + spec.biases
    # Keras names the entries of a weights file, and layers without a name, after `__name__`: with
    # that of the plain class, plain and masked models read each other's files.
    return type(
        base.__name__,
        (kind, base),
        {
            "__module__": __name__,
            "__qualname__": f"Masked{base.__name__}",
            "plain_class": base,
            **{name: EffectiveWeight(base, name) for name in names},
            **namespace,
        },
    )


def _plain_config(layer: Layer) -> dict[str, Any]:
    # Serialised as an instance of its plain class: Keras and user code look at the class of `self`.
    cls = type(layer)
    layer.__class__ = plain_class(layer)
    try:
        config = keras.saving.serialize_keras_object(layer)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"'{layer.name}' cannot be saved with its architecture, because "
            f"{plain_class(layer).__name__} has no `get_config()`. Add one, or save its state "
            "alone: `model.save_weights(path)` keeps weights and masks."
        ) from error
    finally:
        layer.__class__ = cls
    for key in ("build_config", "compile_config", "shared_object_id"):
        config.pop(key, None)  # Stands beside the config of the masked layer.
    return config


# --- Masking and unmasking layers that exist ------------------------------------------------------


def mask_weights(
    root: Layer,
    paths: Iterable[str],
    *,
    initializer: Any = "ones",
    mask_bias: bool = False,
    mask: Mask | None = None,
    state: Mapping[str, Any] | None = None,
    prefix: str = "",
) -> None:
    """Puts masks over weights inside `root`, changing the layers in place.

    Weights that have a mask keep it, and weights that layers share get one mask. A layer that is
    not built yet gets its masks when it is built.

    Args:
        root: A layer or model.
        paths: Paths of weights, relative to `root`.
        initializer: Initializer of new binary masks.
        mask_bias: What the configs of the layers are to say about their biases.
        mask: Prototype of new masks; None for binary ones.
        state: What new masks start from, by path: configs of `MaskState`.
        prefix: What comes before the paths where seeds are derived from them.

    Raises:
        ValueError: If a path names no maskable weight, or one that cannot have such a mask.
            Nothing has changed then.
    """
    cache: dict[int, Any] = {}
    chains = []
    for path in paths:
        try:
            chain = resolve(root, path, cache)
        except KeyError:
            chain = []
        if not chain or chain[-1][0] not in own_weights(chain[-1][1], biases=True):
            raise ValueError(
                f"'{root.name}' has no weight '{path}' that can be masked. Those it has: "
                f"{[path for path, *_ in weights_inside(root, biases=True)]}"
            )
        _check_mask(chain[-1][1], mask)
        chains.append(chain)

    shared = _masks_by_variable(root)
    for chain in chains:
        *holders, (name, layer) = chain
        path = chain[0][0]
        for rest, holder in holders:
            if isinstance(holder, MaskedLayer) or not _keras.is_plain_container(holder):
                _name_masks(holder, mask_bias, initializer, mask)
                _add_path(holder, rest)
        _name_masks(layer, mask_bias, initializer, mask)
        _add_path(layer, name)
        if state and path in state:
            layer._masking.state[name] = state[path]
        if layer.built:
            _attach(layer, name, shared, join(prefix, path))
        elif not vars(layer).get("_masked_when_built"):
            vars(layer)["_masked_when_built"] = True
            _when_built(layer, _mask_built)
    _keras.refresh_parameters(root)


def mask_when_built(
    layer: Layer, *, initializer: Any = "ones", mask_bias: bool = False, mask: Mask | None = None
) -> None:
    """Makes a layer that is not built yet, and makes its inner layers then, masked throughout."""
    _change_class(layer, None, mask_bias, initializer, mask)
    _when_built(layer, _mask_built)


def make_binary(root: Layer, masks: Mapping[int, np.ndarray]) -> None:
    """Replaces learned masks inside `root` by binary ones in place; weights can be trained again.

    Args:
        root: A layer or model.
        masks: The masks, by the id of the raw variable that each is over.
    """
    shared: dict[int, Mask] = {}
    for _, layer in list(walk(root)):
        if isinstance(layer, MaskedLayer):
            old = {name: mask_of(layer, name) for name in own_weights(layer, biases=True)}
            layer._masking.mask = None
            for name, mask in old.items():
                if mask is not None and mask.learned:
                    _detach(layer, name)
                    new = _attach(layer, name, shared, name)
                    new.value.assign(masks[id(raw_variable(layer, name))])
                    new.rescale = mask.rescale
    _keras.refresh_parameters(root)


@contextlib.contextmanager
def undone_on_error(root: Layer) -> Iterator[None]:
    """Takes the masks that layers inside `root` are given back where an error leaves the scope."""
    before = {}
    for _, layer in walk(root):
        masking = vars(layer).get("_masking")
        kept = [name for name in own_weights(layer, biases=True) if mask_of(layer, name)]
        copy = masking and dataclasses.replace(masking, frozen=list(masking.frozen))
        before[id(layer)] = (copy, kept)
    try:
        yield
    except BaseException:
        for _, layer in list(walk(root)):
            masking, kept = before.get(id(layer), (None, []))
            if isinstance(layer, MaskedLayer):
                for name in own_weights(layer, biases=True):
                    if name not in kept:
                        _detach(layer, name)
                if masking is None:
                    _restore_class(layer)
                else:
                    layer._masking = masking
        _keras.refresh_parameters(root)
        raise


def unmask(root: Layer) -> None:
    """Removes every mask inside `root` in place; raw weights stay as they are.

    Each masked layer becomes an instance of its plain class again.
    """
    for _, layer in list(walk(root)):
        if isinstance(layer, MaskedLayer):
            for name in own_weights(layer, biases=True):
                _detach(layer, name)
            _restore_class(layer)
    _keras.refresh_parameters(root)


def _restore_class(layer: Layer) -> None:
    del layer._masking
    layer.__class__ = plain_class(layer)
    _keras.unbind_quantize(layer)


def _unpickled(make: Callable[..., Layer], arguments: tuple[Any, ...]) -> Layer:
    return make(*arguments)


def _set_masking(
    layer: Layer,
    masked_weights: Iterable[str] | None,
    mask_bias: bool,
    initializer: Any,
    mask: Mask | None,
) -> None:
    layer._masking = _Masking(
        None if masked_weights is None else tuple(masked_weights),
        mask_bias,
        keras.initializers.get(initializer),
        mask,
    )


def _change_class(
    layer: Layer,
    masked_weights: Iterable[str] | None,
    mask_bias: bool,
    initializer: Any,
    mask: Mask | None,
) -> None:
    if not isinstance(layer, MaskedLayer):
        base = type(layer)
        layer.__class__ = by_hand.get(base) or _made_for(base, maskable(base))
        _set_masking(layer, masked_weights, mask_bias, initializer, mask)
        _keras.bind_quantize(layer, functools.partial(MaskedLayer.quantize, layer))


def _start_from(layer: Layer, state: Mapping[str, Any] | None) -> None:
    mask = layer._masking.mask
    if state and mask is not None and mask.learned:
        raise ValueError(
            f"`mask_state` of '{layer.name}' is for binary masks, and its masks are learned: their "
            f"scores are weights. Received: mask={mask!r}"
        )
    layer._masking.state = dict(state or {})
    states.restore(layer, layer._masking.state)


def _name_masks(layer: Layer, mask_bias: bool, initializer: Any, mask: Mask | None) -> None:
    """Makes a layer one whose config names the masks in it; those there already come first."""
    if not isinstance(layer, MaskedLayer):
        masked = [
            path
            for path, owner, name in weights_inside(layer, biases=True)
            if isinstance(owner, MaskedLayer) and name in _paths(owner)
        ]
        _change_class(layer, masked, mask_bias, initializer, mask)


def _add_path(layer: Layer, path: str) -> None:
    paths = _paths(layer) if layer.built else layer._masking.weights
    if paths is not None and path not in paths:
        layer._masking.weights = (*paths, path)


def _paths(layer: Layer) -> list[str]:
    if layer._masking.weights is not None:
        return list(layer._masking.weights)
    return [path for path, *_ in weights_inside(layer, biases=layer._masking.bias)]


def _when_built(layer: Layer, then: Callable[[Layer], None]) -> None:
    if layer.built:
        then(layer)
        return

    def built() -> None:
        if isinstance(layer, MaskedLayer):
            then(layer)

    def restored() -> None:
        if isinstance(layer, MaskedLayer) and weights_inside(layer, biases=True):
            then(layer)

    _keras.call_when_built(layer, built, restored)


def _mask_built(layer: Layer) -> None:
    """Gives a masked layer that was just built exactly the masks that it names."""
    paths = _paths(layer)
    inner = [path for path in paths if "/" in path]
    shared = _masks_by_variable(layer)
    states.check_paths(layer, layer._masking.state)
    for name in paths:
        if "/" not in name:
            _check_mask(layer, layer._masking.mask)
            _attach(layer, name, shared, join(layer.name, name))
    if inner:
        masking = layer._masking
        mask_weights(
            layer,
            inner,
            initializer=masking.initializer,
            mask_bias=masking.bias,
            mask=masking.mask,
            state=masking.state,
            prefix=layer.name,
        )
    # A layer made from the config of a masked one, as the second direction of `Bidirectional` is,
    # may have brought more masks than this one names.
    for path, owner, name in weights_inside(layer, biases=True):
        if path not in paths and mask_of(owner, name) is not None:
            _detach(owner, name)
            owner._masking.weights = tuple(own for own in _paths(owner) if own != name)
    states.restore(layer, layer._masking.state)


def _masks_by_variable(root: Layer) -> dict[int, Mask]:
    found = {}
    for _, layer, name in weights_inside(root, biases=True):
        if (mask := mask_of(layer, name)) is not None:
            found[id(raw_variable(layer, name))] = mask
    return found


def _check_mask(layer: Layer, mask: Mask | None) -> None:
    # What Keras' RNN layers ask of a cell.
    if isinstance(mask, learned.BernoulliMask) and hasattr(layer, "state_size"):
        raise ValueError(
            f"'{layer.name}' ({plain_class(layer).__name__}) is a recurrent cell: it reads its "
            "weights at every time step, and each reading of a BernoulliMask draws again. Use "
            "EdgePopupMask, or leave the layer out: `convert_to_masked(model, exclude=...)`."
        )


def _attach(layer: Layer, name: str, shared: dict[int, Mask], path: str) -> Mask:
    if (mask := mask_of(layer, name)) is not None:
        return mask
    if name not in own_weights(layer, biases=True):
        raise ValueError(
            f"{type(layer).__qualname__} '{layer.name}' has no weight '{name}' that can be masked. "
            f"Those it has: {own_weights(layer, biases=True)}"
        )
    variable, masking = raw_variable(layer, name), layer._masking
    mask = shared.get(id(variable))
    with _keras.unlocked(layer):
        if mask is None:
            if masking.mask is None:
                mask = Mask(initializer=masking.initializer, dtype="float32", name=f"{name}_mask")
            else:
                mask = learned.for_weight(masking.mask, f"{name}_mask", path)
            if name in masking.state:
                mask.restore(states.decoded(layer, name, masking.state, variable.shape))
            with _keras.layer_scope(layer):
                mask.build(variable.shape)
            for own in _keras.own_variables(mask):
                _keras.match_layout(own, variable)
            if variable.regularizer is not None:
                variable.regularizer = MaskedRegularizer(variable.regularizer, mask)
            if variable.constraint is not None:
                variable.constraint = MaskedConstraint(variable.constraint, mask)
            shared[id(variable)] = mask
        setattr(layer, f"{name}_mask", mask)
    if mask.learned:
        frozen = [variable for variable in _keras.own_variables(layer) if variable.trainable]
        for variable in frozen:
            variable.trainable = False
        masking.frozen += frozen
    return mask


def _detach(layer: Layer, name: str) -> None:
    if mask_of(layer, name) is None:
        return
    variable = raw_variable(layer, name)
    if isinstance(variable.regularizer, MaskedRegularizer):
        variable.regularizer = variable.regularizer.plain
    if isinstance(variable.constraint, MaskedConstraint):
        variable.constraint = variable.constraint.plain
    _keras.untrack(layer, f"{name}_mask")
    for variable in layer._masking.frozen:
        variable.trainable = True
    layer._masking.frozen.clear()

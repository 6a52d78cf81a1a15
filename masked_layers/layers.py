"""Masked forms of Keras layers, and the conversion of existing layers.

A masked layer is the original Keras layer plus one `Mask` child per masked weight. Where the
original layer reads `self.kernel`, the masked layer reads `mask(raw kernel)`; nothing else changes.
A composite layer (an RNN with its cell, attention with its projections, a custom block) is masked
if layers inside it are.
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

from masked_layers import _keras, _keras_configs, learned, sets, states
from masked_layers.effective import EffectiveWeight
from masked_layers.maskable import (
    Maskable,
    channel_weights,
    every_own_weight,
    every_weight_inside,
    mask_of,
    maskable,
    own_weights,
    raw_variable,
    weights_inside,
)
from masked_layers.masks import Mask, MaskedConstraint, MaskedRegularizer, raw_view
from masked_layers.paths import graph_layers, join, name_graph, plain_class, resolve, walk
from masked_layers.types import LayerMixin

Layer: TypeAlias = layers.Layer
PACKAGE = "masked_layers"


@dataclasses.dataclass
class _Masking:
    """Masking state of a layer, in a single attribute to leave all other names to the user.

    Attributes:
        weights: Paths, relative to the layer, of the masked weights; None for all kernels.
        bias: Whether biases have masks too.
        initializer: Initializer of binary masks.
        mask: Prototype of the masks; None for binary masks.
        state: Initial states of masks that are not built yet, by path: configs of `MaskState`.
        frozen: Variables of the layer that are not trainable because one of its masks is learned.
    """

    weights: tuple[str, ...] | None
    bias: bool
    initializer: keras.initializers.Initializer
    mask: Mask | None = None
    state: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    frozen: list[keras.Variable] = dataclasses.field(default_factory=list)


class MaskedLayer(LayerMixin):
    """Base class of all masked layers, for `isinstance`.

    Attributes:
        plain_class: Class of the layer without its masks.
    """

    plain_class: type[Layer]
    _masking: _Masking

    def __repr__(self) -> str:
        return f"<{type(self).__qualname__} name={self.name}, built={self.built}>"

    def __reduce__(self) -> tuple[Any, ...]:
        # Keras names a method of the class; pickle could not find a class made here by its name.
        make, arguments = super().__reduce__()
        return _unpickled, (getattr(plain_class(self), make.__name__), arguments)

    def save_own_variables(self, store: Any) -> None:
        """Saves raw values, also of pruned weights, and layers in sets, which Keras leaves out."""
        with raw_view():
            super().save_own_variables(store)
        sets.save(self, store)

    def load_own_variables(self, store: Any) -> None:
        """Loads raw values, and layers in sets."""
        states.check_built(self, self._masking.weights or ())
        own = sets.without(self, store)
        with raw_view():
            super().load_own_variables(own)
        sets.load(self, store)

    def quantize(self: Layer, *args: Any, **kwargs: Any) -> Any:
        """Raises a ValueError, as `Mask.quantize` does: masks would be ignored."""
        if not isinstance(self, MaskedLayer):  # It was stripped; Keras still has this method.
            return type(self).quantize(self, *args, **kwargs)
        return Mask.quantize(*args, **kwargs)

    def _masking_config(self) -> dict[str, Any]:
        masking = self._masking
        config = {
            "masked_weights": None if masking.weights is None else list(masking.weights),
            "mask_bias": masking.bias,
            "mask_initializer": keras.initializers.serialize(masking.initializer),
        }
        if masking.mask is not None:
            config["mask"] = keras.saving.serialize_keras_object(masking.mask)
        # Clones, JSON and `.h5` files contain nothing but the config.
        if not _keras_configs.state_goes_apart():
            plain = masking.mask is None and isinstance(masking.initializer, Ones)
            if found := {**masking.state, **states.configs(self, _paths(self), as_made=plain)}:
                config["mask_state"] = found
        return config


@keras.saving.register_keras_serializable(PACKAGE, "MaskedLayer")
class MaskedByConversion(MaskedLayer):
    """Base of masked classes that are created on demand, for layers without a predefined one.

    They share one registered name. Their config is that of the plain layer plus the paths of its
    masks, so loading a saved model requires only that Keras can find the plain class.
    """

    def get_config(self) -> dict[str, Any]:
        """Returns the config of the plain layer and its masking arguments."""
        names = [layer.name for layer in graph_layers(self)]
        config = {"layer": _plain_config(self), **self._masking_config()}
        return {**config, "layer_names": names} if names else config

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Layer:
        """Creates the plain layer and masks it once it is built."""
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

# Keras layer class -> its masked class, for those that users can construct directly.
MASKED_CLASSES: dict[type[Layer], type[Layer]] = {}


_ABOUT = "a mask over each of its kernels.\n\n    Every forward pass reads `mask(raw weight)`."


def define(base: type[Layer], module: str, about: str = _ABOUT, **methods: Any) -> type[Layer]:
    """Creates the masked class of a Keras layer, which users can construct directly."""

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
    vars(init)["__signature__"] = plain.replace(parameters=parameters)

    @functools.wraps(base.build)
    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        base.build(self, *args, **kwargs)
        self.built = True
        if isinstance(self, MaskedLayer):  # Otherwise it was stripped; Keras still has this method.
            _mask_built(self)

    def get_config(self: Any) -> dict[str, Any]:
        return {**base.get_config(self), **self._masking_config()}

    namespace = {
        "__doc__": f"""`keras.layers.{base.__name__}` with {about}
    In addition to the arguments below, all arguments of `keras.layers.{base.__name__}` are
    accepted.

    Args:
        masked_weights: Weights to mask, by path relative to the layer: `"kernel"`, or
            `"cell/recurrent_kernel"` for a weight of an inner layer. Default: every kernel, or the
            scale of a normalization.
        mask_bias: Whether biases are masked too. Ignored if `masked_weights` is given.
        mask_initializer: Initializer of binary masks; entries other than 0 are kept. Default: ones.
        mask: Kind of the masks, as for `convert_to_masked`. Default: binary.
        mask_state: Initial states of binary masks, by path, in the form in which `get_config`
            returns them. Default: the values from `mask_initializer`.

    Raises:
        ValueError: If `mask` is not a mask. When the layer is built, if `masked_weights` or
            `mask_state` names a weight that the layer does not have, that cannot have this kind
            of mask, or that has another shape.
    """,
        "__module__": module,
        "__init__": init,
        "build": build,
        "get_config": get_config,
        **methods,
    }
    cls = _subclass(MaskedLayer, base, maskable(base), namespace)
    MASKED_CLASSES[base] = keras.saving.register_keras_serializable(PACKAGE, cls.__qualname__)(cls)
    return cls


@functools.cache
def _masked_class(base: type[Layer], spec: Maskable | None) -> type[Layer]:
    """Creates the masked class of a layer class for which `masked_layers.classes` has none.

    Its maskable weights, `spec`, are part of the cache key: a class may be registered later.
    """
    doc = f"`{base.__name__}` with masks over weights of the layer or of layers inside it."
    cls = _subclass(MaskedByConversion, base, spec, {"__doc__": doc})
    return keras.saving.register_keras_serializable(PACKAGE, "MaskedLayer")(cls)


def _subclass(
    kind: type[MaskedLayer], base: type[Layer], spec: Maskable | None, namespace: dict[str, Any]
) -> type[Layer]:
    names = () if spec is None else spec.weights + spec.biases
    # Keras names the entries of a weights file, and layers without a name, after `__name__`. With
    # the name of the plain class, plain and masked models can read each other's files.
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
    # Serialized as an instance of its plain class: Keras and user code use the class of `self`.
    cls = type(layer)
    layer.__class__ = plain_class(layer)
    try:
        config = keras.saving.serialize_keras_object(layer)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"'{layer.name}' cannot be saved with its architecture, because "
            f"{plain_class(layer).__name__} has no `get_config()`. Add one, or save only its "
            "state: `model.save_weights(path)` saves weights and masks."
        ) from error
    finally:
        layer.__class__ = cls
    for key in ("build_config", "compile_config", "shared_object_id"):
        config.pop(key, None)  # These are next to the config of the masked layer.
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
    """Masks weights inside `root`, changing the layers in place.

    Weights that already have a mask keep it, and weights that layers share get one mask. A layer
    that is not built yet gets its masks when it is built.

    Args:
        root: A layer or model.
        paths: Paths of weights, relative to `root`.
        initializer: Initializer of new binary masks.
        mask_bias: The value of `mask_bias` in the configs of the layers.
        mask: Prototype of new masks; None for binary masks.
        state: Initial states of new masks, by path: configs of `MaskState`.
        prefix: Prefix of the paths from which seeds are derived.

    Raises:
        ValueError: If a path does not name a maskable weight, or the weight cannot have this kind
            of mask. `root` is then unchanged.
    """
    cache: dict[int, Any] = {}
    chains = []
    for path in paths:
        try:
            chain = resolve(root, path, cache)
        except KeyError:
            chain = []
        if not chain or chain[-1][0] not in every_own_weight(chain[-1][1]):
            raise ValueError(
                f"'{root.name}' has no weight '{path}' that can be masked. Maskable weights: "
                f"{[path for path, *_ in every_weight_inside(root)]}"
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
    """Masks a layer, and all layers inside it, as soon as it is built.

    Used for layers that create their inner layers when they are built.
    """
    _change_class(layer, None, mask_bias, initializer, mask)
    _when_built(layer, _mask_built)


def make_binary(root: Layer, masks: Mapping[int, np.ndarray]) -> None:
    """Replaces learned masks inside `root` with binary masks and makes weights trainable again.

    Args:
        root: A layer or model, which is changed in place.
        masks: The binary masks, by the id of the raw variable that each of them masks.
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
    """Removes the masks that layers inside `root` got in the scope if it ends with an error."""
    before = {}
    for _, layer in walk(root):
        masking = vars(layer).get("_masking")
        kept = [name for name in every_own_weight(layer) if mask_of(layer, name)]
        copy = masking and dataclasses.replace(masking, frozen=list(masking.frozen))
        before[id(layer)] = (copy, kept)
    try:
        yield
    except BaseException:
        for _, layer in list(walk(root)):
            masking, kept = before.get(id(layer), (None, []))
            if isinstance(layer, MaskedLayer):
                for name in every_own_weight(layer):
                    if name not in kept:
                        _detach(layer, name)
                if masking is None:
                    _restore_class(layer)
                else:
                    layer._masking = masking
        _keras.refresh_parameters(root)
        raise


def unmask(root: Layer, *, besides: Sequence[Layer] = ()) -> None:
    """Removes all masks inside `root` in place without changing raw weights.

    Each masked layer becomes an instance of its plain class again, besides those named.
    """
    for _, layer in list(walk(root)):
        if isinstance(layer, MaskedLayer) and not any(layer is other for other in besides):
            for name in every_own_weight(layer):
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
        base: type = type(layer)
        layer.__class__ = MASKED_CLASSES.get(base) or _masked_class(base, maskable(base))
        _set_masking(layer, masked_weights, mask_bias, initializer, mask)
        _keras.bind_quantize(layer, functools.partial(MaskedLayer.quantize, layer))


def _start_from(layer: Layer, state: Mapping[str, Any] | None) -> None:
    mask = layer._masking.mask
    if state and mask is not None and mask.learned:
        raise ValueError(
            f"`mask_state` of '{layer.name}' is for binary masks, but its masks are learned, and "
            f"their scores are weights. Received: mask={mask!r}"
        )
    layer._masking.state = dict(state or {})
    states.restore(layer, layer._masking.state)


def _name_masks(layer: Layer, mask_bias: bool, initializer: Any, mask: Mask | None) -> None:
    """Gives a layer a masked class, whose config names its masks; existing masks come first."""
    if not isinstance(layer, MaskedLayer):
        masked = [
            path
            for path, owner, name in every_weight_inside(layer)
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
    # A normalization has a mask only where its own class is masked.
    return [
        path
        for path, owner, name in weights_inside(layer, biases=layer._masking.bias, channels=True)
        if isinstance(owner, MaskedLayer) or name not in channel_weights(owner)
    ]


def _when_built(layer: Layer, then: Callable[[Layer], None]) -> None:
    if layer.built:
        then(layer)
        return

    def built() -> None:
        if isinstance(layer, MaskedLayer):
            then(layer)

    def restored() -> None:
        if isinstance(layer, MaskedLayer) and every_weight_inside(layer):
            then(layer)

    _keras.call_when_built(layer, built, restored)


def _mask_built(layer: Layer) -> None:
    """Gives a masked layer that was just built exactly the masks that its state names."""
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
    # An inner layer made from the config of a masked one, as the second direction of
    # `Bidirectional` is, may have more masks than this layer names.
    for path, owner, name in every_weight_inside(layer):
        if path not in paths and mask_of(owner, name) is not None:
            _detach(owner, name)
            owner._masking.weights = tuple(own for own in _paths(owner) if own != name)
    states.restore(layer, layer._masking.state)


def _masks_by_variable(root: Layer) -> dict[int, Mask]:
    found = {}
    for _, layer, name in every_weight_inside(root):
        if (mask := mask_of(layer, name)) is not None:
            found[id(raw_variable(layer, name))] = mask
    return found


def _check_mask(layer: Layer, mask: Mask | None) -> None:
    # Keras' RNN layers require this attribute of a cell.
    if isinstance(mask, learned.BernoulliMask) and hasattr(layer, "state_size"):
        raise ValueError(
            f"'{layer.name}' ({plain_class(layer).__name__}) is a recurrent cell: it reads its "
            "weights at every time step, and a BernoulliMask is sampled again at each read. Use "
            "EdgePopupMask, or leave the layer out: `convert_to_masked(model, exclude=...)`."
        )


def _attach(layer: Layer, name: str, shared: dict[int, Mask], path: str) -> Mask:
    if (mask := mask_of(layer, name)) is not None:
        return mask
    variable, masking = raw_variable(layer, name), layer._masking
    if variable is None or name not in every_own_weight(layer):
        raise ValueError(
            f"{type(layer).__qualname__} '{layer.name}' has no weight '{name}' that can be masked. "
            f"Maskable weights: {every_own_weight(layer)}"
        )
    mask = shared.get(id(variable))
    with _keras.unlocked(layer):
        if mask is None:
            if masking.mask is None or name in channel_weights(layer):
                mask = Mask(initializer=masking.initializer, dtype="float32", name=f"{name}_mask")
            else:
                kernel = name in own_weights(layer)
                mask = learned.for_weight(masking.mask, f"{name}_mask", path, kernel=kernel)
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
    variable = raw_variable(layer, name)
    if variable is None or mask_of(layer, name) is None:
        return
    if isinstance(variable.regularizer, MaskedRegularizer):
        variable.regularizer = variable.regularizer.plain
    if isinstance(variable.constraint, MaskedConstraint):
        variable.constraint = variable.constraint.plain
    _keras.untrack(layer, f"{name}_mask")
    for variable in layer._masking.frozen:
        variable.trainable = True
    layer._masking.frozen.clear()

"""Masked models that read weights past their masks, and copies that compute something else."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import masked_layers as ml
from common import half_masks, numpy
from masked_layers.exactness import check_copy, check_masks

BACKEND = keras.backend.backend()


def data(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


class Transposed(layers.Layer):
    """Ties a decoder to the kernel of `dense`, which it reads with `read`."""

    def __init__(self, dense, read, **kwargs):
        super().__init__(**kwargs)
        self.dense = dense
        self.read = read

    def call(self, x):
        return ops.matmul(x, ops.transpose(self.read(self.dense)))

    def compute_output_shape(self, shape):
        return (*shape[:-1], 12)

    def get_config(self):
        config = {"dense": self.dense, "read": self.read}
        config = {k: keras.saving.serialize_keras_object(v) for k, v in config.items()}
        return {**super().get_config(), **config}

    @classmethod
    def from_config(cls, config):
        made = [keras.saving.deserialize_keras_object(config.pop(key)) for key in ("dense", "read")]
        return cls(*made, **config)


def first_weight(dense):
    return dense.weights[0]


def private_attribute(dense):
    return dense._kernel


def trainable_weight(dense):
    return dense.trainable_weights[0]


def tensor_of_a_weight(dense):
    return ops.convert_to_tensor(dense.variables[0])


def attribute(dense):
    return dense.kernel


def shape_of_a_weight(dense):
    return dense.kernel * float(np.prod(dense.weights[0].shape) > 0)


def tied(read):
    x = keras.Input((12,))
    encoder = layers.Dense(6, "relu", name="encoder")
    return keras.Model(x, Transposed(encoder, read, name="decoder")(encoder(x)))


def state(model):
    return (
        [type(layer) for layer in model._flatten_layers()],
        [variable.path for variable in model.variables],
        [numpy(variable).tobytes() for variable in model.variables],
    )


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize(
    "read", [first_weight, private_attribute, trainable_weight, tensor_of_a_weight]
)
def test_a_layer_that_reads_past_the_mask_is_named_and_the_model_unchanged(read, inplace):
    model = tied(read)
    before = state(model)
    reason = (
        r"'decoder' \(Transposed\) reads 'encoder/kernel' past its mask(.|\n)*exclude='encoder'"
    )
    with pytest.raises(ValueError, match=reason):
        ml.convert_to_masked(model, inplace=inplace)
    assert state(model) == before
    with pytest.raises(ValueError, match="Nothing to mask"):
        ml.convert_to_masked(model, exclude="encoder", inplace=inplace)


class TransposedInInference(Transposed):
    def call(self, x, training=None):
        kernel = self.dense.kernel if training else self.read(self.dense)
        return ops.matmul(x, ops.transpose(kernel))


def test_a_reader_in_inference_is_found_behind_a_layer_that_trains_by_default():
    x = keras.Input((4, 4, 3))
    encoder = layers.Dense(6, name="encoder")
    decoder = TransposedInInference(encoder, first_weight, name="decoder")
    flat = layers.Reshape((12,))(layers.RandomFlip()(x)[:, :2, :2])
    with pytest.raises(ValueError, match=r"^'decoder' .* reads 'encoder/kernel' past its mask"):
        ml.convert_to_masked(keras.Model(x, decoder(encoder(flat))))


def test_masks_that_were_there_before_a_refusal_stay():
    model = tied(first_weight)
    hidden = layers.Dense(3, name="hidden", kernel_regularizer="l2")
    model = keras.Model(model.inputs, hidden(model.outputs[0]))
    ml.convert_to_masked(model, include="hidden", inplace=True)
    half_masks(model)
    before, masks = state(model), ml.get_masks(model)
    with pytest.raises(ValueError, match="past its mask"):
        ml.convert_to_masked(model, inplace=True)
    assert state(model) == before
    assert ml.get_masks(model).keys() == masks.keys() == {"hidden/kernel"}
    np.testing.assert_array_equal(ml.get_masks(model)["hidden/kernel"], masks["hidden/kernel"])


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("read", [attribute, shape_of_a_weight])
def test_readers_of_the_attribute_are_taken(read, inplace):
    masked = ml.convert_to_masked(tied(read), inplace=inplace)
    half_masks(masked)
    stripped = ml.strip_masks(masked)
    np.testing.assert_array_equal(numpy(stripped(data(4, 12))), numpy(masked(data(4, 12))))


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_stripping_a_model_made_by_hand_with_a_reader_past_the_mask(inplace):
    x = keras.Input((12,))
    encoder = ml.MaskedDense(6, name="encoder")
    model = keras.Model(x, Transposed(encoder, first_weight, name="decoder")(encoder(x)))
    half_masks(model)
    before = state(model)
    with pytest.raises(ValueError, match=r"'decoder' \(Transposed\) reads 'encoder/kernel'"):
        ml.strip_masks(model, inplace=inplace)
    assert state(model) == before


class Holder(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(3)

    def build(self, shape):
        self.dense.build(shape)
        self.taken = self.take()

    def call(self, x):
        return ops.matmul(self.dense(x), self.taken)


class Copied(Holder):
    def take(self):
        return ops.convert_to_tensor(numpy(self.dense.kernel) * 2)


class Captured(Holder):
    def take(self):
        return self.dense._kernel.value


def held(cls):
    return keras.Sequential([keras.Input((3,)), cls(name="holder")])


def test_a_tensor_taken_before_the_weights_had_their_values():
    with pytest.raises(ValueError, match=r"other outputs(.|\n)*\['Copied'\](.|\n)*inplace=True"):
        ml.convert_to_masked(held(Copied))


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_a_tensor_that_is_the_memory_of_a_weight(inplace):
    if BACKEND == "jax":  # The value never changes there, because it is a constant.
        inplace, reason = False, "other outputs"
    else:
        reason = r"\['Captured'\](.|\n)* reads 'holder/dense/kernel' past its mask"
    with pytest.raises(ValueError, match=reason):
        ml.convert_to_masked(held(Captured), inplace=inplace)


def test_an_argument_that_a_config_forgets():
    class Forgetful(layers.Layer):
        def __init__(self, factor=1.0, **kwargs):
            super().__init__(**kwargs)
            self.factor = factor

        def call(self, x):
            return x * self.factor

        def get_config(self):
            return super().get_config()

    model = keras.Sequential([keras.Input((3,)), Forgetful(2.0), layers.Dense(2)])
    with pytest.raises(ValueError, match=r"other outputs(.|\n)*\['Forgetful'\]"):
        ml.convert_to_masked(model)
    ml.convert_to_masked(model, inplace=True)


def test_a_function_that_holds_a_layer_of_the_model():
    x = keras.Input((12,))
    encoder = layers.Dense(6, name="encoder")
    decode = layers.Lambda(lambda y: ops.matmul(y, ops.transpose(encoder.kernel)), name="decode")
    model = keras.Model(x, decode(encoder(x)))
    with pytest.raises(
        ValueError, match=r"'decode' \(Lambda\) reads 'encoder/kernel\S*' of the original"
    ):
        ml.convert_to_masked(model)
    ml.convert_to_masked(model, inplace=True)
    half_masks(model)
    kernel = numpy(encoder.kernel)
    np.testing.assert_allclose(
        numpy(model(data(4, 12))), data(4, 12) @ kernel @ kernel.T, atol=1e-5
    )
    with pytest.raises(
        ValueError, match=r"'decode' \(Lambda\) reads 'encoder/kernel\S*' of the original"
    ):
        ml.strip_masks(model)


def test_an_operation_of_a_graph_that_takes_a_variable():
    x = keras.Input((12,))
    encoder = layers.Dense(6, name="encoder")
    encoder(x)
    model = keras.Model(x, [encoder(x), ops.matmul(x, encoder.kernel)])
    with pytest.raises(ValueError, match=r"'matmul\w*' takes the variable '.*encoder/kernel'"):
        ml.convert_to_masked(model)
    with pytest.raises(ValueError, match=r"\(Functional\) reads 'encoder/kernel' past its mask"):
        ml.convert_to_masked(model, inplace=True)


def compiled(function, **kwargs):
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function)
    import jax

    return jax.jit(function, **kwargs)


class Inner(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(4)

    def build(self, shape):
        self.dense.build(shape)

    def compute_output_shape(self, shape):
        return (*shape[:-1], 4)


def compiled_layers():
    if BACKEND == "torch":
        return []

    class OfTheClass(Inner):
        call = compiled(lambda self, x: self.dense(x), static_argnums=0)

    class OfTheInstance(Inner):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.forward = compiled(lambda x: self.dense(x))

        def call(self, x):
            return self.forward(x)

    return [OfTheClass, OfTheInstance]


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("cls", compiled_layers())
def test_a_call_that_is_compiled(cls, inplace):
    """TensorFlow recompiles it with the masks. On JAX they would be constants."""
    model = keras.Sequential([keras.Input((3,)), cls(name="inner")])
    plain = numpy(model(data(5, 3)))  # Compiled now, for this model.
    if BACKEND == "jax":
        with pytest.raises(ValueError, match="'inner/dense/kernel' past its mask"):
            ml.convert_to_masked(model, inplace=inplace)
        np.testing.assert_array_equal(numpy(model(data(5, 3))), plain)
        return
    masked = ml.convert_to_masked(model, inplace=inplace)
    np.testing.assert_array_equal(numpy(masked(data(5, 3))), plain)
    ml.set_masks(masked, {p: np.zeros_like(m) for p, m in ml.get_masks(masked).items()})
    assert not numpy(masked(data(5, 3))).any()
    stripped = ml.strip_masks(masked, inplace=inplace)
    assert not numpy(stripped(data(5, 3))).any()
    stripped.set_weights([np.ones_like(weight) for weight in stripped.get_weights()])
    assert numpy(stripped(data(5, 3))).any()


# --- What must not be refused, and must not move --------------------------------------------------


class Noisy(layers.Layer):
    """Random and stateful in inference, like a sampling layer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed = keras.random.SeedGenerator(3)

    def build(self, shape):
        self.calls = self.add_weight(name="calls", shape=(), dtype="int32", trainable=False)

    def call(self, x):
        self.calls.assign_add(1)
        return x + keras.random.normal(ops.shape(x), seed=self.seed)


def test_the_state_of_a_model_does_not_move():
    model = keras.Sequential([keras.Input((3,)), Noisy(), layers.Dense(2)])
    before = state(model)
    for inplace in (False, True):
        masked = ml.convert_to_masked(model, inplace=inplace)
        if not inplace:
            assert state(model) == before
    plain = [variable for variable in masked.variables if "mask" not in variable.path]
    assert [numpy(variable).tobytes() for variable in plain] == before[2]
    stripped = ml.strip_masks(masked)
    assert state(stripped)[2] == before[2]


def test_outputs_that_differ_from_call_to_call_are_not_a_reason():
    class Random(layers.Layer):
        def call(self, x):
            return x * np.random.default_rng().random()

    model = keras.Sequential([keras.Input((3,)), Random(), layers.Dense(2)])
    ml.strip_masks(ml.convert_to_masked(model))


def test_layers_that_a_call_does_not_use_are_no_reason():
    class Partly(Inner):
        def build(self, shape):
            super().build(shape)
            self.unused = layers.Dense(2)
            self.unused.build(shape)

        def call(self, x):
            return self.dense(x)

    for inplace in (False, True):
        masked = ml.convert_to_masked(
            keras.Sequential([keras.Input((3,)), Partly()]), inplace=inplace
        )
        assert len(ml.get_masks(masked)) == 2


class Block(Inner):
    def build(self, shape):
        super().build(shape)
        self.table = layers.Embedding(7, 4)
        self.table.build()

    def call(self, tokens):
        return ops.matmul(self.dense(self.table(tokens)), ops.transpose(self.table.embeddings))


class TokenBlock(Block):
    def build(self, shape):
        super().build((*shape, 4))


def test_free_sizes_and_tokens_are_made_up():
    tokens = keras.Input((None,), dtype="int32")
    image = keras.Input((None, None, 3))
    x = TokenBlock()(tokens)
    y = layers.GlobalAveragePooling2D()(Convolutions()(image))
    model = keras.Model({"tokens": tokens, "image": image}, [x, y])
    masked = ml.convert_to_masked(model)
    half_masks(masked)
    ml.strip_masks(masked)


class Convolutions(layers.Layer):
    def build(self, shape):
        self.first = layers.Conv2D(4, 7, strides=4)
        self.first.build(shape)
        self.second = layers.Conv2D(4, 5)
        self.second.build((None, None, None, 4))

    def call(self, x):
        return self.second(self.first(x))  # Needs 23 pixels.

    def compute_output_shape(self, shape):
        return (shape[0], None, None, 4)


def test_a_subclassed_model_that_has_no_inputs_is_not_checked():
    class Unknown(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(4)

        def call(self, x, y):
            return self.dense(x + y)

    model = Unknown()
    model(data(2, 3), data(2, 3))
    ml.convert_to_masked(model, inplace=True)


def test_learned_masks_are_checked_too():
    with pytest.raises(ValueError, match=r"'decoder' \(Transposed\) reads 'encoder/kernel'"):
        ml.convert_to_masked(tied(first_weight), mask="edge_popup")
    ml.convert_to_masked(tied(attribute), mask="edge_popup")


def test_the_checks_by_themselves():
    """Finds everything that a conversion would have refused, and nothing else."""
    good, other = tied(attribute), tied(attribute)
    check_copy(good, good)
    with pytest.raises(ValueError, match="other outputs"):
        check_copy(good, other)
    check_masks(good)

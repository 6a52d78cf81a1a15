"""Ticket files: what they keep, on every backend, and what is refused."""

import base64
import contextlib
import json
import math
import zlib

import keras
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from keras import layers

import masked_layers as ml
import pages
from lottery_ticket_pruner import LotteryTicketPruner
from masked_layers import _keras_configs, streams, ticket_files, ticket_format
from masked_layers.classes import MaskedDense

RNG = np.random.default_rng(0)


def pruned(model, density=0.3, **kwargs):
    model = ml.convert_to_masked(model, **kwargs)
    ml.set_masks(model, {p: RNG.random(m.shape) < density for p, m in ml.get_masks(model).items()})
    return model


def perceptron(units=(16, 3), **kwargs):
    return keras.Sequential([keras.Input((8,)), *(layers.Dense(n, **kwargs) for n in units)])


def mixed():
    """Returns a model with states of many kinds: statistics, random numbers, a shared layer."""
    inputs = keras.Input((6, 4))
    x = layers.GRU(5, dropout=0.2, return_sequences=True)(layers.Dropout(0.5)(inputs))
    x = layers.LayerNormalization()(layers.BatchNormalization()(x))
    shared = layers.Dense(5)
    x = layers.MultiHeadAttention(2, 3)(shared(shared(x)), x)
    model = keras.Model(inputs, layers.Dense(2)(x))
    for variable in model.trainable_variables:
        variable.assign(RNG.normal(size=variable.shape))
    return model


def values(model):
    return {
        path: np.array(keras.ops.convert_to_numpy(variable if mask is None else mask(variable)))
        for path, (variable, mask) in ticket_files._state(model).items()
    }


def same(model, loaded):
    """Checks that everything but the raw values of pruned weights is the same, bit for bit."""
    before, after = values(model), values(loaded)
    assert before.keys() == after.keys()
    for path, value in before.items():
        assert value.dtype == after[path].dtype, path
        assert value.tobytes() == after[path].tobytes(), path
    masks = ml.get_masks(loaded)
    for path, mask in ml.get_masks(model).items():
        np.testing.assert_array_equal(masks[path], mask)


@pytest.mark.parametrize("kwargs", [{}, {"mask_bias": True, "mask_normalization": True}])
def test_a_loaded_ticket_is_the_same_model(kwargs, tmp_path):
    model = pruned(mixed(), **kwargs)
    model.compile("adam", "mse")
    ml.save_ticket(model, tmp_path / "ticket.safetensors")
    loaded = ml.load_ticket(tmp_path / "ticket.safetensors")
    same(model, loaded)
    x = RNG.normal(size=(3, 6, 4)).astype("float32")
    expected, outputs = (keras.ops.convert_to_numpy(each(x)) for each in (model, loaded))
    assert outputs.tobytes() == expected.tobytes()
    for ref in ml.masked_refs(loaded):
        raw, mask = keras.ops.convert_to_numpy(ref.variable), ref.mask.to_numpy()
        assert not raw[~mask].any(), ref.path


def test_unusual_values_stay_as_they_are(tmp_path):
    model = pruned(perceptron(), density=0.5)
    ref = ml.masked_refs(model)[0]
    odd = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45], "float32")
    ref.variable.assign(np.resize(odd, ref.variable.shape))
    ml.set_masks(model, {"dense_1/kernel": np.zeros((16, 3), bool)})  # Nothing is left.
    ml.save_ticket(model, tmp_path / "ticket")
    same(model, ml.load_ticket(tmp_path / "ticket"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "mixed_bfloat16", "float64"])
def test_dtypes(dtype, tmp_path):
    model = pruned(perceptron(dtype=dtype))
    ml.save_ticket(model, tmp_path / "ticket")
    loaded = ml.load_ticket(tmp_path / "ticket")
    same(model, loaded)
    assert loaded.layers[0].dtype_policy.name == dtype


def test_frozen_values_and_rescaling(tmp_path):
    model = pruned(perceptron())
    first, second = ml.masked_refs(model)
    first.mask.freeze(RNG.normal(size=(8, 16)))  # float64, in a float32 layer.
    ml.set_rescale(model, {second.path: True})
    ml.save_ticket(model, tmp_path / "ticket")
    loaded = ml.load_ticket(tmp_path / "ticket")
    same(model, loaded)
    assert [ref.mask.rescale for ref in ml.masked_refs(loaded)] == [False, True]
    assert [ref.mask.frozen is None for ref in ml.masked_refs(loaded)] == [False, True]
    loaded.compile("adam", "mse")
    loaded.fit(RNG.normal(size=(4, 8)), np.zeros((4, 3)), verbose=0)
    with pytest.raises(ValueError, match=r"'dense/kernel' are frozen at values.*signs_only"):
        ml.save_ticket(model, tmp_path / "signs", signs_only=True)


def test_signs_fit_weights_of_any_seed(tmp_path):
    model = pruned(perceptron())
    model.layers[0].bias.assign(np.ones(16))
    ml.save_ticket(model, tmp_path / "signs", signs_only=True)
    found = []
    for seed in (0, 0, 1):
        keras.utils.set_random_seed(seed)
        drawn = ml.load_ticket(tmp_path / "signs")
        found.append(values(drawn))
        keras.utils.set_random_seed(seed)
        fresh = pruned(perceptron())
        ml.set_masks(fresh, ml.get_masks(model))
        for path, value in values(fresh).items():
            sign = np.sign(values(model)[path]) if "kernel" in path else 1
            np.testing.assert_array_equal(found[-1][path], sign * np.abs(value))
    assert found[0]["dense/kernel"].tobytes() == found[1]["dense/kernel"].tobytes()
    assert found[0]["dense/kernel"].tobytes() != found[2]["dense/kernel"].tobytes()


@pytest.mark.slow("jax")
def test_recorded_weights_are_saved_in_place_of_current_ones(tmp_path):
    model = pruned(mixed())
    pruner = LotteryTicketPruner(model)
    for variable in model.trainable_variables:
        variable.assign(np.zeros(variable.shape))
    ml.save_ticket(model, tmp_path / "ticket", weights=pruner.initial_weights)
    assert not any(value.any() for path, value in values(model).items() if "kernel" in path)
    pruner.rewind()
    same(model, ml.load_ticket(tmp_path / "ticket"))


def test_goals_of_sizes(tmp_path):
    model = ml.convert_to_masked(
        keras.Sequential(
            [keras.Input((784,)), layers.Dense(300), layers.Dense(100), layers.Dense(10)]
        )
    )
    masks, stored = {}, 0
    for ref in ml.masked_refs(model):
        value = np.abs(keras.ops.convert_to_numpy(ref.variable))
        masks[ref.path] = value > np.quantile(value, 0.988)
        stored += 4 * np.count_nonzero(masks[ref.path])
    ml.set_masks(model, masks)
    ml.save_ticket(model, tmp_path / "ticket")
    ml.save_ticket(model, tmp_path / "signs", signs_only=True)
    size = sum(mask.size for mask in masks.values())
    entropy = -size * (0.012 * math.log2(0.012) + 0.988 * math.log2(0.988)) / 8
    assert (tmp_path / "ticket").stat().st_size < stored + entropy
    assert (tmp_path / "signs").stat().st_size < 0.02 * size


def test_what_layers_derive_from_their_variables(tmp_path):
    class Doubling(layers.Layer):
        """Doubles its weight when it is built or loaded."""

        def build(self, shape):
            self.factor = self.add_weight(shape=shape[1:], initializer="ones")
            self.double = None

        def load_own_variables(self, store):
            super().load_own_variables(store)
            self.double = 2 * keras.ops.convert_to_numpy(self.factor)

        def call(self, x):
            return x if self.double is None else x * keras.ops.convert_to_tensor(self.double)

    normalization, doubling = layers.Normalization(), Doubling()
    normalization.adapt(RNG.normal(size=(20, 8)) * 3 + 1)
    dense = layers.Dense(3)
    model = keras.Sequential([keras.Input((8,)), normalization, doubling, dense])
    dense.enable_lora(2)
    dense.lora_kernel_b.assign(RNG.normal(size=(2, 3)))
    doubling.load_own_variables({"0": RNG.normal(size=8)})
    model = pruned(model, inplace=True)
    x = RNG.normal(size=(4, 8)).astype("float32")
    with keras.saving.custom_object_scope({"Doubling": Doubling}):
        ml.save_ticket(model, tmp_path / "ticket")
        loaded = ml.load_ticket(tmp_path / "ticket")
    same(model, loaded)
    expected, outputs = (keras.ops.convert_to_numpy(each(x)) for each in (model, loaded))
    assert outputs.tobytes() == expected.tobytes()


# --- What is refused ------------------------------------------------------------------------------


def test_what_cannot_be_saved_is_refused_and_leaves_files_as_they_are(tmp_path):
    (tmp_path / "ticket").write_bytes(b"earlier")
    inputs = keras.Input((8,))
    code = keras.Model(inputs, layers.Dense(3)(layers.Lambda(lambda x: x + 1)(inputs)))
    model = pruned(perceptron())
    for wrong, error, message, kwargs in (
        ("model", TypeError, "Expected a `keras.Model`", {}),
        (perceptron(), ValueError, "no masked weight", {}),
        (ml.convert_to_masked(perceptron(), mask="bernoulli"), ValueError, "learned.*harden", {}),
        (ml.convert_to_masked(code), ValueError, "cannot be saved as a ticket.*[Ll]ambda", {}),
        (model, ValueError, "does not have: .'nowhere'", {"weights": {"nowhere": np.ones(3)}}),
        (model, ValueError, r"shape \(3,\)", {"weights": {"dense_1/bias": np.ones(4)}}),
        (model, TypeError, "must be a dict from paths.*list", {"weights": model.get_weights()}),
    ):
        with pytest.raises(error, match=message):
            ml.save_ticket(wrong, tmp_path / "ticket", **kwargs)
    assert [file.name for file in tmp_path.iterdir()] == ["ticket"]
    assert (tmp_path / "ticket").read_bytes() == b"earlier"
    with pytest.raises(FileNotFoundError):
        ml.load_ticket(tmp_path / "nowhere")


class Counting(layers.Layer):
    """Saves a number that is not a variable."""

    def save_own_variables(self, store):
        store["count"] = np.ones(())

    def call(self, x):
        return x


class FromValue(layers.Layer):
    def build(self, shape):
        self.factor = keras.Variable(np.ones(shape[-1]), dtype="float32")

    def call(self, x):
        return x * self.factor


def test_state_that_a_ticket_does_not_contain_is_refused(tmp_path):
    stateful = keras.Sequential([keras.Input((5, 8), batch_size=2), layers.GRU(4, stateful=True)])
    cases = [(stateful, r"'gru' \(GRU\) cannot be saved in a ticket: it is stateful")]
    for layer, message in (
        (Counting(), r"'counting' \(Counting\) .* it saves more than its variables"),
        (FromValue(), "a layer makes a variable from a value, and not by `add_weight`"),
    ):
        cases.append((keras.Sequential([keras.Input((8,)), layer, layers.Dense(3)]), message))
    with keras.saving.custom_object_scope({"Counting": Counting, "FromValue": FromValue}):
        for model, message in cases:
            with pytest.raises(ValueError, match=message):
                ml.save_ticket(ml.convert_to_masked(model), tmp_path / "ticket")
    assert not list(tmp_path.iterdir())


@pytest.mark.once
def test_only_vocabularies_in_the_config_are_saved(tmp_path):
    def made(**kwargs):
        return layers.TextVectorization(10, output_sequence_length=4, **kwargs)

    def model(words):
        table = layers.Embedding(10, 4)
        stack = [keras.Input((), dtype="string"), words, table, layers.Flatten(), layers.Dense(3)]
        return pruned(keras.Sequential(stack))

    adapted = made()
    adapted.adapt(["red", "green green"])
    with pytest.raises(ValueError, match=r"'text_vectorization'.*such as an adapted vocabulary"):
        ml.save_ticket(model(adapted), tmp_path / "ticket")
    given = model(made(vocabulary=adapted.get_vocabulary(include_special_tokens=False)))
    ml.save_ticket(given, tmp_path / "ticket")
    x = keras.ops.convert_to_tensor(["green red blue"])
    outputs, expected = (m(x) for m in (ml.load_ticket(tmp_path / "ticket"), given))
    np.testing.assert_array_equal(outputs, expected)


def test_the_missing_class_is_named(tmp_path):
    with keras.saving.custom_object_scope({"FromNowhere": type("FromNowhere", (layers.ReLU,), {})}):
        layer = keras.saving.get_registered_object("FromNowhere")()
        model = pruned(keras.Sequential([keras.Input((8,)), layer, layers.Dense(3)]))
        ml.save_ticket(model, tmp_path / "ticket")
    with pytest.raises(ValueError, match=r"Could not locate class 'FromNowhere'.*imported first"):
        ml.load_ticket(tmp_path / "ticket")


@pytest.mark.once
@pytest.mark.parametrize("signs_only", [False, True])
def test_every_damage_is_found(signs_only, tmp_path):
    model = pruned(keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.Dense(2)]))
    path = tmp_path / "ticket"
    ml.save_ticket(model, path, signs_only=signs_only)
    data = path.read_bytes()
    damaged = [data[:length] for length in range(0, len(data), 3)] + [data + b"\0"]
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytes([data[position] ^ 1 << bit])
            damaged.append(data[:position] + flipped + data[position + 1 :])
    for content in damaged:
        with pytest.raises(Exception):  # noqa: B017, PT011
            ticket_format.unpack(content)
    for content in damaged[::97]:
        path.write_bytes(content)
        with pytest.raises(
            ml.FileContentError, match="ticket' is not a ticket file, or is cut short or"
        ):
            ml.load_ticket(path)


def crafted(path, change=None, *, masks=None, config=None, **more):
    """Rewrites a ticket with other contents, which its checksum fits."""
    data = path.read_bytes()
    tensors = {name: bytes(about["data"]) for name, about in safetensors.deserialize(data)}
    listed = json.loads(zlib.decompress(tensors["model"]))
    if change is not None:
        listed["weights"][0].update(change)
    if config is not None:
        config(listed["config"])
    tensors["model"] = zlib.compress(json.dumps(listed).encode())
    tensors |= {} if masks is None else {"masks": masks}
    tensors |= more
    metadata = {
        "format": ticket_format.FORMAT,
        "version": ticket_format.VERSION,
        "kind": "signs" if "signs" in tensors else "values",
        "crc32": ticket_format._checksum(tensors),
    }
    arrays = {name: np.frombuffer(data, np.uint8) for name, data in tensors.items()}
    path.write_bytes(safetensors.numpy.save(arrays, metadata))


HUGE = 10**12
ALL_SKIPS = zlib.compress(b"\xff" * 10**6)


def huge_layer(config):
    config["config"]["layers"][-1]["config"]["units"] = HUGE


@pytest.mark.once
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"change": {"shape": [8, HUGE]}}, "masks cover [0-9]+ of 8000000000048"),
        ({"change": {"shape": [8, 16, -1]}}, "shape"),
        ({"change": {"shape": [2**62, 0]}}, "shape"),
        ({"change": {"shape": [HUGE], "masked": False}}, "masks cover|bytes for"),
        ({"change": {"dtype": "object"}}, "unknown dtype 'object'"),
        ({"change": {"dtype": ["float32"]}}, "unknown dtype"),
        ({"change": {"dtype": "int8"}}, "contains"),
        ({"change": {"frozen": "float32"}}, "bytes for"),
        ({"change": {"path": "dense_1/kernel"}}, "two weights have the same path"),
        ({"masks": ALL_SKIPS}, "does not end where expected"),
        ({"masks": zlib.compress(b"\xff")}, "does not end where|masks cover 255 of 176"),
        ({"masks": zlib.compress(b"")}, "does not end where expected"),  # Nothing is kept.
        ({"masks": b""}, "does not end where expected"),
        ({"values/float32": ALL_SKIPS}, "does not end where expected"),
        ({"values/float32": zlib.compress(b"123")}, "3 bytes for"),
        ({"values/int8": zlib.compress(b"123")}, "contains"),
        ({"change": {"path": "other/kernel"}}, "no weight 'other/kernel'"),
        ({"change": {"shape": [16, 8]}}, r"shape \(8, 16\), not \(16, 8\)"),
        ({"config": huge_layer}, r"shape \(16, 1000000000000\), not \(16, 3\)"),
        ({"config": lambda config: config.update(class_name="Nothing")}, "Nothing"),
        ({"config": dict.clear}, "cannot be made from its config"),
    ],
)
def test_crafted_files_are_refused_before_memory_is_allocated(content, message, tmp_path):
    path = tmp_path / "ticket"
    model = keras.Sequential([keras.Input((8,)), layers.Dense(16), layers.Dense(3)])
    ml.save_ticket(pruned(model), path)
    crafted(path, **content)
    with pytest.raises(ml.FileContentError, match=message):
        ml.load_ticket(path)


@pytest.mark.once
def test_files_of_other_kinds_are_named(tmp_path):
    path = tmp_path / "other"
    arrays = {"a": np.ones(3, "float32")}
    for content, message in (
        (safetensors.numpy.save(arrays), "metadata do not name the format of a ticket"),
        (
            safetensors.numpy.save(arrays, {"format": ticket_format.FORMAT, "version": "2"}),
            "version '2' of the format, and this library reads version '1'",
        ),
        (b"PK\x03\x04" + bytes(100), "other' is not a ticket file"),
        (b"", "other' is not a ticket file"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            ml.load_ticket(path)


# --- Files of other backends and versions ---------------------------------------------------------

# Written on JAX by the first version of the format.
MADE_ON_JAX = (
    "aAEAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJmb3JtYXQiOiJtYXNrZWRfbGF5ZXJzIHRpY2tldCIsInZlcnNpb24i"
    "OiIxIiwia2luZCI6InZhbHVlcyIsImNyYzMyIjoiNzE0M2RiOWYifSwibWFza3MiOnsiZHR5cGUiOiJVOCIsInNo"
    "YXBlIjpbMjFdLCJkYXRhX29mZnNldHMiOlswLDIxXX0sIm1vZGVsIjp7ImR0eXBlIjoiVTgiLCJzaGFwZSI6WzU3"
    "MF0sImRhdGFfb2Zmc2V0cyI6WzIxLDU5MV19LCJ2YWx1ZXMvZmxvYXQzMiI6eyJkdHlwZSI6IlU4Iiwic2hhcGUi"
    "Ols5Nl0sImRhdGFfb2Zmc2V0cyI6WzU5MSw2ODddfSwidmFsdWVzL3VpbnQzMiI6eyJkdHlwZSI6IlU4Iiwic2hh"
    "cGUiOls0MF0sImRhdGFfb2Zmc2V0cyI6WzY4Nyw3MjddfX0gICB42mJkZGQAAmYAAAAA//8DAAAgAAd42uxWTW/b"
    "MAz9Lzob6ZZ0lxx2KjAMWNEC2y4LAoO2GUeoLLn62JoG+e+jbCXxh5p1bYH20KNJkXzkIx+8ZbmSK16y+ZZVqnAC"
    "2ZzdoAbDEpYLMCaVUHnjd7x1KC0H4T2HoOA1FQjvsBq4hMynsdphwgq7qfHf2S9+0LNrJXi+iaVfCQV2NmW7hGks"
    "ubGosQix0glBdgEb1IbNF8NSk+AZVPwqa2e/eVevYAY2X6dmDR71wudOzpeHNg5AEmZq0IZMKxCG+tRQllgcPkOR"
    "O3qoasuVpLG1vodb6ACvwNyQt0U+aXDjeGYoCUBkWvCqRDjJLfEwSxjklv8G3z1FahSOMjqDacapboBFICSKlFMQ"
    "rRa/JzpGGCcd7wjwF6G0sj8lXyld9SAb9IQ0FDLu2U7hjqYYLMrZvulESx7wMyD+Qq1MF9qJUmEe5HYCdFusBdyA"
    "iNhDBCU3Dem2FzA23zqgM75veEn3kFpXWLs/yMu153ARkrNl6wvMhR1vLE+fypXExw0l5uhfyOfL5mt/EJnjokiP"
    "i9CSP7jpXe/gTinFhVY1bUvsHApyveqxabD08WHyKQnr/pG0R3E6stDu6c1+McnJ3oLkTAeSI7hE0O+i8y46b0N0"
    "ZiQ6y/3LuCg9AOfxmsaOc9yyGuza/w+chYmSSISAcwIT+6tpO2zvxMtDyJCNM8yS6f9kgLOGxk58JLrz3t9RWqIk"
    "Rq3SqbFe6I7R3dqO9qwfnA2LxaDulru/AAAA//8DAD1a4Bh42mJggAAAAAAA//9iYAACAAAAAP//YmCAAAAAAAD/"
    "/2JgAAIAAAAA//9qYGhIaHBQaAAAAAD//2JoaFA4AAAAAP//stsPAvZ2AAAAAP//YrCzt7cDAAAA//8DAIkGChF4"
    "2mJkAAAAAP//YmAAAAAA//9iYAAAAAD//2JgAAAAAP//AwAAEAAC"
)
OUTPUTS = [[0.625, 0.703125], [0.625, 0.375]]


def test_a_file_of_another_backend_and_an_earlier_version(tmp_path):
    (tmp_path / "ticket").write_bytes(base64.b64decode(MADE_ON_JAX))
    model = ml.load_ticket(tmp_path / "ticket")
    outputs = model(np.arange(-4, 4).reshape(2, 4) * 0.5)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(outputs), OUTPUTS)
    assert [layer.name for layer in model.layers] == ["a", "drop", "b"]
    ml.save_ticket(model, tmp_path / "again")
    same(model, ml.load_ticket(tmp_path / "again"))


@pytest.mark.once
def test_the_page_on_ticket_files_runs_and_its_reader_finds_the_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = pruned(mixed(), mask_bias=True)
    names = {"model": model}
    use, reader = (code for _, code in pages.blocks("ticket-files.md"))
    pages.run("ticket-files.md", use, names)
    same(model, names["model"])
    arrays = pages.run("ticket-files.md", reader, {})["arrays"]
    assert arrays.keys() == values(model).keys()
    for path, value in values(model).items():
        np.testing.assert_array_equal(arrays[path], value)
    assert "keras" not in reader
    assert "safetensors" not in reader.replace("ticket.safetensors", "")


def test_variables_made_last_have_no_memory_before_the_end():
    """Keras creates variables without values in a `StatelessScope`, and lists them."""
    huge, config = perceptron((10,)).get_config(), perceptron((10,)).get_config()
    huge["layers"][1]["config"]["units"] = HUGE
    huge["layers"][1].pop("build_config")
    with contextlib.suppress(LookupError), _keras_configs.variables_made_last():
        assert keras.Sequential.from_config(huge).count_params() == 9 * HUGE
        raise LookupError
    with _keras_configs.variables_made_last(keep=False):
        keras.Sequential.from_config(huge)
    with _keras_configs.variables_made_last():
        model = keras.Sequential.from_config(config)
    assert keras.ops.convert_to_numpy(model.weights[0]).any()
    assert model.predict_on_batch(np.zeros((2, 8))).shape == (2, 10)


# --- Streams --------------------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize("density", [0, 0.001, 0.2, 0.9, 1])
def test_gaps_against_one_by_one_decoding(density):
    kept = RNG.random(5000) < density
    positions = np.flatnonzero(kept)
    behind = len(kept) - 1 - (positions[-1] if len(positions) else -1)
    gaps = streams.gaps_between(positions, behind)
    decoded = []
    for gap in gaps.tolist():
        decoded += [False] * gap + [True] * (gap < 255)
    assert 0 <= len(kept) - len(decoded) < 255
    np.testing.assert_array_equal(decoded + [False] * (len(kept) - len(decoded)), kept)
    parts = list(streams.positions_of(gaps))
    np.testing.assert_array_equal(np.concatenate(parts) if parts else [], positions)
    assert streams.extent(gaps) == (len(positions), len(decoded))


@pytest.mark.once
def test_deflated_parts_are_one_ordinary_zlib_stream():
    parts = [b"", b"a" * 1000, RNG.bytes(1000), b"\xff", bytes(range(256)) * 20]
    data = streams.deflated(parts)
    assert zlib.decompress(data) == b"".join(parts)
    assert streams.inflated(data, len(b"".join(parts))) == b"".join(parts)
    assert zlib.decompress(streams.deflated([])) == b""
    for wrong in (data[:-1], data + b"\0", data[:-5] + b"\0" * 5):
        with pytest.raises(ValueError, match="stream"):
            streams.inflated(wrong, 10**6)
    with pytest.raises(ValueError, match="does not end where expected"):
        streams.inflated(data, 10)


def test_a_masked_layer_constructed_by_hand(tmp_path):
    model = keras.Sequential([keras.Input((8,)), MaskedDense(4, mask_initializer="zeros")])
    ml.save_ticket(model, tmp_path / "ticket")
    same(model, ml.load_ticket(tmp_path / "ticket"))

"""Files of tickets in run folders: what they keep of a model, and which models need `.keras`."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner.compression import save_model
from lottery_ticket_pruner.experiments import saved_tickets
from masked_layers.model_state import state_variables
from masked_layers.ticket_files import load_saved

pytestmark = pytest.mark.once


@keras.saving.register_keras_serializable("saved_tickets")
class Scaled(layers.Layer):
    """A custom layer."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

    def call(self, inputs):
        return inputs * self.scale


def model_of_all_kinds():
    """Returns a compiled masked model: two inputs, rounding, statistics, a seed, a custom layer."""
    inputs = [keras.Input((4,)), keras.Input((3,))]
    x = layers.Concatenate()([layers.Dense(5)(inputs[0]), Scaled()(layers.Dense(2)(inputs[1]))])
    x = layers.Dropout(0.5, seed=3)(layers.BatchNormalization()(x))
    model = keras.Model(inputs, layers.Dense(3)(x))
    rng = np.random.default_rng(0)
    for variable in model.weights:
        if variable.dtype == "float32":
            variable.assign(rng.normal(size=variable.shape) ** 2)
    model.compile("adam", "mse")
    masked = ml.convert_to_masked(model, quantize="int8")
    ml.set_masks(masked, {p: rng.random(m.shape) < 0.4 for p, m in ml.get_masks(masked).items()})
    return masked


def states_of(model):
    """Returns the bytes of every variable by path, of masked weights only those that are kept."""
    found = {}
    for path, (variable, mask) in state_variables(model).items():
        array = np.array(keras.ops.convert_to_numpy(variable.value))
        kept = Ellipsis if mask is None else mask.state.kept
        found[path] = (array.dtype, np.array(kept).tobytes(), array[kept].tobytes())
    return found


def test_a_ticket_file_holds_what_a_keras_file_holds(tmp_path):
    model = model_of_all_kinds()
    save_model(model, tmp_path / "ticket.keras")
    before = load_saved(tmp_path / "ticket.keras")
    with warnings.catch_warnings(action="error", category=UserWarning):
        path = saved_tickets.save(model, tmp_path, "ticket")
    assert [file.name for file in tmp_path.iterdir()] == ["ticket.safetensors"]
    assert path == saved_tickets.find(tmp_path)
    after = load_saved(path)
    assert {id(v) for v in after.variables}.isdisjoint({id(v) for v in before.variables})
    assert states_of(after) == states_of(before)
    for ref in ml.masked_refs(after):
        assert ref.mask.state.quantization == "int8"
    inputs = [np.random.default_rng(1).normal(size=(6, n)).astype("float32") for n in (4, 3)]
    np.testing.assert_array_equal(after(inputs), before(inputs))


def test_models_without_a_ticket_file_are_kept_as_keras_files(tmp_path):
    inputs = keras.Input((4,))
    words = layers.StringLookup()
    words.adapt(["a", "b"])
    model = keras.Model(
        [inputs, text := keras.Input((1,), dtype="string")],
        layers.Concatenate()([layers.Dense(3)(inputs), words(text)]),
    )
    (tmp_path / "ticket-1.safetensors").write_bytes(b"of an earlier run")
    with pytest.warns(UserWarning, match=r"ticket-1\.keras' is .* as an adapted vocabulary\.$"):
        saved_tickets.save(ml.convert_to_masked(model), tmp_path, "ticket-1")
    assert [file.name for file in tmp_path.iterdir()] == ["ticket-1.keras"]
    assert saved_tickets.tickets_in(tmp_path) == [tmp_path / "ticket-1.keras"]
    assert len(ml.masked_refs(load_saved(tmp_path / "ticket-1.keras"))) == 1
    assert saved_tickets.find(tmp_path) == tmp_path / "ticket.safetensors"

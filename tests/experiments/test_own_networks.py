"""Networks, criteria and rates of users in experiments: what they are, and what is refused."""

import json

import keras
import numpy as np
import pytest

import own_data

pytest.importorskip("tyro")

import masked_layers as ml
from lottery_ticket_pruner import criteria
from lottery_ticket_pruner.experiments import identifiers, own_networks
from lottery_ticket_pruner.experiments.config import RunConfig
from lottery_ticket_pruner.experiments.run_folder import restored
from lottery_ticket_pruner.experiments.supermask import SupermaskConfig
from lottery_ticket_pruner.experiments.workbench import compiled_network, load_and_resolve

pytestmark = pytest.mark.once

SOURCE = (
    own_data.SOURCE
    + """
import keras
from keras import layers
from lottery_ticket_pruner import structures

def series():
    x = np.random.default_rng(0).normal(size=(60, 4, 2)).astype("float32")
    y = x.sum(-1).argmax(-1)
    return (x, y), (x[:9], y[:9])

def net(last=None, size=4, classes=4):
    made = [keras.Input((size,)), layers.Dense(3, name="first"),
            layers.Dense(classes, last, name="last")]
    return keras.Sequential(made)

def probabilities():
    return net("softmax")

def compiled(loss="sparse_categorical_crossentropy", metrics=("accuracy",)):
    model = net("softmax")
    model.compile(keras.optimizers.SGD(0.5, momentum=0.25), loss, metrics=list(metrics))
    return model

def one_hot():
    return compiled("categorical_crossentropy")

def without_accuracy():
    return compiled(metrics=())

def wide():
    return net(size=9)

def narrow():
    return net(classes=3)

def recurrent():
    return keras.Sequential([keras.Input((4, 2)), layers.SimpleRNN(3), layers.Dense(4)])

def two_inputs():
    one, two = keras.Input((4,)), keras.Input((4,))
    return keras.Model([one, two], layers.Dense(4)(one + two))

def no_model():
    return 3

def same():
    keras.utils.set_random_seed(1)
    return net()

def magnitude(group):
    return np.abs(group.final)

def growth(group):
    return np.abs(group.final) - np.abs(group.initial)

def broken(group):
    raise KeyError("weights")

blocks = structures.Blocks((2, 1))
scale = 1.0
"""
)


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def resolved(mine, network, data="load", **options):
    return load_and_resolve(RunConfig(data=f"{mine}:{data}", network=f"{network}", **options))


def weights_of(model):
    return {layer.name: layer.get_weights() for layer in model.layers if layer.weights}


def test_the_architecture_of_a_file_gets_new_weights_for_each_seed(tmp_path, mine):
    normalization = keras.layers.Normalization(name="normalization")
    normalization.adapt(np.float32([[1, 2, 3, 4], [3, 4, 5, 8]]))
    frozen = keras.layers.Dense(4, trainable=False, name="frozen")
    last = keras.layers.Dense(4, name="last")
    statistics = keras.layers.BatchNormalization(name="statistics")
    model = keras.Sequential([keras.Input((4,)), normalization, frozen, statistics, last])
    statistics.moving_mean.assign(np.ones(4))
    model.save(tmp_path / "net.keras")
    config, data = resolved(mine, tmp_path / "net.keras", seeds=(3, 4))
    first, second, again = (compiled_network(config, data, seed) for seed in (3, 4, 3))
    stored = weights_of(model)
    for name in ("normalization", "frozen"):
        for found, expected in zip(weights_of(first)[name], stored[name], strict=True):
            np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(first.layers[0](data.x_train), normalization(data.x_train))
    np.testing.assert_array_equal(first.layers[2].moving_mean, np.zeros(4))
    kernels = [np.asarray(one.layers[-1].get_weights()[0]) for one in (first, second, again, model)]
    assert len({kernel.tobytes() for kernel in kernels}) == 3
    np.testing.assert_array_equal(kernels[0], kernels[2])
    # Only a file that gives another network has another identity.
    before = own_networks.identity(f"{tmp_path / 'net.keras'}")
    last.set_weights([weights + 1 for weights in last.get_weights()])
    model.save(tmp_path / "net.keras")
    assert own_networks.identity(f"{tmp_path / 'net.keras'}") == before
    frozen.set_weights([weights + 1 for weights in frozen.get_weights()])
    model.save(tmp_path / "net.keras")
    assert own_networks.identity(f"{tmp_path / 'net.keras'}") != before


def test_the_vocabulary_of_a_file_is_kept(tmp_path):
    pytest.importorskip("tensorflow")

    def stored(*numbers):
        keras.utils.clear_session()  # Names are part of the identity.
        lookup = keras.layers.IntegerLookup()
        lookup.adapt(np.array(numbers))
        inputs = keras.Input((3,), dtype="int64")
        model = keras.Model(inputs, keras.layers.Embedding(9, 2)(lookup(inputs)))
        model.save(file := f"{tmp_path / 'net.keras'}")
        return file, lookup.get_vocabulary()

    file, vocabulary = stored(5, 6, 7, 7)
    assert own_networks.build(file).layers[1].get_vocabulary() == vocabulary
    before = own_networks.identity(file)
    assert own_networks.identity(stored(5, 6, 7, 7)[0]) == before
    assert own_networks.identity(stored(5, 6, 8, 8)[0]) != before


def test_a_compiled_network_keeps_its_loss_and_optimizer(mine):
    config, data = resolved(mine, f"{mine}:compiled", seeds=(0,))
    model = compiled_network(config, data, 0)
    assert (config.optimizer, config.learning_rate) == (None, None)
    assert (float(model.optimizer.learning_rate), model.optimizer.momentum) == (0.5, 0.25)
    config, data = resolved(mine, f"{mine}:compiled", seeds=(0,), learning_rate=0.125)
    model = compiled_network(config, data, 0)
    assert isinstance(model.optimizer, keras.optimizers.Adam)
    assert float(model.optimizer.learning_rate) == 0.125
    assert model.loss == "sparse_categorical_crossentropy"


@pytest.mark.parametrize("function", ["net", "probabilities"])
def test_the_loss_of_an_uncompiled_network_is_the_cross_entropy_of_its_outputs(mine, function):
    config, data = resolved(mine, f"{mine}:{function}", seeds=(0,))
    model = compiled_network(config, data, 0)
    outputs = keras.ops.convert_to_numpy(model(data.x_test)).astype("float64")
    if function == "net":
        outputs = np.exp(outputs) / np.exp(outputs).sum(-1, keepdims=True)
    expected = -np.log(outputs[np.arange(len(outputs)), data.y_test]).mean()
    found = model.evaluate(data.x_test, data.y_test, verbose=0, return_dict=True)
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
    assert float(model.optimizer.learning_rate) == pytest.approx(0.0012)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("one_hot", "loss='sparse_categorical_crossentropy', or not at all"),
        ("without_accuracy", r"metrics=\['accuracy'\], or not at all. Received: loss"),
        ("wide", r"of shape \(4,\). It takes inputs of shape \(9,\)"),
        ("narrow", r"each of the 4 classes.*Received: shape \(8, 3\)"),
        ("two_inputs", "has 2 inputs"),
        ("no_model", "Expected a Keras model for --network. Received: int"),
        ("scale", "has no function 'scale' to make a network with.* It has: load, series"),
    ],
)
def test_networks_that_do_not_fit_are_refused_before_anything_is_written(mine, function, message):
    with pytest.raises(ValueError, match=message):
        resolved(mine, f"{mine}:{function}")


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("lenet-300-10", "Did you mean 'lenet-300-100'.*module:function"),
        ("there_is_no:net", "no module 'there_is_no' to make a network with"),
        ("none.keras", "There is no file 'none.keras'"),
        ("damaged.keras", "damaged.keras' exists, but it is not a '.keras' file"),
    ],
)
def test_networks_that_are_not_there(mine, monkeypatch, network, message):
    monkeypatch.chdir(mine.parent)
    (mine.parent / "damaged.keras").write_bytes(b"PK")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        resolved(mine, network)


def test_a_masked_model_is_not_a_network(tmp_path, mine):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)])
    ml.convert_to_masked(model).save(tmp_path / "ticket.keras")
    with pytest.raises(ValueError, match=r"without masks.*strip_masks"):
        resolved(mine, tmp_path / "ticket.keras")


def test_a_network_with_the_same_weights_for_every_seed_is_pointed_out(mine):
    with pytest.warns(UserWarning, match="same initial weights for every seed"):
        resolved(mine, f"{mine}:same")


def test_a_custom_network_gets_custom_data_without_an_added_channel(mine):
    _, data = resolved(mine, f"{mine}:recurrent", "series", seeds=(0,))
    assert data.input_shape == (4, 2)
    assert data.x_validation.shape[1:] == data.x_test.shape[1:] == (4, 2)


def test_rates_of_layers_are_patterns_of_paths_as_in_find_ticket(mine):
    options = {"rounds": 2, "steps": 4, "seeds": (0,)}
    config, _ = resolved(mine, f"{mine}:net", rate=("0.25", "last=0.125"), **options)
    pruning = config.search_plan(0).pruning
    assert pruning.rate == {"default": 0.25, "last": 0.125}
    again = restored(RunConfig, json.loads(json.dumps(config.to_dict())))
    assert again.resolve(55).name == config.name
    single, _ = resolved(mine, f"{mine}:net", rate=0.25, **options)
    assert single.search_plan(0).pruning.rate == 0.25
    network = RunConfig(rate=("fc_1=0.1", "output=0.05"), rounds=2).resolve(100)
    assert network.amount == {"rate": {"default": 0.36, "fc_1": 0.1, "output": 0.05}}
    filters = RunConfig(data="cifar10", rate=("conv_1=0.1",), structure="filters").resolve(100)
    assert filters.amount == {"rate": {"^output/": 0.0, "default": 0.2, "conv_1": 0.1}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": ("0.2", "konv=0.1")}, "'konv' of `--rate` matches no path.*first/kernel"),
        ({"rate": ("first=1.5",)}, r"share in \[0, 1\)"),
        ({"rate": ("0.2", "0.3")}, "two values for default"),
        ({"rate": ("0.2", "first")}, "PATTERN=SHARE"),
        ({"rate": ("first=0.1",), "output_rate": 0.1}, "as patterns of --rate alone"),
        ({"output_rate": 0.1}, "as patterns of --rate alone"),
        ({"conv_rate": 0.1}, "has no convolutions"),
        ({"rate": ("first=0.1",), "scope": "global"}, "global ranks layers together"),
        ({"rate": ("first=0.1",), "final_sparsity": 0.5}, "not both"),
        ({"structure": "filters"}, "give the output layer a rate of 0"),
        ({"structure": "filters", "final_sparsity": 0.5}, "give the output layer a rate of 0"),
        ({"structure": "filters", "rate": ("first=0.1",)}, "give the output layer a rate of 0"),
    ],
)
def test_rates_that_do_not_fit_are_refused(mine, options, message):
    with pytest.raises(ValueError, match=message):
        resolved(mine, f"{mine}:net", **options)


def test_locations_stand_for_objects_and_their_code(mine):
    config, _ = resolved(mine, f"{mine}:net", strategy=f"{mine}:magnitude", seeds=(0,), steps=4)
    plan = config.search_plan(0).pruning
    assert isinstance(plan.criterion, criteria.Criterion)
    assert plan.criterion.name == "magnitude"
    assert "mine.py-magnitude" in config.name
    assert "/" not in config.name
    code = identifiers.code_of(config.to_dict())
    assert code.startswith("magnitude python3")
    assert "network python3" in code
    mine.write_text(SOURCE.replace("Dense(3,", "Dense(5,") + "# A comment.\n")
    changed = identifiers.code_of(config.to_dict())
    assert changed.split(", ")[0] == code.split(", ")[0]
    assert changed.split(", ")[1] != code.split(", ")[1]
    built_in = RunConfig(structure=f"{mine}:blocks").resolve(100)
    before = identifiers.code_of(built_in.to_dict())
    assert before.startswith("blocks ")
    mine.write_text(SOURCE.replace("(2, 1)", "(4, 1)"))
    assert identifiers.code_of(built_in.to_dict()) != before
    supermask = SupermaskConfig(criteria=(f"{mine}:growth", "random")).resolve(100)
    assert identifiers.code_of(supermask.to_dict()).startswith("growth python3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "{}:scale"}, "A criterion must be.*Received: 1.0 of type float"),
        ({"strategy": "{}:magnitud"}, "has no function 'magnitud' to use as --strategy"),
        ({"strategy": "large_finall"}, "--strategy: Unknown criterion.*Did you mean"),
        ({"kept": "{}:load", "retraining": "fine_tuning"}, "kept weights stay as they were"),
        ({"structure": "{}:none"}, "to use as --structure"),
    ],
)
def test_names_and_locations_of_nothing(mine, options, message):
    options = {name: value.format(mine) for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        resolved(mine, "lenet-300-100", **options)


def test_supermasks_take_criteria_that_rank_recorded_weights(mine):
    with pytest.raises(ValueError, match=r"takes those that rank only recorded.*gradient needs"):
        SupermaskConfig(criteria=("gradient",)).resolve(100)
    twin = mine.with_name("twin.py")
    twin.write_text(SOURCE)
    with pytest.raises(ValueError, match="two with one name"):
        SupermaskConfig(criteria=(f"{mine}:growth", f"{twin}:growth")).resolve(100)

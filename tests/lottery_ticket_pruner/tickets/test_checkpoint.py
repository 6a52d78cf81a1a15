"""Searches that a checkpoint resumes, and its errors for damaged files."""

import json
import re
import threading
import warnings

import keras
import numpy as np
import pytest

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner, criteria, find_ticket, training
from lottery_ticket_pruner.checkpoint import Checkpoint

RNG = np.random.default_rng(0)
X = RNG.normal(size=(48, 6)).astype("float32")
Y = (X[:, 0] > 0).astype("int32")
ARGUMENTS = {"rounds": 1, "steps": 2, "batch_size": 16, "controls": ()}

pytestmark = pytest.mark.once


def net(activation="relu", **compiled):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(5, activation), keras.layers.Dense(2)]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(**{"optimizer": "sgd", "loss": loss} | compiled)
    return model


def search(folder, model=None, **changed):
    return find_ticket(model or net(), X, Y, checkpoint=folder, **ARGUMENTS | changed)


def times(k):
    """Returns functions with the same name and line that do different things."""

    class Shifted:
        def draw(self, rng, count):
            return np.full((count, 1), k, "int32")

        def apply(self, images, drawn):
            return images + keras.ops.cast(drawn, images.dtype)

    return {
        "strategy": lambda group: k * np.abs(group.final),
        "kept": lambda kernel: k * kernel.initial,
        "pruned": lambda kernel, values: np.where(kernel.mask, k * values, 0),
        "augment": Shifted(),
    }


def test_a_function_of_another_closure_is_another_search(tmp_path):
    first = search(tmp_path, **times(1))
    assert search(tmp_path, **times(1)).rows == first.rows
    for what, other in times(2).items():
        with pytest.raises(ValueError, match=rf"state of another search.*'{what}\.code'"):
            search(tmp_path, **times(1) | {what: other})


def own_activation(k):
    return lambda x: k * keras.ops.relu(x)


def own_loss(k):
    def scaled(y, p):
        return k * keras.losses.sparse_categorical_crossentropy(y, p, from_logits=True)

    return scaled


def own_metrics(k):
    def scaled(y, p):
        return k * keras.ops.mean(p, -1)

    return [scaled]


def own_optimizer(k):
    class Scaled(keras.optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            super().update_step(k * gradient, variable, learning_rate)

    return Scaled()


def test_layers_and_compile_arguments_are_part_of_the_identity_of_a_search(tmp_path):
    own = {
        "activation": own_activation,
        "loss": own_loss,
        "metrics": own_metrics,
        "optimizer": own_optimizer,
    }

    def find(**numbers):
        model = net(**{name: make(numbers.get(name, 1)) for name, make in own.items()})
        return search(tmp_path, model, test_data=(X, Y))

    first = find()
    assert find().rows == first.rows
    for what in own:
        name = {"activation": "layers"}.get(what, what)
        with pytest.raises(ValueError, match=rf"state of another search.*'{name}"):
            find(**{what: 2})


def test_a_registered_criterion_that_was_edited_is_another_one(tmp_path, monkeypatch):
    monkeypatch.setattr(criteria, "_REGISTRY", criteria._REGISTRY.copy())
    for k in (1, 1, -1):

        def mine(group, k=k):
            return k * np.abs(group.final)

        criteria.register("mine", needs={"final"})(mine)
        if k == 1:
            search(tmp_path, strategy="mine")
    with pytest.raises(ValueError, match="state of another search"):
        search(tmp_path, strategy="mine")


def test_searches_that_cannot_be_identified_are_refused_at_the_beginning(tmp_path):
    lock = threading.Lock()

    def locked(group):
        with lock:
            return np.abs(group.final)

    with pytest.warns(UserWarning, match=r"The search cannot be resumed.*`lock`.*a _thread.lock"):
        search(tmp_path, strategy=locked)
    with pytest.raises(ValueError, match=r"may be a different one.*`lock`.*get_config"):
        search(tmp_path, strategy=locked)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        find_ticket(net(), X, Y, strategy=locked, **ARGUMENTS)


def rewritten(folder, change):
    """Changes the state in a folder as if written by a version without checksums."""
    file = folder / "state.json"
    state = json.loads(file.read_text())
    state.pop("checksum")
    change(state)
    file.write_text(json.dumps(state))


def test_states_of_earlier_versions_are_taken_up_where_names_tell(tmp_path):
    first = search(tmp_path)

    def earlier(state):
        del state["arguments"]["layers"], state["arguments"]["metrics"]
        assert state["arguments"]["strategy"] == "large_final"
        assert state["arguments"]["kept"] == "rewind"

    rewritten(tmp_path, earlier)
    assert search(tmp_path).rows == first.rows
    rewritten_by_name = {"strategy": "mine"}
    own = tmp_path / "own"

    def mine(group):
        return np.abs(group.final)

    search(own, strategy=mine)
    rewritten(own, lambda state: state["arguments"].update(rewritten_by_name))
    with pytest.raises(ValueError, match=r"'strategy': \('mine', None\).*another folder"):
        search(own, strategy=mine)


def damage(content, number):
    """Damages a file in one of many ways."""
    rng = np.random.default_rng(number)
    kind = number % 4
    if kind == 0:
        return content[: rng.integers(len(content))]
    if kind == 1:
        return b""
    broken = bytearray(content)
    for place in rng.integers(len(content), size=1 if kind == 2 else 20):
        broken[place] ^= 1 << int(rng.integers(8))
    return bytes(broken)


def test_a_state_cannot_lose_its_checksum_or_exhaust_the_stack(tmp_path):
    search(tmp_path)
    file = tmp_path / "state.json"
    text = file.read_text()
    renamed = text.replace('"checksum"', '"checksun"').replace('"round": 1', '"round": 0')
    for wrong, why in ((renamed, "further entries"), ('{"rows": ' + "[" * 100_000, "recursion")):
        file.write_text(wrong)
        with pytest.raises(ml.FileContentError, match=why):
            search(tmp_path)


@pytest.mark.parametrize("name", ["state.json", "model-01.npz", "pruner-01.npz", "masks-00.npz"])
def test_damaged_states_end_in_the_documented_error_and_change_nothing(tmp_path, name):
    search(tmp_path, pruned="freeze")
    arguments = json.loads((tmp_path / "state.json").read_text())["arguments"]
    model = ml.convert_to_masked(net())
    before = [keras.ops.convert_to_numpy(v) for v in model.variables]
    content = (tmp_path / name).read_bytes()
    read = 0
    for number in range(16):
        (tmp_path / name).write_bytes(damage(content, number))
        try:
            Checkpoint(tmp_path, arguments).load(model)
        except ml.FileContentError as error:
            assert str(tmp_path) in str(error)  # noqa: PT017
            after = [keras.ops.convert_to_numpy(v) for v in model.variables]
            for one, other in zip(before, after, strict=True):
                np.testing.assert_array_equal(one, other)
        else:
            read += 1  # Some bytes of a zip file have no effect.
            LotteryTicketPruner(model).reset_masks()
            for variable, value in zip(model.variables, before, strict=True):
                variable.assign(value)
    assert read <= 4
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        Checkpoint(tmp_path, arguments).load(model)


def test_damaged_files_of_a_pruner_end_in_the_documented_error(tmp_path):
    model = ml.convert_to_masked(net())
    file = tmp_path / "pruner.npz"
    LotteryTicketPruner(model).save(file)
    content = file.read_bytes()
    for number in range(40):
        file.write_bytes(damage(content, number))
        try:
            LotteryTicketPruner.load(file, model)
        except ml.FileContentError as error:
            assert "not written by `LotteryTicketPruner.save`" in str(error)  # noqa: PT017
    with pytest.raises(FileNotFoundError):
        LotteryTicketPruner.load(tmp_path / "none.npz", model)
    with pytest.raises(IsADirectoryError):
        LotteryTicketPruner.load(tmp_path, model)


@pytest.mark.parametrize("name", ["initial/0", "final/0", "mask/0", "final/1", "frozen/0"])
@pytest.mark.parametrize(
    "array", [np.zeros((2, 3), "float32"), np.zeros((6, 5), "<U3"), np.zeros(0, "float32")]
)
def test_arrays_of_another_shape_or_kind_in_a_pruners_file_are_refused(tmp_path, name, array):
    model = ml.convert_to_masked(net())
    pruner = LotteryTicketPruner(model)
    pruner.set_pretrained_weights()
    pruner.save(tmp_path / "pruner.npz")
    with np.load(tmp_path / "pruner.npz") as file:
        arrays = dict(file)
    np.savez(tmp_path / "other.npz", **arrays | {name: array})
    with pytest.raises(ValueError, match=r"other.npz.*(weights|mask|frozen values|shape)"):
        LotteryTicketPruner.load(tmp_path / "other.npz", model)


WRONG = {
    "features": (X[:, :2], Y),
    "lengths": (X, Y[:-1]),
    "no targets": (X,),
    "columns of targets": (X, np.zeros((48, 3, 2), "int32")),
    "four parts": (X, Y, Y, Y),
}


@pytest.mark.parametrize("data", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("argument", ["test_data", "validation_data"])
def test_data_to_look_at_is_looked_at_before_training(data, argument):
    from lottery_ticket_pruner import analyses, learned

    done = []
    given = {argument: data, "steps": 2, "batch_size": 16, "on_progress": done.append}
    functions = [find_ticket, learned.learn_supermask]
    functions += [training.train] if argument == "validation_data" else [analyses.instability]
    for function in functions:
        more = {"rounds": 1, "controls": ()} if function is find_ticket else {}
        with pytest.raises(ValueError, match=f"{argument}`"):
            function(net(), X, Y, **given | more)
    if argument == "validation_data":
        model = net()
        before = model.get_weights()
        with pytest.raises(ValueError, match=f"{argument}`"):
            training.fit(model, X, Y, validation_data=data)
        for one, other in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)
    assert not done


def test_data_of_another_shape_that_the_model_takes_is_taken():
    model = net(loss="mse", metrics=["mse"])
    targets = np.zeros((48, 2), "float32")
    integers = targets.astype("int32"), np.zeros((48, 1), "int32")
    for other in integers:
        training.train(
            model, X, targets, steps=1, batch_size=16, validation_data=(X.astype("int32"), other)
        )


def test_other_arguments_are_looked_at_before_training_too():
    from lottery_ticket_pruner import analyses, learned

    done = []
    common = {"steps": 2, "batch_size": 16, "test_data": (X, Y), "on_progress": done.append}
    with pytest.raises(ValueError, match="`samples` must be at least 1"):
        learned.learn_supermask(net(), X, Y, samples=0, **common)
    with pytest.raises(ValueError, match="`metric` must be one of"):
        analyses.instability(net(), X, Y, metric="f1", **common)
    assert not done

"""Every criterion, structure, distribution and schedule in combination with later steps."""

import re
import types
from pathlib import Path

import keras
import numpy as np
import pytest

import masked_layers as ml
from lottery_ticket_pruner import (
    GradualPruning,
    LotteryTicketPruner,
    criteria,
    distributions,
    schedules,
    structures,
    training,
)
from masked_layers.serving import encoding
from masked_layers.serving.tracing import effective_values

# Parts that are combined here are each tested on JAX, too.
pytestmark = pytest.mark.slow("jax")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 8)).astype("float32")
Y = RNG.integers(0, 4, size=24)
ROOT = Path(__file__).resolve().parents[2]
STRUCTURES = {"n_of_m": "2:4", "blocks": "4x1", "outputs": "units", "channels": "channels"}
SCHEDULES = {
    "constant": {"sparsity": 0.5},
    "polynomial": {"initial_sparsity": 0, "final_sparsity": 0.5, "begin_step": 0, "end_step": 4},
    "geometric": {"initial_sparsity": 0, "final_sparsity": 0.5, "begin_step": 0, "end_step": 4},
}


@pytest.fixture(scope="module")
def trained():
    """A masked model, its pruner, and weights that differ from the initial ones."""
    keras.utils.set_random_seed(0)
    inner = [keras.layers.Dense(8, "relu", name="a"), keras.layers.Dense(4, name="b")]
    model = ml.convert_to_masked(keras.Sequential([keras.Input((8,)), *inner]))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
    pruner = LotteryTicketPruner(model)
    train(model)
    return types.SimpleNamespace(model=model, pruner=pruner, weights=model.get_weights())


@pytest.fixture
def pruner(trained):
    """The pruner of the trained model, with nothing pruned."""
    trained.pruner.reset_masks()
    trained.pruner.rewind()
    trained.model.set_weights(trained.weights)
    trained.pruner.set_pretrained_weights()
    return trained.pruner


def train(model):
    training.train(model, X, Y, steps=4, batch_size=8, deterministic=True)


def kernels(model):
    values = effective_values(model)
    return {ref.path: values[ref.path] for ref in ml.masked_refs(model)}


def check_all_that_follows(pruner, kept=48):
    model, masks = pruner.model, ml.get_masks(pruner.model)
    report = ml.sparsity_report(model)
    assert {row.path: row.alive for row in report} == {p: m.sum() for p, m in masks.items()}
    assert report.alive == kept

    known = pruner.evaluate_supermask(X, Y, verbose=0)
    initial = list(pruner.initial_weights.values())
    first, second = (w * mask for w, mask in zip(initial[::2], masks.values(), strict=True))
    logits = np.maximum(X @ first + initial[1], 0) @ second + initial[3]
    log_sums = np.log(np.exp(logits).sum(axis=1))
    assert known["loss"] == pytest.approx((log_sums - logits[np.arange(24), Y]).mean(), rel=1e-4)

    train(model)
    for path, kernel in kernels(model).items():
        assert (kernel[~masks[path]] == 0).all()
        assert not masks[path].any() or (kernel != pruner.initial_weights[path]).any()
    assert all((ml.get_masks(model)[path] == mask).all() for path, mask in masks.items())

    stored = kernels(model)
    packed = encoding.encode(stored, encodings=dict.fromkeys(stored, "sparse"))
    assert sum(block.values for block in encoding.blocks(packed)) == report.alive
    for path, array in encoding.decode(packed).items():
        np.testing.assert_array_equal(array, stored[path])

    pruner.rewind()
    for path, kernel in kernels(model).items():
        np.testing.assert_array_equal(kernel, masks[path] * pruner.initial_weights[path])


@pytest.mark.parametrize("name", criteria.names())
def test_every_criterion(pruner, name):
    pruner.update_masks(name, sparsity=0.5, data=(X, Y))
    check_all_that_follows(pruner)


@pytest.mark.once
@pytest.mark.parametrize("name", structures.names())
def test_every_structure(pruner, name):
    amount = {} if name == "n_of_m" else {"sparsity": 0.5}
    pruner.update_masks(structure=STRUCTURES[name], **amount)
    assert structures.get(STRUCTURES[name]).get_config()["name"] == name
    # Half of the units of the first layer, and what reads them; of the second, outputs alone.
    kept = {"outputs": 4 * 8 + 4 * 2, "channels": 4 * 8 + 4 * 4}.get(name, 48)
    check_all_that_follows(pruner, kept)


@pytest.mark.once
@pytest.mark.parametrize("name", distributions.names())
def test_every_distribution(pruner, name):
    pruner.update_masks(sparsity=0.5, distribution=name)
    check_all_that_follows(pruner)


@pytest.mark.once
@pytest.mark.parametrize("name", schedules.names())
def test_every_schedule(pruner, name):
    pruning = GradualPruning(pruner, {"name": name, "frequency": 2, **SCHEDULES[name]})
    assert [pruning.advance(steps) for steps in (0, 1, 1, 2)] == [True, False, True, True]
    check_all_that_follows(pruner)


def test_the_page_of_choices_has_a_line_for_each():
    text = (ROOT / "docs/strategies.md").read_text("utf-8")
    for kind, module in (
        ("structure", structures),
        ("distribution", distributions),
        ("schedule", schedules),
    ):
        assert re.findall(rf"^\| {kind} \| `(\w+)`", text, re.M) == module.names()


@pytest.mark.once
def test_the_tables_of_criteria_in_the_documents_are_complete():
    for page in ("docs/strategies.md", "docs/algorithms.md"):
        text = (ROOT / page).read_text("utf-8")
        table = text[re.search(r"^\| (strategy|name) \| score \|", text, re.M).start() :]
        named = re.findall(r"^\| `(\w+)` \|", table.split("\n\n")[0], re.M)
        assert sorted(named) == sorted(criteria.names()), page

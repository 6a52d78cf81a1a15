"""Structures compared with loops in plain Python and with torch, and shrinking of whole filters."""

import dataclasses
import itertools
import logging
import re

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from keras import layers

import masked_layers as ml
from kernels import BY_RECORDS, distinct
from lottery_ticket_pruner import LotteryTicketPruner, criteria, selection, structures
from lottery_ticket_pruner.selection import Weights, update
from masked_layers.maskable import input_axes


def kernel(values, mask=None, **kwargs):
    values = np.asarray(values, dtype=np.float32)
    mask = np.ones(values.shape, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    return Weights(mask=mask, initial=values, final=values, current=values, **kwargs)


# --- By hand --------------------------------------------------------------------------------------


@pytest.mark.once
def test_two_of_four_keep_the_largest_of_each_group_of_inputs():
    column = [4, -3, 1, 2, 5, 7, -6, 8, 9, 1, 1]  # Groups of 4, 4 and 3.
    mask = update("large_final", {"k": kernel(np.array([column]).T)}, structure="2:4")["k"]
    assert mask[:8].ravel().tolist() == [1, 1, 0, 0, 0, 1, 0, 1]
    assert mask[8]
    assert mask[8:].sum() == 2


@pytest.mark.once
def test_blocks_of_a_matrix_are_ranked_by_average_or_maximum():
    values = np.array(
        [
            [9, 0, 4, 4, 1],
            [0, 0, 4, 4, 2],
            [3, 3, 5, 0, 8],
        ]
    )
    # Averages 2.25 4 1.5 | 3 2.5 8, maxima 9 4 2 | 3 5 8.
    average = update("large_final", {"k": kernel(values)}, rate=0.5, structure="2x2")["k"]
    maximum = update(
        "large_final", {"k": kernel(values)}, rate=0.5, structure=structures.Blocks((2, 2), "max")
    )["k"]
    np.testing.assert_array_equal(average, [[0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [1, 1, 0, 0, 1]])
    np.testing.assert_array_equal(maximum, [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]])


@pytest.mark.once
def test_pruned_weights_do_not_affect_the_score_of_a_tile_and_stay_pruned():
    values, mask = [[9, 2], [1, 2]], [[0, 1], [1, 1]]
    pruned = update("large_final", {"k": kernel(values, mask)}, rate=0.5, structure="units")["k"]
    np.testing.assert_array_equal(pruned, [[0, 1], [0, 1]])  # An average of 1 against 2, not 5.
    kept = update("large_final", {"k": kernel(values, mask)}, rate=0, structure="units")["k"]
    np.testing.assert_array_equal(kept, mask)
    values[1][0] = 3  # The average of a single weight.
    pruned = update("large_final", {"k": kernel(values, mask)}, rate=0.5, structure="units")["k"]
    np.testing.assert_array_equal(pruned, [[0, 0], [1, 0]])


@pytest.mark.once
def test_tiles_of_all_layers_are_ranked_together_with_global_scope():
    weights = {"a": kernel([[1, 2, 3]]), "b": kernel([[4, 5], [4, 6]])}
    masks = update("large_final", weights, rate=0.4, structure="units", scope="global")
    assert [mask.tolist() for mask in masks.values()] == [[[0, 0, 1]], [[1, 1], [1, 1]]]


# --- Brute force ----------------------------------------------------------------------------------


def tiles_of(shape, layout, structure):
    """Returns the indices of every tile of a kernel, by loops."""
    inputs, outputs = layout.inputs, layout.outputs
    others = [axis for axis in range(len(shape)) if axis not in inputs + outputs]

    def flat(index, axes):
        number = 0
        for axis in axes:
            number = number * shape[axis] + index[axis]
        return number

    found = {}
    for index in itertools.product(*map(range, shape)):
        position, i, o = (flat(index, axes) for axes in (others, inputs, outputs))
        if isinstance(structure, structures.Outputs):
            key = o
        elif isinstance(structure, structures.NOfM):
            key = (position, i // structure.m, o)
        else:
            height, width = structure.block_size
            key = (position, i // height, o // width)
        found.setdefault(key, []).append(index)
    return list(found.values())


AXES = {
    "dense": (2, (-2,), (-1,)),
    "conv": (4, (-2,), (-1,)),
    "transposed": (3, (-1,), (-2,)),
    "attention": (3, (-3, -2), (-1,)),
    "projection": (3, (-3,), (-2, -1)),
    "depthwise": (3, (), (-2, -1)),
    "bias": (1, (), ()),
}
EIGHTHS = st.integers(-16, 16).map(lambda number: number / 8)
STRUCTURES = st.one_of(
    st.builds(structures.Outputs, st.sampled_from(structures.POOLINGS)),
    st.builds(
        structures.Blocks,
        st.tuples(st.integers(1, 3), st.integers(1, 3)),
        st.sampled_from(structures.POOLINGS),
    ),
    st.tuples(st.integers(1, 3), st.integers(1, 3)).map(lambda nm: structures.NOfM(nm[0], sum(nm))),
)


@st.composite
def kernels(draw):
    rank, inputs, outputs = AXES[draw(st.sampled_from(list(AXES)))]
    shape = tuple(draw(st.integers(1, 5)) for _ in range(rank))
    values = draw(hnp.arrays(np.float32, shape, elements=EIGHTHS))
    mask = draw(hnp.arrays(bool, shape))
    return kernel(values, mask, input_axes=inputs, output_axes=outputs)


@pytest.mark.once
@settings(max_examples=100)
@given(
    kernels=st.lists(kernels(), min_size=1, max_size=3),
    structure=STRUCTURES,
    percent=st.integers(0, 99),
    together=st.booleans(),
    seed=st.integers(0, 3),
)
def test_structures_agree_with_loops_over_tiles(kernels, structure, percent, together, seed):
    weights = {f"{i}": kernel for i, kernel in enumerate(kernels)}
    fixed = structure.kept is not None
    amount = {} if fixed else {"rate": percent / 100, "scope": "global" if together else "layer"}
    applies = {path for path, w in weights.items() if structure.applies(w.layout)}
    if not applies:
        with pytest.raises(ValueError, match="does not apply to any of the weights"):
            update("large_final", weights, structure=structure, seed=seed, **amount)
        return
    masks = update("large_final", weights, structure=structure, seed=seed, **amount)
    groups = []
    for path, w in weights.items():
        assert masks[path].shape == w.mask.shape
        assert not np.shares_memory(masks[path], w.mask)
        assert (masks[path] <= w.mask).all()
        if path not in applies:
            np.testing.assert_array_equal(masks[path], w.mask)
            continue
        tiles = tiles_of(w.mask.shape, w.layout, structure)
        competing = []
        for tile in tiles:
            alive = [i for i in tile if w.mask[i]]
            kept = [i for i in alive if masks[path][i]]
            scores = [abs(float(w.final[i])) for i in alive]
            if fixed:
                assert len(kept) == min(structure.n, len(alive))
                best = sorted(scores)[::-1][: structure.n]
                assert sorted(abs(float(w.final[i])) for i in kept) == best[::-1]
            elif alive:
                assert kept in ([], alive)
                score = max(scores) if structure.pooling == "max" else sum(scores) / len(scores)
                competing.append((score, bool(kept)))
        groups.append(competing)
    if fixed:
        return
    for competing in [list(itertools.chain(*groups))] if together else groups:
        drop = percent * len(competing) // 100
        dropped = sorted(score for score, kept in competing if not kept)
        assert len(dropped) == drop
        np.testing.assert_allclose(dropped, sorted(score for score, _ in competing)[:drop])


@pytest.mark.once("tensorflow", "torch")  # Where torch is installed.
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", [(7, 5), (3, 3, 4, 6)])
def test_filters_by_magnitude_agree_with_ln_structured_of_torch(seed, shape):
    torch = pytest.importorskip("torch")
    from torch.nn.utils import prune

    rng = np.random.default_rng(seed)
    values, mask = rng.normal(size=shape).astype(np.float32), None
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.tensor(values))
    for rate in (0.4, 0.5):
        alive = shape[-1] if mask is None else int(mask.any(tuple(range(len(shape) - 1))).sum())
        drop = selection.drop_count(alive, alive, rate=rate)
        prune.ln_structured(layer, "weight", amount=drop, n=1, dim=len(shape) - 1)
        mask = update("large_final", {"k": kernel(values, mask)}, rate=rate, structure="filters")
        mask = mask["k"]
        np.testing.assert_array_equal(mask, layer.weight_mask.numpy().astype(bool))


def hardware_rows(values, mask):
    """Returns the masked kernel of a convolution as the matrix (outputs, inputs) of a GPU."""
    return np.where(mask, values, 0).transpose(3, 0, 1, 2).reshape(values.shape[-1], -1)


@pytest.mark.once
def test_two_of_four_are_neighbors_in_the_rows_that_hardware_reads():
    values = np.random.default_rng(0).normal(size=(3, 3, 16, 64)).astype(np.float32)
    mask = update("large_final", {"k": kernel(values)}, structure="2:4")["k"]
    groups = hardware_rows(values, mask).reshape(-1, 4)
    assert set(np.count_nonzero(groups, axis=1)) == {2}


@pytest.mark.once("tensorflow", "torch")  # Where torch is installed.
def test_two_of_four_run_on_sparse_tensor_cores():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("Needs a GPU with sparse tensor cores.")
    values = np.random.default_rng(0).normal(size=(3, 3, 64, 128)).astype(np.float32)
    mask = update("large_final", {"k": kernel(values)}, structure="2:4")["k"]
    dense = torch.tensor(hardware_rows(values, mask), dtype=torch.float16, device="cuda")
    sparse = torch.sparse.to_sparse_semi_structured(dense)
    assert torch.equal(sparse.to_dense(), dense)
    x = torch.randn(dense.shape[1], 64, dtype=torch.float16, device="cuda")
    torch.testing.assert_close(sparse @ x, dense @ x, rtol=1e-2, atol=1e-1)


# --- Ties and rules -------------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize(("structure", "amount"), [("2:4", {}), ("units", {"rate": 0.5})])
def test_ties_are_broken_by_the_seed(structure, amount):
    weights = {"k": kernel(np.ones((8, 8)))}
    masks = [
        update("large_final", weights, structure=structure, seed=seed, **amount)["k"]
        for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(masks[0], masks[1])
    assert (masks[0] != masks[2]).any()
    assert {int(mask.sum()) for mask in masks} == {32}


@pytest.mark.once
def test_tied_weights_of_a_group_are_kept_equally_often():
    weights = {"k": kernel(np.ones((4, 3000)))}
    mask = update("large_final", weights, structure="1:4")["k"]
    np.testing.assert_allclose(mask.mean(axis=1), 0.25, atol=0.04)


@pytest.mark.once
def test_rounds_of_rates_and_sparsities_count_tiles():
    rng = np.random.default_rng(0)
    values, mask = distinct(rng, 3, 3, 4, 20), None
    for rate, left in [(0.2, 16), (0.25, 12), (0.29, 9)]:
        mask = update("large_final", {"k": kernel(values, mask)}, rate=rate, structure="filters")
        mask = mask["k"]
        assert mask.all(axis=(0, 1, 2)).sum() == mask.any(axis=(0, 1, 2)).sum() == left
    weights = {"k": kernel(values, mask)}
    assert update("large_final", weights, sparsity=0.7, structure="filters")["k"].sum() == 36 * 6
    with pytest.raises(ValueError, match="already sparser: 11 of 20 tiles are pruned"):
        update("large_final", weights, sparsity=0.5, structure="filters")
    weights |= {"head": kernel(values)}
    masks = update("large_final", weights, rate={"head": 0, "default": 1 / 3}, structure="filters")
    assert [int(mask.sum()) for mask in masks.values()] == [36 * 6, 36 * 20]


@pytest.mark.once
@pytest.mark.parametrize("name", BY_RECORDS)
@pytest.mark.parametrize("structure", ["2:4", "filters", structures.Blocks((2, 2), "max")])
def test_structures_work_with_all_criteria_that_need_only_records(name, structure):
    rng = np.random.default_rng(0)
    weights = {
        path: Weights(
            mask=np.ones((8, 8), bool),
            **{name: rng.normal(size=(8, 8)) for name in criteria.RECORDS},
        )
        for path in "ab"
    }
    amount = {} if structure == "2:4" else {"sparsity": 0.5}
    masks = update(name, weights, structure=structure, **amount)
    assert sum(mask.sum() for mask in masks.values()) == 64
    if structure != "2:4":
        (again,) = selection.update_many(name, weights, sparsities=[0.5], structure=structure)
        assert all((again[path] == masks[path]).all() for path in masks)


@pytest.mark.once
def test_arguments_that_conflict_with_a_structure_are_refused():
    weights = {"k": kernel(np.ones((8, 8)))}
    for amount in ({"rate": 0.5}, {"sparsity": 0.5}, {"scope": "layer"}, {"distribution": "erk"}):
        with pytest.raises(ValueError, match=rf"Leave out: .*{next(iter(amount))}"):
            update("large_final", weights, structure="2:4", **amount)
    with pytest.raises(ValueError, match=r"Leave out: .*sparsities"):
        selection.update_many("large_final", weights, sparsities=[0.5], structure="2:4")
    with pytest.raises(ValueError, match=r'Outputs.*contradicts scope="output"'):
        update("large_final", weights, rate=0.5, structure="filters", scope="output")
    whole = dataclasses.replace(weights["k"], input_norm=np.ones((8, 8)))
    with pytest.raises(ValueError, match=r"'wanda'.*Use N:M, or another criterion"):
        update("wanda", {"k": whole}, rate=0.5, structure="filters")
    with pytest.raises(ValueError, match="exactly one of"):
        update("large_final", weights, structure="filters")


@pytest.mark.once
def test_scores_of_nan_or_of_another_shape_are_errors():
    weights = {"k": kernel(np.ones((4, 4)))}
    for structure, amount in (("2:4", {}), ("filters", {"rate": 0.5})):
        with pytest.raises(ValueError, match="on 'k': NaN among the scores"):
            update(lambda group: group.final * np.nan, weights, structure=structure, **amount)
        with pytest.raises(ValueError, match=r"shape \(1,\) for 16 weights"):
            update(lambda group: group.final[:1], weights, structure=structure, **amount)


# --- Get and register -----------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize(
    ("identifier", "expected"),
    [
        ("2:4", structures.NOfM(2, 4)),
        ("1:16", structures.NOfM(1, 16)),
        ("4x1", structures.Blocks((4, 1))),
        ("filters", structures.Outputs()),
        ("units", structures.Outputs()),
        ({"name": "filters", "pooling": "max"}, structures.Outputs("max")),
        ({"name": "blocks", "block_size": [1, 8]}, structures.Blocks((1, 8))),
    ],
)
def test_every_form_round_trips(identifier, expected):
    structure = structures.get(identifier)
    assert structure == expected
    assert structures.get(structure) is structure
    assert structures.get(structure.get_config()) == structure
    assert type(structure).from_config(structure.get_config()) == structure
    assert structures.get(keras.saving.serialize_keras_object(structure)) == structure
    assert structure.name == structure.get_config()["name"]
    assert {structure: 1}[structures.get(identifier)] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        structure.pooling = "max"


@pytest.mark.once
@pytest.mark.parametrize(
    "identifier",
    [
        *("4:4", "0:4", "5:4", "0x4", "2:4:8", "stripes", None, 4, {}, structures.Outputs),
        {"name": "n_of_m", "n": 2.0, "m": 4},
        {"name": "blocks", "block_size": [4]},
        {"name": "blocks", "block_size": [4, 1], "pooling": "median"},
        {"name": "filters", "size": 3},
    ],
)
def test_errors_quote_identifiers_that_are_not_structures(identifier):
    with pytest.raises(ValueError, match=r"Received|Unknown structure|cannot be created"):
        structures.get(identifier)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(structures, "_REGISTRY", structures._REGISTRY.copy())


@pytest.mark.once
def test_a_registered_function_works_by_name(registry):
    @structures.register("my_rows")
    def my_rows(layout):
        return (1, 1, layout.sizes[2]) if layout.inputs else None

    assert structures.names()[-1] == "my_rows"  # In the order of registration.
    values = [[1, 2], [3, 4], [0, 6]]
    weights = {"k": kernel(values), "b": kernel([1, 2])}
    for identifier in ("my_rows", my_rows, {"name": "my_rows", "pooling": "average"}):
        masks = update("large_final", weights, rate=0.4, structure=identifier)
        np.testing.assert_array_equal(masks["k"], [[0, 0], [1, 1], [1, 1]])
        assert masks["b"].all()
    by_maximum = {"name": "my_rows", "pooling": "max"}
    mask = update("large_final", weights, rate=0.7, structure=by_maximum)["k"]
    np.testing.assert_array_equal(mask, [[0, 0], [0, 0], [1, 1]])
    structure = structures.get(by_maximum)
    assert structure.get_config() == by_maximum
    assert structures.get(structure.get_config()) == structure == structures.Tiles(my_rows, "max")
    with pytest.raises(ValueError, match=r"taken by .*\.Outputs"):
        structures.register("outputs")(my_rows)


@pytest.mark.once
def test_a_registered_class_works_by_name(registry):
    @structures.register("best")
    @dataclasses.dataclass(frozen=True)
    class Best(structures.Structure):
        """Keeps the best weight of every output."""

        kept = 1

        def applies(self, layout):
            return bool(layout.inputs)

        def tile(self, layout):
            return layout.sizes[0], layout.sizes[1], 1

    mask = update("large_final", {"k": kernel([[1, 4], [3, 2]])}, structure="best")["k"]
    np.testing.assert_array_equal(mask, [[0, 1], [1, 0]])
    assert structures.get(structures.get("best").get_config()) == Best()


@pytest.mark.once
@pytest.mark.parametrize("tile", [3, (1, 2), (1, 0, 1), (1, 1.5, 1)])
def test_errors_quote_what_is_not_a_tile(tile):
    def odd(layout):
        return tile

    with pytest.raises(ValueError, match=rf"'odd' must return .* Received: {re.escape(str(tile))}"):
        update("large_final", {"k": kernel(np.ones((4, 4)))}, rate=0.5, structure=odd)


# --- On a model -----------------------------------------------------------------------------------


def test_input_axes_are_the_axes_that_layers_sum_over():
    zeros = {"kernel_initializer": "zeros"}
    made = [
        (layers.Dense(4, **zeros), (2, 8), (-2,)),
        (layers.Conv2D(4, 3, **zeros), (2, 8, 8, 4), (-2,)),
        (layers.Conv2DTranspose(4, 3, **zeros), (2, 8, 8, 4), (-1,)),
        (layers.DepthwiseConv2D(3, depthwise_initializer="zeros"), (2, 8, 8, 4), ()),
        (layers.Embedding(8, 4, embeddings_initializer="zeros"), (2, 3), ()),
        (layers.EinsumDense("abcd,cde->abe", (None, 5), **zeros), (2, 3, 4, 6), (-3, -2)),
        (layers.EinsumDense("abc,cde->abde", (None, 4, 5), **zeros), (2, 3, 6), (-3,)),
        (layers.SimpleRNNCell(4, recurrent_initializer="zeros", **zeros), (2, 8), (-2,)),
    ]
    for layer, shape, expected in made:
        layer.build(shape)
        name = "embeddings" if isinstance(layer, layers.Embedding) else "kernel"
        assert input_axes(layer, name) == expected
    assert input_axes(layers.Dense(4), "bias") == ()
    separable = layers.SeparableConv2D(4, 3)
    assert input_axes(separable, "depthwise_kernel") == ()
    assert input_axes(separable, "pointwise_kernel") == (-2,)


def test_shrink_removes_the_filters_that_were_pruned():
    keras.utils.set_random_seed(0)
    model = ml.convert_to_masked(
        keras.Sequential(
            [
                keras.Input((6, 6, 3)),
                layers.Conv2D(8, 3, activation="relu"),
                layers.Flatten(),
                layers.Dense(10, activation="relu"),
                layers.Dense(4, name="head"),
            ]
        )
    )
    pruner = LotteryTicketPruner(model)
    rates = {"head": 0.0, "default": 0.5}
    report = pruner.update_masks("large_init", rate=rates, structure="filters")
    # The dense layers also lose the inputs that they read from pruned filters and units.
    assert [row.sparsity for row in report] == [0.5, 0.75, 0.5]
    small = ml.shrink(model)
    assert small.layers[0].filters == 4
    assert small.layers[2].units == 5
    assert small.count_params() < model.count_params() / 3
    x = np.random.default_rng(0).normal(size=(5, 6, 6, 3)).astype("float32")
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(small(x)), keras.ops.convert_to_numpy(model(x)), atol=1e-5
    )


def test_weights_without_tiles_are_not_changed_and_are_logged(caplog):
    model = keras.Sequential(
        [keras.Input((5,)), layers.Embedding(8, 4, name="words"), layers.Dense(6, name="dense")]
    )
    model = ml.convert_to_masked(model)
    pruner = LotteryTicketPruner(model)
    with caplog.at_level(logging.WARNING, "lottery_ticket_pruner"):
        report = pruner.update_masks("large_init", structure="2:4")
    assert {row.path: row.sparsity for row in report} == {
        "words/embeddings": 0.0,
        "dense/kernel": 0.5,
    }
    assert "words/embeddings" in caplog.text
    masks = ml.get_masks(model)
    with pytest.raises(ValueError, match="does not apply to any"):
        LotteryTicketPruner(
            ml.convert_to_masked(keras.Sequential([keras.Input((5,)), layers.Embedding(8, 4)]))
        ).update_masks("large_init", structure="2:4")
    # Each group already has as many weights as the next round keeps, so nothing changes.
    pruner.update_masks("small_init", structure="2:4")
    assert all((ml.get_masks(model)[path] == masks[path]).all() for path in masks)

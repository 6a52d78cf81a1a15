"""The migration page: its calls of tfmot and of this library, run unchanged."""

import importlib.util

import keras
import numpy as np
import pytest

import masked_layers
import pages
from lottery_ticket_pruner.interop.tfmot import import_tfmot

pytestmark = pytest.mark.once

PAGE = "migrating-from-tfmot.md"
BLOCKS = pages.blocks(PAGE)
IMPORTS, CONVERSION = (code for kind, code in BLOCKS if not kind)
THEIRS, OURS = ([code for kind, code in BLOCKS if kind == which] for which in ("tfmot", "here"))
DATA = {
    "x": np.random.default_rng(0).normal(size=(64, 8)).astype("float32"),
    "y": np.zeros((64, 4), "float32"),
}


def network(library, pointwise=False):
    layers = library.layers
    library.utils.set_random_seed(0)
    if pointwise:
        return library.Sequential(
            [
                layers.Input((8, 8, 3)),
                layers.ZeroPadding2D(1),
                layers.Conv2D(4, 3, strides=2),
                layers.Conv2D(4, 1),
                layers.GlobalAveragePooling2D(keepdims=True),
            ]
        )
    return library.Sequential(
        [layers.Input((8,)), layers.Dense(16, "relu", name="hidden"), layers.Dense(4)]
    )


@pytest.fixture(scope="module")
def tfmot():
    pytest.importorskip("tf_keras")
    if importlib.util.find_spec("tensorflow_model_optimization") is None:
        pytest.skip("TensorFlow Model Optimization is not installed")
    return import_tfmot()


def run(code, **names):
    return pages.run(PAGE, code, names)


def ours(number, tmp_path):
    names = run(IMPORTS)
    model = network(keras, pointwise=number == 6)
    return run(OURS[number], **names, **DATA, model=model, log_dir=str(tmp_path))


def theirs(number, tfmot, tmp_path):
    import tf_keras

    return run(
        THEIRS[number],
        **DATA,
        tfmot=tfmot,
        tf_keras=tf_keras,
        model=network(tf_keras, pointwise=number == 6),
        log_dir=str(tmp_path),
    )


def their_masks(model):
    return [m.numpy() != 0 for layer in model.layers if hasattr(layer, "pruning_vars")
            for _, m, _ in layer.pruning_vars]  # fmt: skip


def test_the_page_has_both_calls_for_everything():
    assert len(THEIRS) == len(OURS) == 7


def test_gradual_pruning_reaches_the_same_sparsity(tfmot, tmp_path):
    one, other = theirs(0, tfmot, tmp_path)["model"], ours(0, tmp_path)["model"]
    # As soon as 20 steps are over, a batch later with them: 3 epochs of 2 batches are 6 steps.
    assert one.layers[0].pruning_step.numpy() == 6
    sparsity = 0.8 - 0.8 * 0.75**3  # at step 5
    masks = masked_layers.get_masks(other).values()
    for mask, their in zip(masks, their_masks(one), strict=True):
        assert (~mask).sum() == int(sparsity * mask.size + 1e-6)
        assert abs((~their).sum() - (~mask).sum()) <= 1


def test_a_converted_model_continues(tfmot, tmp_path):
    wrapped = theirs(0, tfmot, tmp_path)["model"]
    masked = run(CONVERSION, tf_keras_model=wrapped)["masked"]
    masked.fit(**DATA, verbose=0)
    assert masked_layers.sparsity_report(masked).sparsity > 0.4


@pytest.mark.parametrize("number", [1, 3, pytest.param(6, marks=pytest.mark.slow)])
def test_the_same_weights_are_masked(tfmot, tmp_path, number):
    one, other = theirs(number, tfmot, tmp_path), ours(number, tmp_path)
    shapes = [mask.shape for mask in their_masks(one["model"])]
    assert [m.shape for m in masked_layers.get_masks(other["model"]).values()] == shapes
    if number == 3:
        assert [w.shape for w in one["final"].get_weights()] == [
            w.shape for w in other["final"].get_weights()
        ]


@pytest.mark.parametrize("number", [4, 5])
def test_structures_are_the_same(tfmot, tmp_path, number):
    one, other = theirs(number, tfmot, tmp_path)["model"], ours(number, tmp_path)
    masked = other["model"]
    kernels = [layer.layer.kernel for layer in one.layers]
    for ref, kernel in zip(masked_layers.masked_refs(masked), kernels, strict=True):
        kernel.assign(keras.ops.convert_to_numpy(ref.variable))
    for layer in one.layers:
        if number == 4:
            new = layer.pruning_obj._update_mask_sparsity_m_by_n(layer.layer.kernel, (1, 4))
        else:
            _, new = layer.pruning_obj._maybe_update_block_mask(layer.layer.kernel)
        layer.pruning_vars[0][1].assign(new)
    if number == 4:
        masked_layers.set_masks(
            masked, {path: np.ones_like(m) for path, m in masked_layers.get_masks(masked).items()}
        )
        run(OURS[4].splitlines()[1], **run(IMPORTS), model=masked)
    else:
        other["pruning"].advance(0)
    masks = masked_layers.get_masks(masked).values()
    assert all(np.array_equal(a, b) for a, b in zip(masks, their_masks(one), strict=True))


def test_summaries_have_the_sparsity(tfmot, tmp_path):
    pytest.importorskip("tensorboard")
    theirs(2, tfmot, tmp_path)
    names = ours(2, tmp_path)
    names["model"].compile("adam", "mse")
    history = names["model"].fit(**DATA, verbose=0, callbacks=names["callbacks"]).history
    assert history["sparsity"] == [0.5]
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("events*"))
    assert b"epoch_sparsity" in written

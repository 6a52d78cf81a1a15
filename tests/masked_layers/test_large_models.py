"""Steps that read one weight after the other, so that large models fit into memory."""

import zlib

import keras
import numpy as np
import pytest

import masked_layers as ml
from masked_layers import ticket_format
from masked_layers.streams import gaps_between, planes_of

pytestmark = pytest.mark.once


@pytest.mark.parametrize("density", [0.0, 0.002, 0.5, 1.0])
def test_streams_of_tickets_are_those_of_all_weights_joined(density, monkeypatch):
    monkeypatch.setattr(ticket_format, "CHUNK", 100)
    rng = np.random.default_rng(0)
    entries = []
    for number, shape in enumerate([(30, 40), (7,), (300, 5), (4, 4)]):
        values = rng.standard_normal(shape).astype("float32")
        kept = None if number == 1 else rng.random(shape) < density
        flat = values.ravel() if kept is None else values[kept]
        entry = ticket_format.Entry(
            path=str(number), shape=shape, dtype="float32", kept=kept, values=flat
        )
        entries.append(entry)
    masks = np.concatenate([e.kept.ravel() for e in entries if e.kept is not None])
    positions = np.flatnonzero(masks)
    behind = masks.size - 1 - (positions[-1] if positions.size else -1)
    np.testing.assert_array_equal(ticket_format._gaps(entries), gaps_between(positions, behind))
    (packed,) = ticket_format._packed_values(entries).values()
    both = [
        planes_of(np.concatenate([e.values for e in entries if (e.kept is None) == plain]))
        for plain in (False, True)
    ]
    expected = b"".join(part.tobytes() for planes in zip(*both, strict=True) for part in planes)
    assert zlib.decompress(packed) == expected


def test_masks_do_not_share_memory_with_the_arrays_that_they_are_set_to():
    layer = keras.layers.Dense(16, name="d")
    model = ml.convert_to_masked(keras.Sequential([keras.Input((16,)), layer]), inplace=True)
    mask = np.eye(16, dtype=bool)
    ml.set_masks(model, {"d/kernel": mask})
    mask[:] = True
    assert ml.sparsity_report(model).alive == 16

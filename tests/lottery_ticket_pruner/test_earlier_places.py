"""Public names that have moved are still available at their old places, with a warning."""

import sys

import pytest

from lottery_ticket_pruner import evidence, training

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("place", "new", "names"),
    [
        ("activations", evidence, ["input_norms"]),
        ("augmentation", training, ["Augmentation", "CropAndFlip"]),
        ("data", training, ["arrays_of", "pair_of"]),
        ("engine", training, ["engine_of"]),
        ("examples", training, ["Examples"]),
        ("flow", evidence, ["SynapticFlow"]),
        ("gradients", evidence, ["hessian_gradients", "loss_gradients"]),
    ],
)
def test_an_earlier_place_warns_where_it_is_imported(place, new, names, monkeypatch):
    place = f"lottery_ticket_pruner.{place}"
    monkeypatch.delitem(sys.modules, place, raising=False)
    with pytest.warns(DeprecationWarning, match=f"{place}` will be removed") as caught:
        __import__(place)
    assert [warning.filename for warning in caught] == [__file__]
    assert all(getattr(sys.modules[place], name) is getattr(new, name) for name in names)

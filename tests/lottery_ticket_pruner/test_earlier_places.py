"""Public names that have moved or changed are still available as before, with a warning."""

import sys

import pytest

from lottery_ticket_pruner import evidence, training

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("place", "new", "names"),
    [
        ("activations", evidence, ["input_norms"]),
        ("augmentation", training, ["Augmentation", "CropAndFlip"]),
        ("data", training, ["pair_of"]),
        ("engine", training, ["engine_of"]),
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


@pytest.mark.parametrize(
    ("place", "name", "new"),
    [
        ("examples", "Examples", "ArrayDataset"),
        ("data", "arrays_of", "to_arrays"),
    ],
)
def test_an_earlier_name_warns_where_it_is_used(place, name, new, monkeypatch):
    renamed = getattr(training, new)
    message = f"`lottery_ticket_pruner.training.{name}` was renamed to `{new}`"
    with pytest.warns(DeprecationWarning, match=message) as caught:
        assert getattr(training, name) is renamed
    assert [warning.filename for warning in caught] == [__file__]
    assert name not in training.__all__
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        training.other  # noqa: B018

    place = f"lottery_ticket_pruner.{place}"
    monkeypatch.delitem(sys.modules, place, raising=False)
    with pytest.warns(DeprecationWarning, match=f"{place}` will be removed"):
        __import__(place)
    assert getattr(sys.modules[place], name) is renamed

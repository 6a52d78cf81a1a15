"""Public names that have moved are still available at their old places, with a warning."""

import sys

import pytest

from lottery_ticket_pruner import training

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("place", "names"),
    [
        ("lottery_ticket_pruner.augmentation", ["Augmentation", "CropAndFlip"]),
        ("lottery_ticket_pruner.data", ["arrays_of", "pair_of"]),
    ],
)
def test_an_earlier_place_warns_where_it_is_imported(place, names, monkeypatch):
    monkeypatch.delitem(sys.modules, place, raising=False)
    with pytest.warns(DeprecationWarning, match=f"{place}` will be removed") as caught:
        __import__(place)
    assert [warning.filename for warning in caught] == [__file__]
    assert all(getattr(sys.modules[place], name) is getattr(training, name) for name in names)

"""What counts as the same run, for one that was interrupted to go on."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("tyro")

from lottery_ticket_pruner.experiments.datasets import Dataset
from lottery_ticket_pruner.experiments.resumption import Resumption

pytestmark = pytest.mark.once


class Large(np.ndarray):
    """An array of which there is no room for another."""

    def __deepcopy__(self, memo):
        raise MemoryError


DATA = Dataset("own", *(np.full((3, 2), n).view(Large) for n in range(6)))
VALUES = {"steps": 3, "seeds": (1, 2), "out": "a", "quiet": False}
MASKS = {1: {"hidden/kernel": np.eye(2, dtype=bool)}, 2: {"hidden/kernel": np.ones((2, 2), bool)}}


def test_a_run_goes_on_by_its_choices_data_and_masks_until_it_ends(tmp_path):
    one = Resumption(tmp_path, VALUES, DATA, MASKS)
    assert not one.is_possible()
    one.begin()
    other_data = dataclasses.replace(DATA, y_test=DATA.y_test + 1)
    exchanged = {1: MASKS[2], 2: MASKS[1]}
    for same, arguments in (
        (True, (VALUES, DATA, MASKS)),
        (True, (VALUES | {"out": "b", "quiet": True}, DATA, MASKS)),
        (True, (VALUES, dataclasses.replace(DATA, name="renamed"), MASKS)),
        (False, (VALUES | {"steps": 4}, DATA, MASKS)),
        (False, (VALUES, other_data, MASKS)),
        (False, (VALUES, DATA, exchanged)),
        (False, (VALUES, DATA)),
    ):
        assert Resumption(tmp_path, *arguments).is_possible() == same
    assert "Going on" in one.describe()
    (tmp_path / "state.json").write_text("{")
    assert not one.is_possible()
    assert "Replacing" in Resumption(tmp_path, VALUES, DATA).describe()
    one.begin()
    one.end()
    assert not one.is_possible()


def test_the_folder_of_another_command_is_refused(tmp_path):
    Resumption(tmp_path, VALUES | {"rounds": 2}, DATA).begin()
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match="results of `lottery-ticket run`"):
        Resumption(tmp_path, VALUES | {"learn": None}, DATA)
    assert (tmp_path / "config.json").read_text() == before
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").touch()
    with pytest.raises(ValueError, match="folder of a sweep"):
        Resumption(tmp_path / "sweep", VALUES, DATA)
    assert "Replacing" in Resumption(tmp_path, VALUES | {"rounds": 3}, DATA).describe()
    assert "Results go to" in Resumption(tmp_path / "b", VALUES, DATA).describe()

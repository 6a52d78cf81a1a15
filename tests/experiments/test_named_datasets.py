"""The table of data sets with names: one entry is enough for a new one, in every place."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("tyro")

from lottery_ticket_pruner.experiments import datasets, networks
from lottery_ticket_pruner.experiments.config import RunConfig
from lottery_ticket_pruner.experiments.downloads import Found
from lottery_ticket_pruner.experiments.workbench import compiled_network, load_and_resolve

pytestmark = pytest.mark.once


@pytest.fixture
def flowers(monkeypatch):
    """A data set of 4 features and 3 classes, added as a contributor would."""
    rng = np.random.default_rng(0)

    def read(data_dir):
        labels = np.arange(60) % 3
        x = rng.normal(size=(60, 4)).astype("float32") + labels[:, None]
        return Found("flowers", None, (x[:48], labels[:48], x[48:], labels[48:]))

    named = datasets.Named(
        read, 3, "lenet-300-100", is_image=False, is_small=True, is_downloaded=False
    )
    monkeypatch.setitem(datasets.NAMED, "flowers", named)
    return named


def test_digits_have_the_bits_of_earlier_versions():
    assert datasets.load("digits").digest == "7a7d316c508dd3db"


def test_every_entry_names_a_network_that_there_is():
    for name, named in datasets.NAMED.items():
        assert named.network in networks.NAMES
        assert not datasets.is_own(name)
        assert RunConfig(data=name).resolve(1000).network == named.network
    assert tuple(datasets.NAMED) == datasets.NAMES
    assert set(datasets.IMAGES) == {name for name, one in datasets.NAMED.items() if one.is_image}


def test_an_entry_is_enough_for_a_data_set(flowers):
    config, data = load_and_resolve(RunConfig(data="flowers"))
    assert (data.input_shape, data.classes) == ((4,), 3)
    assert (len(data.x_train), len(data.x_validation), len(data.x_test)) == (44, 4, 12)
    chosen = (config.network, config.steps, config.rounds, config.rate)
    assert chosen == ("lenet-300-100", 600, 9, 0.36)
    assert compiled_network(config, data, 0).output_shape == (None, 3)


def test_convolutions_on_data_without_images_are_refused(flowers):
    with pytest.raises(ValueError, match="--network conv-4 needs images, and flowers has none"):
        RunConfig(data="flowers", network="conv-4").resolve(44)


def test_labels_beyond_the_classes_of_an_entry_are_refused(flowers, monkeypatch):
    monkeypatch.setitem(datasets.NAMED, "flowers", dataclasses.replace(flowers, classes=2))
    with pytest.raises(ValueError, match="flowers"):
        datasets.load("flowers")

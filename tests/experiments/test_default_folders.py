"""Names of the folders of default runs, with which earlier versions made theirs."""

import pytest

pytest.importorskip("tyro")

from lottery_ticket_pruner.experiments.config import RunConfig
from lottery_ticket_pruner.experiments.instability import InstabilityConfig
from lottery_ticket_pruner.experiments.supermask import SupermaskConfig

# A changed name means that an interrupted run of an earlier version is not resumed.
NAMES = {
    "digits-lenet-300-100-large_final-6dfe5efd": RunConfig(),
    "mnist-lenet-300-100-large_final-a4e0f085": RunConfig(data="mnist"),
    "fashion_mnist-lenet-300-100-large_final-24b5cc78": RunConfig(data="fashion_mnist"),
    "cifar10-conv-2-large_final-29b8145f": RunConfig(data="cifar10"),
    "cifar10_reduced_10x-conv-2-large_final-b15511cd": RunConfig(data="cifar10_reduced_10x"),
    "own.py-cifar10-lenet-300-100-large_final-326f3f0f": RunConfig(data="own.py:cifar10"),
    "digits-conv-2-large_final-07b6bb37": RunConfig(network="conv-2"),
    "cifar10-resnet-20-large_final-c82074b5": RunConfig(data="cifar10", network="resnet-20"),
    "digits-lenet-300-100-untrained-masks-a2e4f6a1": SupermaskConfig(),
    "digits-lenet-300-100-bernoulli-masks-99c1c70f": SupermaskConfig(learn="bernoulli"),
    "digits-lenet-300-100-edge_popup-masks-25777b48": SupermaskConfig(learn="edge_popup"),
    "digits-lenet-300-100-instability-b03641fe": InstabilityConfig(),
    "mnist-lenet-300-100-instability-fa8b4490": InstabilityConfig(data="mnist"),
}


@pytest.mark.once
@pytest.mark.parametrize("name", NAMES)
def test_the_folder_of_a_default_run_keeps_its_name(name):
    assert NAMES[name].resolve(1000).name == name

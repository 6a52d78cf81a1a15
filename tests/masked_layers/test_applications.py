"""Kinds of models in `keras.applications`; `benchmarks.checks.conversion` has all of them."""

import importlib.util
from pathlib import Path

import keras
import pytest

import masked_layers as ml

spec = importlib.util.spec_from_file_location(
    "conversion_benchmark", Path(__file__).parents[2] / "benchmarks" / "checks" / "conversion.py"
)
conversion = importlib.util.module_from_spec(spec)
spec.loader.exec_module(conversion)

SMALLEST = {
    "convnext": "ConvNeXtTiny",
    "efficientnet_v2": "EfficientNetV2B0",
    "mobilenet_v3": "MobileNetV3Small",
    "resnet": "ResNet50",
    "vgg16": "VGG16",
    "xception": "Xception",
}
# These take a few seconds each, and the others half a minute.
QUICK = ("mobilenet_v3", "vgg16")
# Families of the same kinds of layers as one of these, or with more that have no weights.
ALIKE = {
    "densenet": "resnet",
    "efficientnet": "efficientnet_v2",
    "inception_resnet_v2": "resnet",
    "inception_v3": "resnet",
    "mobilenet": "mobilenet_v3",
    "mobilenet_v2": "mobilenet_v3",
    "nasnet": "xception",
    "resnet_v2": "resnet",
    "vgg19": "vgg16",
}

# Only on the main backend. The benchmark checks them on any, and
# `test_layers` each of their layers.
pytestmark = pytest.mark.once


def test_every_family_has_its_member_here():
    families = conversion.families()
    assert set(families) == set(SMALLEST) | set(ALIKE)
    assert set(ALIKE.values()) <= set(SMALLEST)
    assert all(SMALLEST[family] in families[family] for family in SMALLEST)


@pytest.mark.usefixtures("nothing_drawn")
@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[pytest.mark.slow] * (f not in QUICK)) for f in sorted(SMALLEST)],
)
def test_outputs_are_the_same_bits(family, monkeypatch):
    monkeypatch.setattr(conversion, "SIDE", 75)  # The smallest size that all of them accept.
    plain = conversion.randomized(SMALLEST[family])
    masked = ml.convert_to_masked(plain)
    assert len(ml.get_masks(masked)) > 5
    difference, spread = conversion.largest_difference(plain, masked, conversion.images())
    assert spread > 1e-3
    assert difference == 0
    keras.backend.clear_session()

"""A small member of each family of `keras.applications`; all: `benchmarks.checks.conversion`."""

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
    "densenet": "DenseNet121",
    "efficientnet": "EfficientNetB0",
    "efficientnet_v2": "EfficientNetV2B0",
    "inception_resnet_v2": "InceptionResNetV2",
    "inception_v3": "InceptionV3",
    "mobilenet": "MobileNet",
    "mobilenet_v2": "MobileNetV2",
    "mobilenet_v3": "MobileNetV3Small",
    "nasnet": "NASNetMobile",
    "resnet": "ResNet50",
    "resnet_v2": "ResNet50V2",
    "vgg16": "VGG16",
    "vgg19": "VGG19",
    "xception": "Xception",
}
# All of them take a minute, so only on the main backend. The benchmark checks them on any.
EVERYWHERE = {"mobilenet_v3"}


@pytest.mark.once
def test_every_family_has_its_member_here():
    families = conversion.families()
    assert set(families) == set(SMALLEST)
    assert all(SMALLEST[family] in names for family, names in families.items())


@pytest.mark.usefixtures("nothing_drawn")
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[] if family in EVERYWHERE else pytest.mark.once)
        for family in sorted(SMALLEST)
    ],
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

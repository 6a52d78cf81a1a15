"""One small member of each family of `keras.applications`; `benchmarks.conversion` has them all."""

import importlib.util
from pathlib import Path

import keras
import pytest

spec = importlib.util.spec_from_file_location(
    "conversion_benchmark", Path(__file__).parents[1] / "benchmarks" / "conversion.py"
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
# The large ones take half a minute each where layers are not compiled: once, on the main backend.
QUICK = {"mobilenet", "mobilenet_v3", "resnet", "efficientnet"}


def test_every_family_has_its_member_here():
    families = conversion.families()
    assert set(families) == set(SMALLEST)
    assert all(SMALLEST[family] in names for family, names in families.items())


@pytest.mark.parametrize("family", sorted(SMALLEST))
def test_outputs_are_the_same_bits(family):
    if keras.backend.backend() != "tensorflow" and family not in QUICK:
        pytest.skip("checked on TensorFlow; the benchmark checks it on any backend")
    row = conversion.check(SMALLEST[family])
    assert row.spread > 1e-3
    assert row.difference == 0
    assert row.stripped_difference == 0
    assert row.masked > 5
    keras.backend.clear_session()

"""Models of `keras.applications`, with the smallest images that each accepts."""

import functools

import keras

from benchmarks.conformance.makers import Maker

FAMILY = "keras.applications"
# One of each family first, then a second one of those that differ in more than depth.
FIRST = {
    "MobileNetV3Small": 32,
    "MobileNet": 32,
    "MobileNetV2": 32,
    "VGG16": 32,
    "ResNet50": 32,
    "ResNet50V2": 32,
    "Xception": 71,
    "DenseNet121": 32,
    "EfficientNetB0": 32,
    "EfficientNetV2B0": 32,
    "ConvNeXtTiny": 32,
    "InceptionV3": 75,
    "NASNetMobile": 32,
    "InceptionResNetV2": 75,
}
SECOND = {"MobileNetV3Large": 32, "VGG19": 32, "EfficientNetB1": 32, "EfficientNetV2S": 32}


def build(name: str, side: int):
    arguments = {"weights": None, "input_shape": (side, side, 3), "classes": 10}
    return getattr(keras.applications, name)(**arguments)


def makers() -> list[Maker]:
    return [
        Maker(name, FAMILY, functools.partial(build, name, side), legacy=True)
        for name, side in (FIRST | SECOND).items()
    ]

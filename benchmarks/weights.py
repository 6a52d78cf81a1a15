"""Contenders for `benchmarks.plan` without training: conversion, mask updates and memory."""

import ctypes
import functools
import gc
import sys
import time

import keras
import numpy as np
import psutil

import masked_layers as ml
from benchmarks.timing import peak_bytes, seconds
from lottery_ticket_pruner import LotteryTicketPruner


def network(quick):
    keras.utils.set_random_seed(0)
    side = 32 if quick else 224
    return keras.applications.ResNet50(weights=None, input_shape=(side, side, 3))


def conversion(quick):
    """Measures the seconds of `convert_to_masked` and `clone_model` for ResNet-50."""
    plain = network(quick)
    contenders = {
        "convert": seconds(lambda: ml.convert_to_masked(plain)),
        "clone": seconds(lambda: keras.models.clone_model(plain)),
    }
    for contender in contenders.values():
        contender()
    return contenders


def variables(quick):
    """Measures the megabytes of the variables of ResNet-50, masked and plain."""
    plain = network(quick)
    masked = ml.convert_to_masked(plain)
    return {"masked": lambda: _nbytes(masked), "plain": lambda: _nbytes(plain)}


def _nbytes(model):
    return sum(keras.ops.convert_to_numpy(variable).nbytes for variable in model.variables) / 1e6


def resident(quick, masks):
    """Measures the megabytes by which a masked or plain copy of ResNet-50 grows the process."""
    # Imports and creates everything that is needed only once for all models.
    ml.convert_to_masked(keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]))
    plain = network(quick)
    before = _resident()
    copy = ml.convert_to_masked(plain) if masks else keras.models.clone_model(plain)
    growth = _resident() - before
    del copy
    return {"resident": lambda: growth}


def _resident():
    gc.collect()
    if sys.platform == "linux":
        # Returns freed memory to the system, which the C library would keep.
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss / 1e6


RATE = 0.2
LAYERS = 10


def update(size):
    """Measures a global update that prunes a fifth of `size` weights in ten kernels.

    The contenders are the seconds of `update_masks` from full masks and of a second update, of
    `numpy.partition` and an argsort of the same magnitudes, and of a copy of them; the processor
    time of the first update and of `numpy.partition`; also the
    megabytes of the weights and the peak increase of the process' memory in a first update.
    """
    side = round((size / LAYERS) ** 0.5)
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(side, use_bias=False) for _ in range(LAYERS)]
    model = ml.convert_to_masked(keras.Sequential([keras.Input((side,)), *layers]))
    pruner = LotteryTicketPruner(model)
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign_add(rng.standard_normal(variable.shape, dtype="float32") / 100)
    pruner.set_pretrained_weights()
    kernels = [keras.ops.convert_to_numpy(variable) for variable in model.trainable_variables]
    magnitudes = np.abs(np.concatenate([kernel.ravel() for kernel in kernels]))
    copy = np.empty_like(magnitudes)
    drop = int(RATE * magnitudes.size)
    full = {path: np.ones(mask.shape, bool) for path, mask in ml.get_masks(model).items()}

    def again(clock=time.perf_counter):
        pruner.set_pretrained_weights()  # Otherwise the pruner warns that nothing was recorded.
        update = functools.partial(pruner.update_masks, "large_final", rate=RATE, scope="global")
        return seconds(update, clock=clock)()

    def first(clock=time.perf_counter):
        ml.set_masks(model, full)
        return again(clock)

    def partition():
        return np.partition(magnitudes, drop - 1)

    def second():
        first()
        return again()

    def peak():
        ml.set_masks(model, full)
        pruner.set_pretrained_weights()
        grown = peak_bytes(lambda: pruner.update_masks("large_final", rate=RATE, scope="global"))
        return grown / 1e6

    def argsort():
        """Finds the threshold by sorting all magnitudes, as the earlier library did."""
        joined = np.concatenate([np.abs(kernel).ravel() for kernel in kernels])
        threshold = joined[np.argsort(joined)[drop]]
        return [(np.abs(kernel) >= threshold).astype("float32") for kernel in kernels]

    first()
    return {
        "first": first,
        "second": second,
        "partition": seconds(partition),
        "first_processor": lambda: first(time.process_time),
        "partition_processor": seconds(partition, clock=time.process_time),
        "argsort": seconds(argsort),
        "copy": seconds(lambda: np.copyto(copy, magnitudes)),
        "peak": peak,
        "weights": lambda: magnitudes.nbytes / 1e6,
    }

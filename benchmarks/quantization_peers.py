"""Peers that train LeNet-300-100 with rounded weights, for `benchmarks.studies.quantized`.

Each runs in a separate process, since tfmot needs Keras 2, and is imported there only.
"""

import zlib

import numpy as np

from benchmarks.peers import WIDTHS

BATCH = 128
FIRST_RATE, LAST_RATE = 1.2e-3, 1e-3


def _arrays(data_dir, images):
    from lottery_ticket_pruner.experiments import datasets

    data = datasets.load("mnist", data_dir)
    x, x_test = (array.reshape(len(array), -1) for array in (data.x_train[:images], data.x_test))
    return x, data.y_train[:images], x_test, data.y_test


def _compile(keras, model, rate, steps, **kwargs):
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        **kwargs,
    )


def _result(outputs, labels, kernels, masks, content=b""):
    """Returns what is printed: `content` is the exported file, if there is one."""
    pruned = [kernel[~mask] for kernel, mask in zip(kernels, masks, strict=True)]
    return {
        "accuracy": 100 * float(np.mean(outputs.argmax(axis=-1) == labels)),
        "pruned": sum(values.size for values in pruned),
        "nonzero": sum(int(np.count_nonzero(values)) for values in pruned),
        "weights": sum(mask.size for mask in masks),
        "bytes": len(content),
        "deflated": len(zlib.compress(content, 9)),
    }


def tfmot(start, data_dir, images, epochs, seed):
    """Trains the network in `start` with the quantization of tfmot that preserves zeros (PQAT).

    `start` is an `.npz` file with the arrays of `get_weights`, in order. The int8 LiteRT file is
    judged: inputs and activations are rounded there, too.
    """
    import tensorflow as tf
    import tensorflow_model_optimization as library
    import tf_keras
    from tensorflow_model_optimization.python.core.quantization.keras.collab_opts.prune_preserve import (  # noqa: E501
        default_8bit_prune_preserve_quantize_scheme as schemes,
    )

    def result():
        x, y, x_test, y_test = _arrays(data_dir, images)
        tf_keras.utils.set_random_seed(seed)
        layers = [tf_keras.layers.Dense(units, "relu") for units in WIDTHS[1:-1]]
        model = tf_keras.Sequential(
            [tf_keras.layers.InputLayer(WIDTHS[:1]), *layers, tf_keras.layers.Dense(WIDTHS[-1])]
        )
        with np.load(start) as file:
            model.set_weights([file[name] for name in file.files])
        masks = [layer.kernel.numpy() != 0 for layer in model.layers]
        quantize = library.quantization.keras
        model = quantize.quantize_apply(
            quantize.quantize_annotate_model(model),
            schemes.Default8BitPrunePreserveQuantizeScheme(),
        )
        _compile(tf_keras, model, LAST_RATE, epochs * -(-len(x) // BATCH))
        model.fit(x, y, batch_size=BATCH, epochs=epochs, verbose=0)
        converter = tf.lite.TFLiteConverter.from_keras_model(model)
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        content = converter.convert()
        interpreter = tf.lite.Interpreter(model_content=content)
        (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()
        interpreter.resize_tensor_input(source["index"], x_test.shape)
        interpreter.allocate_tensors()
        # Kernels are stored with the outputs first.
        tensors = interpreter.get_tensor_details()
        kernels = [
            next(
                interpreter.get_tensor(tensor["index"]).T
                for tensor in tensors
                if tensor["dtype"] is np.int8 and tuple(tensor["shape"]) == mask.shape[::-1]
            )
            for mask in masks
        ]
        interpreter.set_tensor(source["index"], x_test.astype(np.float32))
        interpreter.invoke()
        return _result(interpreter.get_tensor(target["index"]), y_test, kernels, masks, content)

    return {"result": result}


def pquant(quantized, sparsity, data_dir, images, epochs, seed):
    """Trains with PQuantML's own steps and pruning: dense, pruned by PDP, and fine-tuned.

    It chooses masks by itself while it trains; those of this library are not given to it. Weights
    have 8 bits, and inputs and outputs of layers are not rounded, as in this library. The final
    Keras model is judged; it is not exported.
    """
    import keras
    import pquant as library

    def result():
        x, y, x_test, y_test = _arrays(data_dir, images)
        keras.utils.set_random_seed(seed)
        config = library.pdp_config()
        config.pruning_parameters.sparsity = sparsity
        # The sparsity grows by this share in each epoch, so that the last one has all of it.
        config.pruning_parameters.epsilon = 1 / max(epochs - 1, 1)
        config.quantization_parameters.enable_quantization = quantized
        config.quantization_parameters.granularity = "per_channel"
        config.quantization_parameters.quantize_input = False
        for name in ("pretraining_epochs", "epochs", "fine_tuning_epochs"):
            setattr(config.training_parameters, name, epochs)
        inputs = outputs = keras.Input(WIDTHS[:1])
        for units in WIDTHS[1:-1]:
            outputs = keras.layers.ReLU()(keras.layers.Dense(units)(outputs))
        outputs = keras.layers.Dense(WIDTHS[-1])(outputs)
        model = keras.Model(inputs, outputs)
        model = library.add_compression_layers(model, config, (None, *WIDTHS[:1]))

        def train(model, epoch, **_):
            if int(epoch) % epochs == 0:  # the next stretch, with its own learning rates
                rate = LAST_RATE if int(epoch) // epochs == 2 else FIRST_RATE
                steps = epochs * -(-len(x) // BATCH)
                _compile(keras, model, rate, steps, jit_compile=False)
            model.fit(x, y, batch_size=BATCH, verbose=0)

        model = library.train_model(model, config, train, lambda *_, **__: None)
        masks = [
            keras.ops.convert_to_numpy(variable).T != 0
            for variable in model.variables
            if variable.name == "mask"
        ]
        model = library.apply_final_compression(model)
        kernels = [
            keras.ops.convert_to_numpy(variable)
            for variable in model.variables
            if variable.name == "kernel"
        ]
        outputs = model.predict(x_test, batch_size=1000, verbose=0)
        return _result(outputs, y_test, kernels, masks)

    return {"result": result}

"""Compares TorchScript files with sparse kernels with dense ones, and with ONNX Runtime.

    python -m benchmarks.sparse_speed [mlp] [encoder] [MobileNetV2] [ResNet50] [--keras]

Weights have the initial values of Keras (seed 0). In the MLP and the encoder the weights of every
kernel with the smallest magnitudes are pruned, in the others those of the whole network (global).
The dense program is the TorchScript of the same model without sparse kernels; for the MLP, ONNX
Runtime runs the same weights too, and the faster of the two counts. Programs are called in turns;
ratios are those of one round, and their least, median and largest value over the rounds are
printed: dense / sparse, so that more than 1 is faster. With `--keras`, calls of the model that
`accelerate` returns are compared with calls of the Keras model without masks instead. With one
thread (`--threads 1`, the default), times are those of the thread, which do not contain the time of
other processes. The load average is printed, because other processes still share caches and memory.
"""

import argparse
import functools
import io
import os
import tempfile
import time

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import torch

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner

ROUNDS = 25


def mlp():
    stack = [keras.layers.Dense(2048, activation="relu") for _ in range(3)]
    return keras.Sequential([keras.Input((2048,)), *stack])


def encoder():
    x = keras.Input((64, 512))
    y = x
    for _ in range(4):
        attended = keras.layers.MultiHeadAttention(8, 64)(y, y)
        y = keras.layers.LayerNormalization()(y + attended)
        inner = keras.layers.Dense(2048, activation="relu")(y)
        y = keras.layers.LayerNormalization()(y + keras.layers.Dense(512)(inner))
    return keras.Model(x, y)


CASES = {
    "mlp": (mlp, (0.9, 0.95, 0.99), (32, 1), False),
    "encoder": (encoder, (0.9, 0.95), (1, 8), False),
    "MobileNetV2": (None, (0.9, 0.95), (1, 8), True),
    "ResNet50": (None, (0.9, 0.95), (1, 8), True),
}


def pruned(name, sparsity):
    """Returns a masked model of a case."""
    keras.utils.set_random_seed(0)
    make, _, _, everywhere = CASES[name]
    model = make() if make else getattr(keras.applications, name)(weights=None)
    model = ml.convert_to_masked(model)
    scope = "global" if everywhere else "layer"
    LotteryTicketPruner(model).update_masks("smallest_weights", sparsity=sparsity, scope=scope)
    return model


def dense_program(model, batch):
    """Returns the TorchScript of the model on torch without sparse kernels."""
    plain = ml.strip_masks(model)
    for parameter in plain.parameters():
        parameter.requires_grad_(False)

    class Whole(torch.nn.Module):
        def forward(self, x):
            return plain(x)

    with torch.no_grad():
        traced = torch.jit.trace(Whole().eval(), (batch,), check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    return torch.jit.load(io.BytesIO(file.getvalue())), len(file.getvalue())


def onnx_program(model, threads):
    """Returns a function that runs the layers of the MLP in ONNX Runtime."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    nodes, weights, name = [], [], "x0"
    for number, layer in enumerate(ml.strip_masks(model).layers):
        kernel, bias = (value.astype("float32") for value in layer.get_weights())
        weights += [
            numpy_helper.from_array(kernel, f"w{number}"),
            numpy_helper.from_array(bias, f"b{number}"),
        ]
        nodes += [
            helper.make_node("Gemm", [name, f"w{number}", f"b{number}"], [f"y{number}"]),
            helper.make_node("Relu", [f"y{number}"], [f"x{number + 1}"]),
        ]
        name = f"x{number + 1}"
    first, last = (
        [helper.make_tensor_value_info(key, TensorProto.FLOAT, ("n", 2048))] for key in ("x0", name)
    )
    graph = helper.make_graph(nodes, "mlp", first, last, weights)
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        onnx.ModelProto.SerializeToString(file), options, providers=["CPUExecutionProvider"]
    )
    return lambda x: session.run(None, {"x0": x.numpy()})


def compare(programs, x):
    """Returns the times of each program in every round, in seconds."""
    for program in programs.values():
        for _ in range(3):
            program(x)
    calls = {}
    for name, program in programs.items():  # A turn is long enough to fill the caches once.
        start = time.perf_counter()
        program(x)
        calls[name] = max(1, int(0.03 / (time.perf_counter() - start)))
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(ROUNDS):
        for name in sorted(programs, reverse=bool(number % 2)):
            start = clock()
            for _ in range(calls[name]):
                programs[name](x)
            times[name].append((clock() - start) / calls[name])
    return {name: np.array(values) for name, values in times.items()}


def case(name, threads, table):
    _, sparsities, batches, _ = CASES[name]
    for sparsity in sparsities:
        model = pruned(name, sparsity)
        for batch in batches:
            shape = (batch, *model.input_shape[1:])
            x = torch.from_numpy(np.random.default_rng(0).standard_normal(shape).astype("float32"))
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                report = ml.export_sparse_torch(
                    model, f"{folder}/model.pt", batch_size=batch, threads=threads
                )
                start = time.perf_counter()
                served = torch.jit.load(f"{folder}/model.pt")
                seconds = time.perf_counter() - start
                programs = {"sparse": served}
                programs["torch"], nbytes = dense_program(model, x)
                if name == "mlp":
                    programs["onnx"] = onnx_program(model, threads)
                times = compare(programs, x)
            best = np.min([times[key] for key in times if key != "sparse"], axis=0)
            ratios = best / times["sparse"]
            medians = "  ".join(f"{key} {1e3 * np.median(t):.2f} ms" for key, t in times.items())
            sparse = sum(row.kernel != "dense" for row in report if row.site)
            print(
                f"{name}  {sparsity:.2f}  batch {batch}: {ratios.min():.2f} "
                f"{np.median(ratios):.2f} {ratios.max():.2f} times as fast ({medians}); "
                f"{sparse} of {sum(bool(row.site) for row in report)} products sparse; file "
                f"{nbytes / report.file_nbytes:.1f} times smaller, loaded in {seconds:.2f} s; "
                f"error {report.output_error:.1g}",
                flush=True,
            )
            if table:
                print(report, flush=True)


def keras_case(name, threads):
    _, sparsities, batches, _ = CASES[name]
    for sparsity in sparsities:
        model = pruned(name, sparsity)
        plain = ml.strip_masks(model)
        for batch in batches:
            shape = (batch, *model.input_shape[1:])
            x = torch.from_numpy(np.random.default_rng(0).standard_normal(shape).astype("float32"))
            fast = ml.accelerate(model, batch_size=batch, threads=threads)
            programs = {"sparse": fast, "dense": functools.partial(plain, training=False)}
            with torch.no_grad():
                times = compare(programs, x)
            ratios = times["dense"] / times["sparse"]
            medians = "  ".join(f"{key} {1e3 * np.median(t):.2f} ms" for key, t in times.items())
            print(
                f"{name}  {sparsity:.2f}  batch {batch}, in Keras: {ratios.min():.2f} "
                f"{np.median(ratios):.2f} {ratios.max():.2f} times as fast ({medians})",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=list(CASES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keras", action="store_true", help="calls of Keras models")
    parser.add_argument("--table", action="store_true", help="print the kernels of every weight")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"PyTorch {torch.__version__}, {arguments.threads} threads, {os.cpu_count()} cores, load "
        f"average {os.getloadavg()[0]:.1f}"
    )
    for name in arguments.parts:
        if arguments.keras:
            keras_case(name, arguments.threads)
        else:
            case(name, arguments.threads, arguments.table)


if __name__ == "__main__":
    main()

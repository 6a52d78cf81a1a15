"""Checks the table of README that compares this library with others, by calls of each.

    python -m benchmarks.peer_features            # all
    python -m benchmarks.peer_features --only tfmot torch

Every library is tried in a process of its own, and each answer is what a call gave: a "no" means
that shapes, masks or file sizes stay as they were, or, where there is nothing to call, that no
public name of the library mentions the feature. A library that is not installed is said so, and
its answers are not checked. Ends with status 1 if README says something else.
"""

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

INPUTS, UNITS, OUTPUTS = 64, 256, 8
ROWS = {
    "single": "prunes single weights",
    "n_of_m": "N:M patterns such as 2:4",
    "smaller": "removes channels: a smaller dense model",
    "schedule": "prunes on a schedule while training",
    "regrowth": "drops and regrows weights (SET, RigL)",
    "rounding": "rounds weights while training",
    "rewinding": "rewinds weights to an earlier step",
    "controls": "trains a ticket's controls",
    "tolerance": "finds the sparsest model within a tolerance",
    "files": "writes files without the pruned weights",
}
WORDS = {
    "n_of_m": r"n_?of_?m|m_by_n|semi_?structured",
    "schedule": r"schedul|decay",
    "regrowth": r"rigl|regrow|^grow$|rewir",
    "rounding": r"quanti[sz]|fake_?quant",
    "rewinding": r"rewind",
    "controls": r"control|random_reinit|random_mask",
    "tolerance": r"toleran|max_drop|accuracy_drop",
}
Answers = dict[str, bool]


def arrays():
    rng = np.random.default_rng(0)
    return rng.normal(size=(64, INPUTS)).astype("float32"), rng.integers(0, OUTPUTS, 64)


def named(modules: Iterable[object], feature: str) -> bool:
    """Returns whether a public name, or an argument of one, mentions a feature."""
    for module in modules:
        for name, value in inspect.getmembers(module):
            if name.startswith("_"):
                continue
            try:
                arguments = list(inspect.signature(value).parameters)
            except (TypeError, ValueError):
                arguments = []
            if any(re.search(WORDS[feature], word, re.I) for word in [name, *arguments]):
                return True
    return False


def halves(kernel) -> bool:
    return bool((np.asarray(kernel) == 0).sum() == np.size(kernel) // 2)


def two_of_four(kernel) -> bool:
    """Returns whether an axis has two zeros in every four consecutive entries."""
    zeros = np.asarray(kernel) == 0
    groups = [zeros.T.reshape(-1, 4), zeros.reshape(-1, 4)]
    return any(bool((group.sum(axis=1) == 2).all()) for group in groups)


def this_library() -> Answers:
    import keras

    import masked_layers as ml
    from lottery_ticket_pruner import (
        DynamicSparseTraining,
        GradualPruning,
        LotteryTicketPruner,
        find_ticket,
        prune,
        schedules,
    )

    x, y = arrays()

    def network():
        model = keras.Sequential(
            [
                keras.Input((INPUTS,)),
                keras.layers.Dense(UNITS, "relu"),
                keras.layers.Dense(OUTPUTS, "softmax"),
            ]
        )
        model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
        return model

    def pruned(**options):
        masked = ml.convert_to_masked(network())
        pruner = LotteryTicketPruner(masked)
        pruner.update_masks("smallest_weights", **options)
        return masked, pruner

    def kernel(model):
        return keras.ops.convert_to_numpy(model.layers[0].kernel)

    masked, pruner = pruned(sparsity=0.5)
    channels, _ = pruned(sparsity=0.5, structure="channels")
    before = ml.get_masks(masked)
    rewiring = DynamicSparseTraining(pruner, steps=10, growth="random", frequency=1)
    rewiring.advance()
    after = ml.get_masks(masked)
    moved = [(before[path] != after[path]).any() for path in before]
    same = [before[path].sum() == after[path].sum() for path in before]
    gradual = ml.convert_to_masked(network())
    schedule = schedules.Polynomial(0.0, 0.5, begin_step=0, end_step=4, frequency=1)
    pruning = GradualPruning(LotteryTicketPruner(gradual), schedule)
    shares = []
    for _ in range(4):
        pruning.advance()
        shares.append(ml.sparsity_report(gradual).sparsity)
    rounded = ml.convert_to_masked(network(), quantize="int8")
    columns = (np.unique(column).size for column in kernel(rounded).T)
    found = find_ticket(network(), x, y, rounds=1, steps=2, rate=0.5)
    weights = masked.get_weights()
    masked.set_weights([values + 1 for values in weights])
    pruner.rewind()
    rewound = zip(weights, masked.get_weights(), strict=True)
    judged = prune(network(), (x, y), max_drop=0.9)
    with tempfile.TemporaryDirectory() as folder:
        ml.save_ticket(pruned(sparsity=0.9)[0], f"{folder}/a.safetensors")
        size = Path(folder, "a.safetensors").stat().st_size
    return {
        "single": halves(kernel(pruned(sparsity=0.5)[0])),
        "n_of_m": two_of_four(kernel(pruned(structure="2:4")[0])),
        "smaller": ml.shrink(channels).count_params() < channels.count_params(),
        "schedule": shares == sorted(shares) and shares[0] < shares[-1],
        "regrowth": any(moved) and all(same),
        "rounding": max(columns) <= 255,
        "rewinding": all((one == other).all() for one, other in rewound),
        "controls": {row["arm"] for row in found.rows} >= {"random_reinit", "random_mask"},
        "tolerance": judged.sparsity > 0,
        "files": size < network().count_params() * 4 / 2,
    }


def tfmot() -> Answers:
    from lottery_ticket_pruner.interop.tfmot import import_tfmot

    library = import_tfmot()
    import tf_keras

    x, y = arrays()
    sparsity = library.sparsity.keras

    def network():
        return tf_keras.Sequential(
            [
                tf_keras.layers.Input((INPUTS,)),
                tf_keras.layers.Dense(UNITS, "relu"),
                tf_keras.layers.Dense(OUTPUTS, "softmax"),
            ]
        )

    def pruned(schedule, **options):
        model = sparsity.prune_low_magnitude(network(), schedule, **options)
        model.compile("sgd", "sparse_categorical_crossentropy")
        counts = []
        count = tf_keras.callbacks.LambdaCallback(
            on_epoch_end=lambda *_: counts.append(
                float((model.layers[0].pruning_vars[0][1].numpy() == 0).mean())
            )
        )
        updates = sparsity.UpdatePruningStep()
        model.fit(x, y, batch_size=16, epochs=3, verbose=0, callbacks=[updates, count])
        return sparsity.strip_pruning(model), counts

    constant = sparsity.ConstantSparsity(0.5, 0, frequency=1)
    single, _ = pruned(constant)
    pattern, _ = pruned(constant, sparsity_m_by_n=(2, 4))
    decay = sparsity.PolynomialDecay(0.1, 0.5, 0, 10, frequency=1)
    _, counts = pruned(decay)
    quantized = library.quantization.keras.quantize_model(network())
    with tempfile.TemporaryDirectory() as folder:
        sizes = []
        for model in (network(), single):
            model.save_weights(f"{folder}/x.h5")
            sizes.append(Path(folder, "x.h5").stat().st_size)
    return {
        "single": halves(single.layers[0].kernel.numpy()),
        "n_of_m": two_of_four(pattern.layers[0].kernel.numpy()),
        "smaller": single.count_params() < network().count_params(),
        "schedule": counts[0] < counts[-1],
        "rounding": any("quant" in weight.name for weight in quantized.weights),
        "files": sizes[1] < 0.9 * sizes[0],
        **{key: named([sparsity], key) for key in ("regrowth", "rewinding", "controls")},
        "tolerance": named([sparsity], "tolerance"),
    }


def pquant() -> Answers:
    import keras
    import pquant as library

    x, y = arrays()

    def network():
        inputs = keras.Input((INPUTS,))
        hidden = keras.layers.ReLU()(keras.layers.Dense(UNITS)(inputs))
        return keras.Model(inputs, keras.layers.Dense(OUTPUTS)(hidden))

    def kernels(model):
        return [keras.ops.convert_to_numpy(v) for v in model.variables if v.name == "kernel"]

    def trained(epochs):
        config = library.pdp_config()
        config.pruning_parameters.sparsity = 0.5
        config.pruning_parameters.epsilon = 0.2
        config.quantization_parameters.enable_quantization = False
        for name in ("pretraining_epochs", "epochs", "fine_tuning_epochs"):
            setattr(config.training_parameters, name, epochs)
        model = library.add_compression_layers(network(), config, (None, INPUTS))

        def train(model, epoch, **_):
            model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
            model.fit(x, y, verbose=0)

        model = library.train_model(model, config, train, lambda *_, **__: None)
        return library.apply_final_compression(model)

    def pattern():
        config = library.wanda_config()
        config.pruning_parameters.N, config.pruning_parameters.M = 2, 4
        config.pruning_parameters.t_delta = 2
        config.quantization_parameters.enable_quantization = False
        return library.post_training_prune(network(), config, [x, x])

    short, long = (kernels(trained(epochs)) for epochs in (1, 4))
    zeros = [float((model[0] == 0).mean()) for model in (short, long)]
    config = library.pdp_config()
    rounded = library.add_compression_layers(network(), config, (None, INPUTS))
    training = type(config.training_parameters).model_fields
    with tempfile.TemporaryDirectory() as folder:
        sizes = []
        for model in (network(), trained(4)):
            model.save_weights(f"{folder}/x.weights.h5")
            sizes.append(Path(folder, "x.weights.h5").stat().st_size)
    return {
        "single": zeros[1] > 0,
        "n_of_m": two_of_four(kernels(pattern())[0]),
        "smaller": long[0].size < INPUTS * UNITS,
        "schedule": zeros[0] < zeros[1],
        "rounding": any("quantizer" in type(layer).__name__.lower() or
                        hasattr(layer, "weight_quantizer") for layer in rounded.layers),
        "rewinding": "rewind" in training,
        "files": sizes[1] < 0.9 * sizes[0],
        **{key: named([library], key) for key in ("regrowth", "controls", "tolerance")},
    }  # fmt: skip


def torch_prune() -> Answers:
    import io

    import torch
    from torch.nn.utils import prune

    def size(layer):
        written = io.BytesIO()
        torch.save(layer.state_dict(), written)
        return written.tell()

    layer = torch.nn.Linear(INPUTS, UNITS)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    filters = torch.nn.Linear(INPUTS, UNITS)
    prune.ln_structured(filters, "weight", amount=0.5, n=2, dim=0)
    prune.remove(filters, "weight")
    rest = ("n_of_m", "schedule", "regrowth", "rounding", "rewinding", "controls", "tolerance")
    return {
        "single": halves(layer.weight.detach().numpy()),
        "smaller": len(filters.weight) < UNITS,
        "files": size(filters) < 0.9 * size(torch.nn.Linear(INPUTS, UNITS)),
        **{key: named([prune], key) for key in rest},
    }


def torch_pruning() -> Answers:
    import torch
    import torch_pruning as library

    model = torch.nn.Sequential(
        torch.nn.Linear(INPUTS, UNITS), torch.nn.ReLU(), torch.nn.Linear(UNITS, OUTPUTS)
    )
    example = torch.zeros(1, INPUTS)
    pruner = library.pruner.MagnitudePruner(
        model, example, library.importance.MagnitudeImportance(), pruning_ratio=0.5,
        ignored_layers=[model[2]],
    )  # fmt: skip
    dense = sum(weight.numel() for weight in model.parameters())
    pruner.step()
    left = sum(weight.numel() for weight in model.parameters())
    modules = [library, library.pruner, library.importance, library.utils]
    rest = ("n_of_m", "regrowth", "rounding", "rewinding", "controls", "tolerance")
    return {
        "single": bool((model[0].weight == 0).any()),
        "smaller": left < dense and len(model[0].weight) == UNITS // 2,
        # The user's training loop takes the steps.
        "schedule": "iterative_steps" in inspect.signature(
            library.pruner.MagnitudePruner
        ).parameters,
        "files": left < dense,
        **{key: named(modules, key) for key in rest},
    }  # fmt: skip


LIBRARIES: dict[str, tuple[str, Callable[[], Answers]]] = {
    "this library": ("masked_layers", this_library),
    "tfmot": ("tensorflow_model_optimization", tfmot),
    "PQuantML": ("pquant", pquant),
    "torch's prune": ("torch", torch_prune),
    "Torch-Pruning": ("torch_pruning", torch_pruning),
}


def asked(library: str) -> Answers | str:
    """Returns the answers of a library from a process of its own, or why there are none."""
    module = LIBRARIES[library][0]
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    if subprocess.run([sys.executable, "-c", code]).returncode:
        return "not installed"
    environment = {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3", **os.environ}
    command = [sys.executable, "-m", "benchmarks.peer_features", "--answers", library]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return f"failed: {done.stderr.strip().splitlines()[-1]}"
    answers: Answers = json.loads(done.stdout.splitlines()[-1])
    return answers


def stated(text: str) -> dict[str, dict[str, bool]]:
    """Returns what the table of README says: by library, by feature. "No" and "" are no."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    header = [re.sub(r"\[([^]]+)\].*", r"\1", cell) for cell in table[0]]
    rows = {row[0]: row[1:] for row in table[1:]}
    return {
        library: {key: rows[title][place] != "no" for key, title in ROWS.items()}
        for place, library in enumerate(header[1:])
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--answers", choices=LIBRARIES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.answers:
        given = LIBRARIES[arguments.answers][1]()
        print(json.dumps({key: bool(given[key]) for key in ROWS}))
        return 0
    table = stated((Path(__file__).parents[1] / "README.md").read_text("utf-8"))
    wrong = 0
    for library in arguments.only:
        answers = asked(library)
        if isinstance(answers, str):
            print(f"{library}: {answers}")
            wrong += answers != "not installed"
            continue
        different = [key for key in ROWS if answers[key] != table[library][key]]
        wrong += len(different)
        print(f"{library}: {len(ROWS) - len(different)} of {len(ROWS)} answers as in README")
        for key in different:
            print(f"  {ROWS[key]}: {'yes' if answers[key] else 'no'}, but README says otherwise")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

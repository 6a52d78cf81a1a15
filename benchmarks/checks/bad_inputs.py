"""Tries wrong arguments of functions and of the command line, and prints how each of them ended.

    python -m benchmarks.checks.bad_inputs [--verbose]

Everything is tried in one process, in a temporary folder. An error is expected to be raised by this
library, with a message (or, of the command line, one line that ends with a stop). Other outcomes
count as faults: an error from the depths of another library, and a wrong argument that is accepted.
The script prints the number of each outcome and every fault, and returns 1 if there is one.
"""

import argparse
import collections
import contextlib
import io
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import keras
import numpy as np

import lottery_ticket_pruner as ltp
import masked_layers as ml
from lottery_ticket_pruner import (
    analyses,
    cli,
    criteria,
    distributions,
    learned,
    schedules,
    structures,
    supermasks,
    training,
    treatments,
)
from masked_layers import serving

HERE = {Path(str(package.__file__)).parent for package in (ltp, ml)}
X = np.random.default_rng(0).normal(size=(40, 4)).astype("float32")
Y = (X[:, 0] > 0).astype("int32")
NAN, INFINITY = float("nan"), float("inf")


def plain(*, compiled=True):
    """Returns a small model."""
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(6, activation="relu"), keras.layers.Dense(2)]
    )
    if compiled:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1), loss, metrics=["accuracy"])
    return model


MODEL = ml.convert_to_masked(plain())
UNCOMPILED = ml.convert_to_masked(plain(compiled=False))
PLAIN = plain()
PRUNER = ltp.LotteryTicketPruner(MODEL)
PRUNER.set_pretrained_weights()
PATH = ml.masked_refs(MODEL)[0].path


def of(function, *fixed, **usual):
    """Returns a function that makes a call with other arguments than the usual ones."""

    def calls(*wrong, **named):
        return lambda: function(*fixed, *wrong, **usual | named)

    return calls


update = of(PRUNER.update_masks, "smallest_weights", scope="layer")
ticket = of(ltp.find_ticket, MODEL, X, Y, rounds=1, rate=0.5, steps=1, batch_size=20, controls=())
train = of(training.train, MODEL, X, Y, steps=1, batch_size=20)
fit = of(training.fit, MODEL, X, Y)
prune = of(ltp.prune, PLAIN, (X, Y))
learn = of(learned.learn_supermask, PLAIN, X, Y, steps=1)
grid = of(supermasks.evaluate_grid, PRUNER, X, Y, criteria=["large_final"], sparsities=[0.5])
gradual = of(ltp.GradualPruning, PRUNER)
rewiring = of(ltp.DynamicSparseTraining, PRUNER)
export = of(ml.export_sparse_saved_model, MODEL, "served")


def arguments():
    """Returns calls of functions with wrong arguments, by name."""
    wrong = {
        "convert no model": of(ml.convert_to_masked)("model"),
        "convert nothing to mask": of(ml.convert_to_masked)(
            keras.Sequential([keras.Input((4,)), keras.layers.ReLU()])
        ),
        "convert include nothing": of(ml.convert_to_masked)(PLAIN, include="nowhere"),
        "convert include 3": of(ml.convert_to_masked)(PLAIN, include=3),
        "convert exclude everything": of(ml.convert_to_masked)(PLAIN, exclude=".*"),
        "convert mask": of(ml.convert_to_masked)(PLAIN, mask="ternary"),
        "strip plain": of(ml.strip_masks)(PLAIN),
        "harden plain": of(ml.harden)(PLAIN),
        "get masks of plain": of(ml.get_masks)(PLAIN),
        "set masks of plain": of(ml.set_masks)(PLAIN, {PATH: np.ones((4, 6))}),
        "set masks at a wrong path": of(ml.set_masks)(MODEL, {"nowhere": np.ones((4, 6))}),
        "set masks of a wrong shape": of(ml.set_masks)(MODEL, {PATH: np.ones((6, 4))}),
        "set masks to 0.5": of(ml.set_masks)(MODEL, {PATH: np.full((4, 6), 0.5)}),
        "set masks to NaN": of(ml.set_masks)(MODEL, {PATH: np.full((4, 6), NAN)}),
        "set masks to text": of(ml.set_masks)(MODEL, {PATH: "ones"}),
        "set masks to a list": of(ml.set_masks)(MODEL, [np.ones((4, 6))]),
        "rescale 2": of(ml.set_rescale)(MODEL, 2),
        "rescale at a wrong path": of(ml.set_rescale)(MODEL, {"nowhere": True}),
        "report of plain": of(ml.sparsity_report)(PLAIN),
        "pruner of no model": of(ltp.LotteryTicketPruner)("model"),
        "pruner of an unbuilt model": of(ltp.LotteryTicketPruner)(
            keras.Sequential([keras.layers.Dense(2)])
        ),
        "update of plain": of(ltp.LotteryTicketPruner(PLAIN).update_masks)(rate=0.5),
        "record another model": of(PRUNER.set_initial_weights)(
            ml.convert_to_masked(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]))
        ),
        "update budget of weights without channels": update(budget={"weights": 0.5}),
        "update unknown budget": update(budget={"joules": 0.5}, structure="channels"),
        "update budget of 0": update(budget={"weights": 0.0}, structure="channels"),
        "update gradient without data": update_of("gradient_magnitude"),
        "update seed": update(rate=0.5, seed="x"),
        "update negative seed": update(rate=0.5, seed=-1),
        "update unknown scope": update(rate=0.5, scope="model"),
        "update unknown structure": update(rate=0.5, structure="triangles"),
        "update unknown distribution": update(sparsity=0.5, distribution="gaussian"),
        "update distribution with a rate": update(rate=0.5, distribution="erk"),
        "update structure 3": update(rate=0.5, structure=3),
        "update rate at a wrong path": update(rate={"nowhere": 0.5}),
        "masks_at 2": of(PRUNER.masks_at)(sparsities=[2.0]),
        "treat kept": of(PRUNER.treat)("burn"),
        "treat pruned": of(PRUNER.treat)("rewind", "burn"),
        "treat seed": of(PRUNER.treat)("random", seed=-1),
        "evaluate supermask of unknown weights": of(PRUNER.evaluate_supermask)(
            X, Y, weights="none"
        ),
        "load a pruner from nowhere": of(ltp.LotteryTicketPruner.load)("nowhere.npz", MODEL),
        "save a pruner to nowhere": of(PRUNER.save)("nowhere/pruner.npz"),
        "callback of no pruner": of(ltp.PrunerCallback)("pruner"),
        "unknown criterion": of(criteria.get)("largest"),
        "criterion 3": of(criteria.get)(3),
        "register a criterion twice": lambda: criteria.register("random")(lambda group: group),
        "unknown structure": of(structures.get)("5:4"),
        "block of nothing": of(structures.get)("block:0x4"),
        "unknown distribution": of(distributions.get)("best"),
        "unknown treatment": of(treatments.get_kept)("burn")
        if hasattr(treatments, "get_kept")
        else of(PRUNER.treat)("ash"),
        "unknown schedule": of(schedules.get)("fast"),
        "constant of 2": of(schedules.Constant)(2.0),
        "polynomial to 1": of(schedules.Polynomial)(0.0, 0.5, 10, 5),
        "gradual unknown schedule": gradual("sometimes"),
        "gradual scope": gradual(schedules.Constant(0.5), scope="model"),
        "rewiring growth": rewiring(10, "magic"),
        "rewiring fraction": rewiring(10, "random", fraction=2.0),
        "rewiring frequency": rewiring(10, "random", frequency=0),
        "rewiring steps": rewiring(-1, "random"),
        "ticket uncompiled": of(ltp.find_ticket)(UNCOMPILED, X, Y, rounds=1, rate=0.5, steps=1),
        "ticket two amounts": ticket(sparsity=0.5),
        "ticket unknown control": ticket(controls=("placebo",)),
        "ticket control round 9": ticket(controls=("random_mask",), control_rounds=(9,)),
        "ticket rewinding after the end": ticket(rewind_to=5),
        "ticket unknown strategy": ticket(strategy="best"),
        "ticket unknown retraining": ticket(retraining="magic"),
        "ticket labels of another length": of(ltp.find_ticket)(
            MODEL, X, Y[:-1], rounds=1, rate=0.5, steps=1
        ),
        "ticket without targets": of(ltp.find_ticket)(MODEL, X, rounds=1, rate=0.5, steps=1),
        "ticket inputs of another shape": of(ltp.find_ticket)(
            MODEL, X[:, :2], Y, rounds=1, rate=0.5, steps=1
        ),
        "ticket validation data": ticket(validation_data=X),
        "train inputs of another shape": of(training.train)(
            MODEL, X[:, :3], Y, steps=1, batch_size=4
        ),
        "train no examples": of(training.train)(MODEL, X[:0], Y[:0], steps=1, batch_size=4),
        "train texts as labels": of(training.train)(
            MODEL, X, Y.astype(object), steps=1, batch_size=4
        ),
        "train uncompiled": of(training.train)(UNCOMPILED, X, Y, steps=1, batch_size=4),
        "train floats that overflow": of(training.train)(
            MODEL, np.full((40, 4), 1e300), Y, steps=1, batch_size=4
        ),
        "train validation of another shape": train(validation_data=(X[:, :3], Y)),
        "fit split": fit(validation_split=1.5),
        "fit class weights": fit(class_weight=[1, 2]),
        "evaluate a batch of 0": of(training.evaluate)(MODEL, X, Y, batch_size=0),
        "prune no data": of(ltp.prune)(PLAIN, X),
        "prune uncompiled": of(ltp.prune)(plain(compiled=False), (X, Y)),
        "prune unknown method": prune(method="magic"),
        "prune unknown metric": prune(metric="beauty"),
        "prune sparsity 1": prune(sparsity=1.0),
        "prune size of 0": prune(size=0),
        "prune option": prune(speed=3),
        "prune max_drop NaN": prune(NAN),
        "learn unknown mask": learn(mask="ternary"),
        "learn unknown weights": learn(weights="heavy"),
        "learn no samples": learn(samples=0),
        "edge-popup of sparsity 1": of(ml.EdgePopupMask)(sparsity=1.0),
        "grid of unknown criterion": grid(criteria=["best"]),
        "grid of sparsity 1.5": grid(sparsities=[1.5]),
        "grid of unknown weights": grid(weights=["heavy"]),
        "signs of other paths": of(analyses.sign_agreement)(
            {"a": np.ones(2)}, {"b": np.ones(2)}, {"a": np.ones(2, bool)}
        ),
        "interpolate one point": of(analyses.interpolate)(
            MODEL, MODEL.get_weights(), MODEL.get_weights(), X, Y, points=1
        ),
        "shrink no model": of(ml.shrink)("model"),
        "latency of no model": of(ml.latency_table)(MODEL, "smaller"),
        "export no model": of(ml.export_sparse_saved_model)("model", "served"),
        "export values": export(values="int3"),
        "export tolerance": export(tolerance=-1),
        "export include": export(include="nowhere"),
        "export include a broken pattern": export(include="("),
        "export level": export(level=11),
        "export samples": export(sample_inputs=[X[:, :2]]),
        "export onnx to nowhere": of(ml.export_sparse_onnx)(MODEL, "nowhere/model.onnx"),
        "export torch of no model": of(ml.export_sparse_torch)("model", "model.pt"),
        "save a plain ticket": of(ml.save_ticket)(PLAIN, "ticket"),
        "save a ticket to nowhere": of(ml.save_ticket)(MODEL, "nowhere/ticket"),
        "save a ticket with other weights": of(ml.save_ticket)(
            MODEL, "ticket", weights={"nowhere": X}
        ),
        "load no ticket": of(ml.load_ticket)("nowhere"),
        "load an empty ticket": of(ml.load_ticket)("empty"),
        "load empty masks": of(ml.load_masks)(MODEL, "empty"),
        "load masks from a folder": of(ml.load_masks)(MODEL, "."),
        "save masks to a folder": of(ml.save_masks)(MODEL, "."),
        "inspect nowhere": of(serving.inspect)("nowhere"),
        "inspect an empty file": of(serving.inspect)("empty"),
    }
    for value in (-0.1, 1.5, NAN, INFINITY, "half", True, [0.5], None):
        wrong[f"update rate={value!r}"] = update(rate=value)
        if value is not None:
            wrong[f"update sparsity={value!r}"] = update(sparsity=value)
            wrong[f"ticket rate={value!r}"] = ticket(rate=value)
    for value in (-1, 1.5, "ten", None, True):
        wrong[f"ticket rounds={value!r}"] = ticket(rounds=value)
        wrong[f"train steps={value!r}"] = train(steps=value)
        wrong[f"train batch_size={value!r}"] = train(batch_size=value)
        wrong[f"fit epochs={value!r}"] = fit(epochs=value)
    return wrong


def update_of(strategy):
    """Returns a call of `update_masks` by a criterion, without what it needs."""
    return lambda: PRUNER.update_masks(strategy, rate=0.5)


def commands():
    """Returns wrong command lines."""
    numbers = {
        "run": ["rounds", "steps", "rate", "batch-size", "seeds", "learning-rate", "eval-every"],
        "supermask": ["sparsities", "steps", "samples"],
        "instability": ["points", "steps"],
        "prune": ["max-drop", "sparsity", "macs", "epochs", "batch-size", "rate"],
    }
    lines = [
        [command, *(["lenet-300-100"] if command == "prune" else []), f"--{option}", value]
        for command, options in numbers.items()
        for option in options
        for value in ("-1", "nan", "many")
        if (option, value) != ("max-drop", "-1")  # The metric is to rise by 1.
    ]
    lines += [
        [],
        ["fly"],
        ["rnu"],
        ["--versoin"],
        ["run", "--stratgy", "snip"],
        ["run", "--strategy", "large-finall"],
        ["run", "--data", "MNSIT"],
        ["run", "--scope", "Globl"],
        ["run", "--seeds", "0,1"],
        ["run", "--final-sparsity", "95"],
        ["run", "--network"],
        ["run", "lenet-300-100"],
        ["run", "--data", "own.py"],
        ["run", "--controls", "random-mask"],
        ["sweep", "--over", "stratgy=snip,random"],
        ["run", "--strategy", "magnitude"],
        ["run", "--lr", "0.1"],
        ["run", "--data", "empty.npz"],
        ["run", "--rate", "20%"],
        ["run", "--strategy", "wanda", "--scope", "global"],
        ["prune", "--method", "l1"],
        ["prune", "--method", "one_shot", "--macs", "0.5"],
        ["prune", "--size", "500", "kB"],
        ["prune", "--quiet", "yes"],
        ["prune", "model.kears"],
        ["prune", "--max-drop", "1%"],
        ["prune", "--latency", "fast"],
        ["compare"],
        ["export", "model.keras"],
        ["export", "model.keras", "served", "--values", "int9"],
        ["report"],
        ["run", "--data", "nothing"],
        ["run", "--data", "own.py:nothing"],
        ["run", "--data", "nowhere.py:load"],
        ["run", "--data-dir", "nowhere", "--data", "mnist"],
        ["run", "--network", "lenet"],
        ["run", "--strategy", "best"],
        ["run", "--scope", "model"],
        ["run", "--structure", "triangles"],
        ["run", "--controls", "placebo"],
        ["run", "--rewind-to", "soon"],
        ["run", "--rewind-to", "9999999it"],
        ["run", "--kept", "burn"],
        ["run", "--pruned", "burn"],
        ["run", "--retraining", "magic"],
        ["run", "--optimizer", "magic"],
        ["run", "--steps", "3", "--epochs", "3"],
        ["run", "--out", "empty"],
        ["run", "--out", "empty/inside"],
        ["run", "--seeds", "1", "1"],
        ["run", "--colour", "red"],
        ["supermask", "--criteria", "best"],
        ["supermask", "--weights", "heavy"],
        ["supermask", "--learn", "magic"],
        ["instability", "--masks", "nowhere"],
        ["instability", "--round", "1"],
        ["repeat", "nowhere"],
        ["repeat", "empty"],
        ["sweep", "--over", "nothing=1,2"],
        ["sweep", "--over", "rounds"],
        ["sweep", "--jobs", "0"],
        ["sweep", "--over", "rate=a,b"],
        ["report", "nowhere"],
        ["report", "."],
        ["report", "empty"],
        ["inspect", "nowhere"],
        ["inspect", "empty"],
        ["inspect", "."],
        ["export", "nowhere.keras", "served"],
        ["export", "empty", "served"],
        ["export", "empty.keras", "served"],
        ["export", "model.keras", "served", "--values", "int3"],
        ["export", "model.keras", "empty"],
        ["prune", "nowhere.keras"],
        ["prune", "empty.keras"],
        ["prune", "own.py:nothing"],
        ["prune", "lenet-300-100", "--method", "magic"],
        ["prune", "lenet-300-100", "--metric", "beauty"],
        ["prune", "lenet-300-100", "--size", "small"],
    ]
    return {f"lottery-ticket {' '.join(line)}": line for line in lines}


def outcome_of_call(call):
    """Returns how a call ended, and what it said."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            call()
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error}"
        kinds = (ValueError, TypeError, OSError, ImportError, NotImplementedError)
        unknown = isinstance(error, TypeError) and "unexpected keyword" in str(error)
        if isinstance(error, OSError) and error.filename is not None:
            return "refused by an error of the system that names the file", text
        if "Exception encountered when calling" in text and isinstance(error, ValueError):
            return "refused by a message of Keras", text
        ours = any(Path(last.filename).is_relative_to(folder) for folder in HERE)
        if isinstance(error, kinds) and (ours or unknown) and str(error):
            return "refused by a message", text
        return "FROM THE DEPTHS", f"{text} ({last.filename}:{last.lineno})"
    return "ACCEPTED", ""


def outcome_of_command(line):
    """Returns how a command ended, and what it said."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            code = cli.main(line)
    except SystemExit as end:
        return ("ENDED THE PROCESS" if end.code else "ACCEPTED"), said.getvalue()
    except Exception as error:
        return "FROM THE DEPTHS", "".join(traceback.format_exception(error)[-3:])
    lines = [text for text in said.getvalue().splitlines() if ": warning: " not in text]
    if code and len(lines) == 1:
        ends = lines[0].endswith((".", "?"))
        return ("refused in one line" if ends else "WITHOUT A FULL STOP"), lines[0]
    return ("IN SEVERAL LINES" if code else "ACCEPTED"), said.getvalue()


def main(given=None):
    """Tries everything; returns 1 if anything was not refused as it should."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checks.bad_inputs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--verbose", action="store_true", help="print every message")
    options = parser.parse_args(given)
    found: dict[str, dict[str, tuple[str, str]]] = {"calls": {}, "command lines": {}}
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.chdir(folder)
        try:
            for name in ("empty", "empty.keras"):
                Path(name).touch()
            Path("own.py").write_text("def load(): return 3\n")
            PLAIN.save("model.keras")
            for name, call in arguments().items():
                found["calls"][name] = outcome_of_call(call)
            for name, line in commands().items():
                found["command lines"][name] = outcome_of_command(line)
        finally:
            os.chdir(before)
    faults = 0
    for kind, outcomes in found.items():
        counts = collections.Counter(outcome for outcome, _ in outcomes.values())
        print(f"{len(outcomes)} wrong {kind}:")
        for outcome, count in sorted(counts.items()):
            print(f"  {count:4} {outcome}")
        for name, (outcome, text) in outcomes.items():
            fault = outcome.isupper()
            faults += fault
            if fault or options.verbose:
                print(f"  {name}: {outcome}. {text.strip()[:600]}")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())

"""What the library does with one model: the cells of its row, each found by calls.

A cell is an answer ("yes", "no", a number, "refused", "error", "not possible") and a note that
says more. Outputs are compared bit for bit, unless the cell says otherwise.
"""

import contextlib
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import ml_dtypes
import numpy as np

import masked_layers as ml
from benchmarks.conformance.makers import Maker, inputs_of, kernels, randomize
from benchmarks.conformance.page import HEADS
from benchmarks.conformance.reasons import plain
from lottery_ticket_pruner import LotteryTicketPruner
from masked_layers._keras import flatten

SPARSITY = 0.8
CHANNELS = 0.5
# Largest difference of an output relative to the largest output, where rounding may differ.
ROUNDING = 1e-4
Cell = tuple[str, str]


def arrays(model: Any, inputs: Any) -> list[np.ndarray]:
    """Returns the outputs of a model, flat."""
    reset(model)
    outputs = keras.tree.flatten(model(inputs, training=False))
    return [np.asarray(keras.ops.convert_to_numpy(output)) for output in outputs]


def reset(model: Any) -> None:
    """Resets the states that layers keep between calls."""
    for layer in flatten(model):
        if getattr(layer, "stateful", False):
            layer.reset_state()


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    """Returns whether arrays are the same bit for bit."""
    pairs = zip(one, other, strict=True)
    return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in pairs)


def difference(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    """Returns the largest difference, relative to the largest value of the same output."""
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        a, b = (np.asarray(x).astype("float64") for x in (a, b))
        if a.size:
            worst = max(worst, float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30)))
    return worst


def rounding(model: Any) -> float:
    """Returns the tolerance of a model: the epsilon of its coarsest dtype, if that is larger."""
    names = {layer.compute_dtype for layer in flatten(model)}
    floats = [name for name in names if keras.backend.is_float_dtype(name)]
    return max([ROUNDING, *(float(ml_dtypes.finfo(name).eps) for name in floats)])


def equal(before: list[np.ndarray], after: list[np.ndarray]) -> Cell:
    if same(before, after):
        return "yes", ""
    return "no", f"outputs differ by {difference(before, after):.1e} of the largest"


def reason(error: BaseException) -> str:
    """Returns the first sentence of an error, without paths and addresses of this machine.

    Keras puts a sentence before an error of a call, and its arguments after it.
    """
    text = " ".join(plain(str(error)).split())
    text = re.sub(r"Exception encountered when calling \S+\. | Arguments received by .*", "", text)
    text = re.sub(r'Detected at node .*?File ".*', "", text)  # Files of this machine.
    text = text.partition(". ")[0] or "no message"
    text = text.replace(tempfile.gettempdir(), "TMP")
    return f"{type(error).__name__}: {text if len(text) < 260 else text[:257] + '...'}"


def refusal(error: BaseException) -> Cell:
    """Returns a cell for an error: a refusal, if one of the errors that are documented."""
    documented = isinstance(error, ValueError | TypeError | NotImplementedError | ImportError)
    return ("refused" if documented else "error"), reason(error)


class Row:
    """The checks of one model, in an order in which each needs only the ones before it."""

    def __init__(self, maker: Maker) -> None:
        self.model = randomize(maker.make())
        self.inputs = inputs_of(self.model, maker)
        self.outputs = arrays(self.model, self.inputs)
        self.masked: Any = None
        self.pruned: list[np.ndarray] = []

    def converted(self) -> Cell:
        self.masked = ml.convert_to_masked(self.model)
        if not all(np.isfinite(x.astype("float32")).all() for x in self.outputs):
            return "no", "the outputs of the plain model are not finite"
        if not any(x.size > 1 and np.ptp(x.astype("float32")) for x in self.outputs):
            return "no", "the outputs of the plain model are constant, which proves nothing"
        return equal(self.outputs, arrays(self.masked, self.inputs))

    def share(self) -> Cell:
        """Returns the number of masked kernels among the weights of two or more axes."""
        refs = ml.masked_refs(self.masked)
        masked = {id(ref.variable) for ref in refs}
        weights = kernels(self.masked)
        rest = [w for key, w in weights.items() if key not in masked]
        sizes = [sum(int(np.prod(w.shape)) for w in ws) for ws in (weights.values(), rest)]
        reasons = ml.sparsity_report(self.masked).reasons
        answer = f"{len(weights) - len(rest)} of {len(weights)}"
        if not rest:
            return answer, ""
        paths = [f"{'/'.join(w.path.split('/')[-2:])} {tuple(w.shape)}" for w in rest]
        listed = ", ".join(paths[:4]) + f" and {len(paths) - 4} more" * (len(paths) > 4)
        why = {text for text in reasons.values() if "no kernel" not in text}
        share = f"{1 - sizes[1] / sizes[0]:.1%} of these weights are masked; not: {listed}"
        return answer, f"{share} ({'; '.join(sorted(why))})" if why else share

    def exact(self) -> Cell:
        """Prunes globally; compares the count and the choice with NumPy's."""
        refs = ml.masked_refs(self.masked)
        before = [np.abs(numpy(ref.variable).astype("float32")) for ref in refs]
        LotteryTicketPruner(self.masked).update_masks(
            "smallest_weights", sparsity=SPARSITY, scope="global"
        )
        self.pruned = arrays(self.masked, self.inputs)
        masks = [ref.mask.to_numpy() for ref in refs]
        size = sum(mask.size for mask in masks)
        wanted = int(np.floor(SPARSITY * size + 1e-6))
        count = size - sum(int(mask.sum()) for mask in masks)
        if count != wanted:
            return "no", f"{count:,} of {size:,} weights are pruned instead of {wanted:,}"
        largest = max(float(v[~m].max(initial=0)) for v, m in zip(before, masks, strict=True))
        kept = min(float(v[m].min(initial=np.inf)) for v, m in zip(before, masks, strict=True))
        if largest > kept:
            return "no", f"a weight of {largest:.3g} is pruned, and one of {kept:.3g} is kept"
        return "yes", ""

    def zero(self) -> Cell:
        """Makes all pruned raw values NaN: outputs stay the same if none of them is read."""
        refs = ml.masked_refs(self.masked)
        values = [numpy(ref.variable) for ref in refs]
        for ref, value in zip(refs, values, strict=True):
            ref.variable.assign(np.where(ref.mask.to_numpy(), value, np.nan).astype(value.dtype))
        try:
            cell = equal(self.pruned, arrays(self.masked, self.inputs))
        finally:
            for ref, value in zip(refs, values, strict=True):
                ref.variable.assign(value)
        return cell

    def saved(self) -> Cell:
        with tempfile.TemporaryDirectory() as folder:
            self.masked.save(f"{folder}/model.keras")
            loaded = keras.saving.load_model(f"{folder}/model.keras", safe_mode=False)
        cell = equal(self.pruned, arrays(loaded, self.inputs))
        one, other = ml.get_masks(self.masked), ml.get_masks(loaded)
        if list(one) != list(other) or any((one[key] != other[key]).any() for key in one):
            return "no", "masks differ after loading"
        return cell

    def stripped(self) -> Cell:
        plain = ml.strip_masks(self.masked)
        kinds = {type(layer) for layer in flatten(self.model)}
        strange = {type(layer) for layer in flatten(plain)} - kinds
        if strange:
            return "no", f"classes that the model did not have: {sorted(map(str, strange))}"
        return equal(self.pruned, arrays(plain, self.inputs))

    def exported(self) -> Cell:
        """Exports what this backend exports, and runs it without Keras."""
        torch = keras.backend.backend() == "torch"
        with tempfile.TemporaryDirectory() as folder:
            reset(self.masked)
            run = torch_program if torch else saved_model
            found, note = run(self.masked, self.inputs, f"{folder}/model")
        # Named outputs are in alphabetical order.
        worst = difference(self.pruned, found)
        what = "TorchScript" if torch else "SavedModel"
        if not worst <= rounding(self.masked):
            return "no", f"outputs of the {what} differ by {worst:.1e} of the largest"
        return "yes", note

    def shrunk(self) -> Cell:
        """Prunes half of the channels of another copy; compares with the smaller model."""
        masked = ml.convert_to_masked(self.model, mask_normalization=True)
        pruner = LotteryTicketPruner(masked)
        try:
            pruner.update_masks("smallest_weights", sparsity=CHANNELS, structure="channels")
        except ValueError as error:
            whole = following(families(masked))
            return "refused", reason(error) + f" ({whole})" * bool(whole)
        smaller, report = ml.shrink(masked, return_report=True)
        worst = difference(arrays(masked, self.inputs), arrays(smaller, self.inputs))
        if not worst <= rounding(masked):
            return "no", f"outputs differ by {worst:.1e} of the largest"
        left = smaller.count_params() / self.model.count_params()
        return f"{left:.0%}", following(report.not_followed)


def families(model: Any) -> Mapping[str, str]:
    """Returns the layers in which no channels are followed, of a model with a graph of layers."""
    try:
        return ml.channel_families(model).not_followed
    except ValueError:
        return {}


def following(not_followed: Mapping[str, str]) -> str:
    """Returns which layers were left whole and why, shortened."""
    if not not_followed:
        return ""
    notes = "; ".join(f"{key}: {why}" for key, why in list(not_followed.items())[:2])
    more = len(not_followed) - 2
    return f"not followed: {notes}" + f"; and {more} more" * (more > 0)


def numpy(variable: Any) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(variable))


def saved_model(model: Any, inputs: Any, path: str) -> tuple[list[np.ndarray], str]:
    """Returns the outputs of an exported SavedModel, and what the export needed."""
    import tensorflow as tf

    note = ""
    try:
        ml.export_sparse_saved_model(model, path, sample_inputs=inputs)
    except ValueError as error:
        if "pass an `input_signature`" not in str(error):
            raise
        signature = [keras.tree.map_structure(tf.TensorSpec.from_tensor, tensors(inputs))]
        note = "with an `input_signature` of fixed sizes only"
        ml.export_sparse_saved_model(model, path, sample_inputs=inputs, input_signature=signature)
    loaded = tf.saved_model.load(path)  # Its functions need it.
    outputs = loaded.serve(tensors(inputs))
    return [np.asarray(output) for output in keras.tree.flatten(outputs)], note


def tensors(inputs: Any) -> Any:
    import tensorflow as tf

    return keras.tree.map_structure(tf.constant, inputs)


def torch_program(model: Any, inputs: Any, path: str) -> tuple[list[np.ndarray], str]:
    """Returns the outputs of an exported TorchScript file, which has fixed sizes, and no note."""
    import torch

    ml.export_sparse_torch(model, f"{path}.pt", batch_size=2, threads=1, sample_inputs=inputs)
    outputs = torch.jit.load(f"{path}.pt")(keras.tree.map_structure(torch.from_numpy, inputs))
    return [output.numpy() for output in keras.tree.flatten(outputs)], ""


# Each with the check that it needs.
CHECKS: dict[str, tuple[Callable[[Row], Cell], str | None]] = {
    "converted": (Row.converted, None),
    "masked": (Row.share, "converted"),
    "exact": (Row.exact, "converted"),
    "zero": (Row.zero, "exact"),
    "saved": (Row.saved, "exact"),
    "stripped": (Row.stripped, "exact"),
    "exported": (Row.exported, "exact"),
    "shrunk": (Row.shrunk, None),
}


def cells(maker: Maker) -> Iterator[tuple[str, Cell]]:
    """Yields each column of a row with its cell, as soon as it is known."""
    done: set[str] = set()
    with quiet():
        try:
            row = Row(maker)
        except Exception as error:  # Whatever the maker's library raises.
            for column in CHECKS:
                yield column, ("no model", reason(error))
            return
        for column, (check, needed) in CHECKS.items():
            if needed is not None and needed not in done:
                yield column, ("not possible", f"needs '{HEADS[needed]}'")
                continue
            try:
                cell = check(row)
                done.add(column)
            except Exception as error:
                cell = refusal(error)
            yield column, cell


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides warnings and notices: what they say about a model is asked for and noted."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)

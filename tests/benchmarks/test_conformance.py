"""A small part of the conformance table, and its page."""

import json
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

# Appended, so that an installed package takes precedence over the source.
sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.checks import conversion
from benchmarks.conformance import __main__ as command
from benchmarks.conformance import applications, checks, hub, page, reasons
from benchmarks.conformance.makers import Maker

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("nothing_drawn")]


def measured(name):
    maker = next(maker for maker in command.makers() if maker.name == name)
    return dict(checks.cells(maker))


def test_cheap_rows_are_as_in_the_table():
    stored = page.stored(command.RESULTS, "tensorflow")
    for name in ("several inputs and outputs", "custom layer of layers"):
        cells = measured(name)
        assert {key: cell[0] for key, cell in cells.items()} == {
            key: cell[0] for key, cell in stored[name]["cells"].items()
        }


def test_a_weight_that_is_read_past_its_mask_is_not_a_yes():
    class Reader(keras.layers.Dense):
        """Adds its raw kernel, of which no mask knows."""

        def call(self, x):
            return super().call(x) + keras.ops.sum(self._kernel)

    inputs = keras.Input((4,))
    outputs = keras.layers.Dense(3)(Reader(5)(inputs))
    cells = dict(checks.cells(Maker("reader", "", lambda: keras.Model(inputs, outputs))))
    assert cells["converted"][0] == "refused"
    assert "past its mask" in cells["converted"][1]
    assert cells["exact"] == ("not possible", "needs 'same bits'")


def test_the_last_bit_is_compared():
    one = np.float32([1, 2])
    assert checks.equal([one], [one.copy()])[0] == "yes"
    assert checks.equal([one], [np.nextafter(one, 3)]) == (
        "no", "outputs differ by 1.2e-07 of the largest"
    )  # fmt: skip
    assert checks.equal([np.float32([0])], [np.float32([-0.0])])[0] == "no"


def test_rounding_is_that_of_the_coarsest_dtype():
    model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(1)])
    assert checks.rounding(model) == 1e-4
    model.add(keras.layers.Dense(1, dtype="mixed_bfloat16"))
    assert checks.rounding(model) == 2**-7


def test_the_reason_of_an_error_of_a_call_is_not_that_there_was_one():
    class Failing(keras.layers.Layer):
        def call(self, x):
            raise ValueError(f"No shape of {object()}. Pass another.")

    with pytest.raises(ValueError, match="Exception encountered") as caught:
        Failing()(np.ones((1, 2), "float32"))
    assert checks.reason(caught.value) == "ValueError: No shape of <object object>"


def test_the_table_has_every_family_of_applications_and_many_backbones():
    families = conversion.families()
    found = {f for f, names in families.items() if set(names) & applications.FIRST.keys()}
    # VGG19 is of the family of VGG16.
    assert found == families.keys() - {"vgg19"}
    assert len(set(hub.ORDER)) == len(hub.ORDER) > 38
    names = {maker.name for maker in command.makers()}
    assert names >= page.stored(command.RESULTS, "tensorflow").keys()


def test_the_page_is_that_of_the_stored_results():
    assert command.PAGE.read_text("utf-8") == page.page(command.RESULTS)


def test_every_note_is_on_the_page_with_its_row_and_a_reason_without_addresses():
    tables, rest = page.page(command.RESULTS).split("## Reasons")
    grouped, every = rest.split("## Every note")
    lines = every.splitlines()
    assert " at 0x" not in tables + rest
    count = 0
    for name in (*page.BACKENDS, *page.PEERS):
        for row, known in page.stored(command.RESULTS, name).items():
            for column, (said, note) in known["cells"].items():
                if not note or note.startswith("needs '"):
                    continue
                count += 1
                text = reasons.escaped(reasons.plain(note))
                head = "no model" if said == "no model" else page.HEADS[column]
                head = page.PEERS.get(name, head)
                found = [line for line in lines if line.endswith(f": {text}")]
                assert len(found) == 1
                assert f"**{reasons.escaped(row)}**" in found[0]
                assert head in found[0].removesuffix(text)
                assert reasons.escaped(row) in grouped
    assert count > 500


def test_a_note_says_where_it_is_from_and_keeps_what_no_reason_covers():
    both = ("TensorFlow", "torch")
    found = [
        reasons.Note("a", "shrunk", "x: unknown class A", both, both),
        reasons.Note("b", "shrunk", "y: unknown class B; z: LoRA is enabled", ("torch",), both),
        reasons.Note("a", "saved", "*new*", ("torch",), both),
        reasons.Note("a", "zero", "*new*", ("TensorFlow",), both),
    ]
    assert reasons.by_reason(found) == [
        "### shrunk", "",
        "- **`shrink` has no rule for the class of a layer** (2 rows): a. torch: b",
        "- **LoRA is enabled** (1 row): torch: b",
        "", "### saved", "", "- **\\*new\\*** (1 row): torch: a",
        "", "### zero", "", "- **\\*new\\*** (1 row): TensorFlow: a", "",
    ]  # fmt: skip
    assert reasons.word_for_word(found)[2:] == [
        "- **a**, saved (torch) and zero (TensorFlow): \\*new\\*"
    ]


def test_a_row_that_ends_its_process_is_one_rows_fault(tmp_path, monkeypatch):
    told = [
        {"row": "a", "column": "converted", "cell": ["yes", ""]},
        {"row": "a", "seconds": 1.0},
        {"row": "b", "column": "converted", "cell": ["yes", ""]},
    ]
    lines = [command.MARK + json.dumps(line) for line in told]
    code = f"print('\\n'.join({lines}), flush=True); import os; os._exit(3)"
    after = command.MARK + json.dumps({"row": "c", "seconds": 2.0})
    codes = iter([code, f"print('noise'); print({after!r})"])
    start = command.subprocess.Popen
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(
        command.subprocess,
        "Popen",
        lambda words, **options: start([sys.executable, "-c", next(codes)], **options),
    )
    table = command.Table("tensorflow", "v1")
    command.measure(["a", "b", "c"], table, None, 1800)
    rows = json.loads((tmp_path / "tensorflow.json").read_text())
    assert rows["a"] == {"versions": "v1", "seconds": 1.0, "cells": {"converted": ["yes", ""]}}
    assert rows["b"]["cells"]["ended"] == ["error", "the process ended with status 3"]
    assert table.missing(["a", "b", "c", "d"]) == ["d"]
    assert command.Table("tensorflow", "v2").missing(["a"]) == ["a"]

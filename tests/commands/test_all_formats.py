"""The command `lottery-ticket export --format all`."""

import json

import keras
import numpy as np
import pytest

pytest.importorskip("tyro")

import masked_layers as ml
from lottery_ticket_pruner import cli
from lottery_ticket_pruner.commands import all_formats

pytestmark = pytest.mark.once

X = np.random.default_rng(1).standard_normal((3, 50)).astype("float32")


@pytest.fixture
def command(tmp_path):
    model = keras.Sequential([keras.Input((50,)), keras.layers.Dense(40), keras.layers.Dense(4)])
    model = ml.convert_to_masked(model)
    rng = np.random.default_rng(0)
    ml.set_masks(model, {p: rng.random(m.shape) < 0.1 for p, m in ml.get_masks(model).items()})
    model.save(tmp_path / "ticket.keras")
    np.save(tmp_path / "x.npy", X)
    command = ["export", str(tmp_path / "ticket.keras"), str(tmp_path / "all"), "--format", "all"]
    return [*command, "--sample-inputs", str(tmp_path / "x.npy"), "--batch-size", "3"]


def fail(*args, **kwargs):
    raise ImportError("Writing a TorchScript file requires PyTorch, which is not installed.")


def write(path):
    path.write_bytes(b"content")


def write_half(path):
    write(path)
    raise OSError("No space left on device")


def test_inputs_in_a_dict_go_where_they_belong(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow")
    left, right = (keras.Input((4,), name=name) for name in ("z", "a"))
    outputs = keras.layers.Subtract()([left, keras.layers.Dense(4)(right)])
    model = ml.convert_to_masked(keras.Model({"z": left, "a": right}, outputs))
    every = all_formats._formats

    def some(*arguments):
        return {name: every(*arguments)[name] for name in ("SavedModel float32", "ticket")}

    monkeypatch.setattr(all_formats, "_formats", some)
    monkeypatch.setattr(all_formats, "_SECONDS", 0.01)
    options = all_formats.Options(None, 6, None, None, batch_size=2, threads=None)
    table = all_formats.export_all(model, tmp_path / "all", options, overwrite=False)
    for row in table.rows:
        assert row.output_error is not None, row.note
        assert row.output_error < 1e-6


def test_formats_that_fail_or_exceed_the_tolerance_are_not_in_the_folder(
    command, tmp_path, monkeypatch, capsys
):
    good = keras.models.load_model(tmp_path / "ticket.keras")
    formats = {
        "full": ("model.onnx", write_half, fail),
        "folder": ("int8", lambda path: (path.mkdir(), write_half(path / "a")), fail),
        "other": ("model.pt", write, lambda path, inputs: lambda: 2 * good(*inputs)),
        "good": ("int8.onnx", write, lambda path, inputs: lambda: good(*inputs)),
    }
    monkeypatch.setattr(all_formats, "_formats", lambda model, options: formats)
    monkeypatch.setattr(all_formats, "_SECONDS", 0.01)
    assert cli.main([*command, "--tolerance", "0.1"]) == 0
    printed = capsys.readouterr().out
    assert "full: OSError: No space left on device" in printed
    assert "other: outputs differ by 0.5 of the largest one, more than --tolerance" in printed
    found = {path.name for path in (tmp_path / "all").rglob("*")}
    assert found == {"int8.onnx", all_formats.REPORT, "SHA256SUMS"}
    (tmp_path / "another").mkdir()
    assert (tmp_path / "all").stat().st_mode == (tmp_path / "another").stat().st_mode


@pytest.mark.slow
def test_the_folder_has_every_format_and_the_table_their_bytes_and_errors(
    command, tmp_path, monkeypatch, capsys
):
    tf = pytest.importorskip("tensorflow")
    monkeypatch.setattr(ml, "export_sparse_torch", fail)
    monkeypatch.setattr(all_formats, "_SAVED_MODELS", ("int8",))
    monkeypatch.setattr(all_formats, "_SECONDS", 0.01)
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    out = tmp_path / "all"
    content = json.loads((out / all_formats.REPORT).read_text())
    rows = {row["format"]: row for row in content["rows"]}
    missing = rows.pop("TorchScript")
    assert missing["nbytes"] is None
    assert "requires PyTorch, which is not installed" in missing["note"]
    assert "TorchScript: ImportError: Writing a TorchScript file requires" in printed
    assert not (out / "model.pt").exists()
    for row in rows.values():
        if row["nbytes"] is not None:  # ONNX needs packages that may be missing.
            files = [out / row["path"], *(out / row["path"]).rglob("*")]
            sizes = [file.stat().st_size for file in files if file.is_file()]
            assert row["nbytes"] == sum(sizes) > 0
            assert f"{row['nbytes']:,}" in printed
    wanted = keras.models.load_model(tmp_path / "ticket.keras").predict(X, verbose=0)
    served = tf.saved_model.load(str(out / "int8"))
    found = served.serve(tf.constant(X)).numpy()
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    np.testing.assert_allclose(rows["SavedModel int8"]["output_error"], error, rtol=1e-3)
    assert rows["SavedModel int8"]["seconds"] > 0
    assert rows["ticket"]["output_error"] == 0
    assert rows["ticket"]["seconds"] is None
    assert 0 < rows["LiteRT int8"]["output_error"] < 0.1
    assert rows["LiteRT sparse"]["output_error"] < 1e-5
    assert content["dense_nbytes"] == 4 * (50 * 40 + 40 + 40 * 4 + 4)
    assert content["batch_size"] == 3


def test_a_folder_is_replaced_only_when_asked_and_if_it_has_only_formats(
    command, tmp_path, monkeypatch, capsys
):
    write = {"ticket": ("ticket.safetensors", lambda path: path.write_bytes(b"new"), fail)}
    monkeypatch.setattr(all_formats, "_formats", lambda model, options: write)
    old = tmp_path / "all" / "ticket.safetensors"
    old.parent.mkdir()
    old.write_bytes(b"older")
    assert cli.main(command) == 2
    assert "pass --overwrite to replace it" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite"]) == 0
    assert "ticket: not measured. Writing a TorchScript" in capsys.readouterr().out
    assert old.read_bytes() == b"new"
    (old.parent / "thesis.tex").write_text("text")
    assert cli.main([*command, "--overwrite"]) == 2
    assert "files that are not formats of a model: ['thesis.tex']" in capsys.readouterr().err
    assert sorted(file.name for file in old.parent.iterdir()) == [
        "SHA256SUMS",
        "formats.json",
        "thesis.tex",
        "ticket.safetensors",
    ]


def test_inspect_checks_every_byte_of_the_folder(command, tmp_path, monkeypatch, capsys):
    formats = {
        "ONNX": ("model.onnx", write, fail),
        "SavedModel int8": ("int8", lambda path: (path.mkdir(), write(path / "a")), fail),
    }
    monkeypatch.setattr(all_formats, "_formats", lambda model, options: formats)
    out = tmp_path / "all"
    assert cli.main(command) == 0
    table = capsys.readouterr().out
    (out / "notes.txt").write_text("of the user")
    assert cli.main(["inspect", str(out)]) == 0
    assert capsys.readouterr().out == table
    for file in (out / "model.onnx", out / "int8" / "a", out / all_formats.REPORT):
        content = file.read_bytes()
        damages = [content[:-1] + bytes([content[-1] ^ 1]), content[:-1], None]
        for damage in damages:
            file.unlink()
            if damage is not None:
                file.write_bytes(damage)
            elif file.name == all_formats.REPORT:  # Then it is not such a folder.
                continue
            assert cli.main(["inspect", str(out)]) == 2
            said = capsys.readouterr().err
            assert f"'{file}' is missing or does not have the checksum" in said
            assert said.count("\n") == 1
        file.write_bytes(content)
    sums = (out / "SHA256SUMS").read_bytes()
    for place in range(0, len(sums), 7):
        flipped = bytearray(sums)
        flipped[place] ^= 4
        (out / "SHA256SUMS").write_bytes(flipped)
        assert cli.main(["inspect", str(out)]) == 2, bytes(flipped)
    (out / "SHA256SUMS").unlink()
    assert cli.main(["inspect", str(out)]) == 2
    assert "SHA256SUMS' is missing" in capsys.readouterr().err


def test_nothing_is_left_if_no_format_can_be_written(command, tmp_path, monkeypatch, capsys):
    formats = {"ticket": ("ticket.safetensors", fail, fail)}
    monkeypatch.setattr(all_formats, "_formats", lambda model, options: formats)
    assert cli.main(command) == 2
    assert "No format could be written. ticket: ImportError: Writing" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ticket.keras", "x.npy"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--values", "int8"], "--values cannot be used with --format all"),
        (["--shrink"], "--shrink cannot be used with --format all"),
        (["--batch-size", "0"], "--batch-size must be 1 or more. Received: 0"),
    ],
)
def test_options_that_do_not_apply_are_refused(command, options, message, capsys):
    assert cli.main([*command, *options]) == 2
    assert message in capsys.readouterr().err

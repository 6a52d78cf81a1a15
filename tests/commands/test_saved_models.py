"""Commands that write sparse SavedModels and inspect saved models."""

import json
import warnings

import keras
import numpy as np
import pytest

pytest.importorskip("tyro")

import masked_layers as ml
from lottery_ticket_pruner import cli
from lottery_ticket_pruner.experiments import written
from masked_layers import serving


@pytest.fixture
def saved(tmp_path):
    model = keras.Sequential([keras.Input((50,)), keras.layers.Dense(40), keras.layers.Dense(4)])
    model = ml.convert_to_masked(model)
    rng = np.random.default_rng(0)
    ml.set_masks(model, {p: rng.random(m.shape) < 0.1 for p, m in ml.get_masks(model).items()})
    model.save(tmp_path / "ticket.keras")
    return tmp_path / "ticket.keras"


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="needs the TensorFlow backend")
def test_export_and_inspect(saved, tmp_path, capsys):
    out = tmp_path / "served" / "1"
    assert cli.main(["export", str(saved), str(out), "--values", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "bfloat16  sparse" in printed
    assert "largest difference of an output" in printed
    assert (out / "saved_model.pb").is_file()
    assert cli.main(["inspect", str(out)]) == 0
    assert capsys.readouterr().out == printed
    again = ["export", str(saved), str(out), "--include", "^dense_1", "--level", "9"]
    before = (out / "saved_model.pb").read_bytes()
    assert cli.main(again) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "saved_model.pb").read_bytes() == before
    assert cli.main([*again, "--overwrite", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert cli.main(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == document
    rows = [dict(zip(document["columns"], row, strict=True)) for row in document["rows"]]
    kernels = [row["encoding"] for row in rows if row["path"].endswith("/kernel")]
    assert kernels == ["packed", "sparse"]


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="needs the TensorFlow backend")
def test_export_of_codes_within_a_tolerance_on_samples(saved, tmp_path, capsys):
    samples = tmp_path / "samples.npy"
    np.save(samples, np.random.default_rng(0).random((9, 50), "float32"))
    out = tmp_path / "served" / "1"
    command = ["export", str(saved), str(out), "--sample-inputs", str(samples), "--tolerance"]
    assert cli.main([*command, "1e-6", "--values", "int8"]) == 2
    assert "but --tolerance is 1e-06" in capsys.readouterr().err
    assert not out.exists()
    assert cli.main([*command, "0.1", "--values", "codebook"]) == 0
    printed = capsys.readouterr().out
    assert "codebook-" in printed
    assert "values are not exact" in printed
    for damaged, content in (("text.npy", b"text"), ("missing.npy", None)):
        if content is not None:
            (tmp_path / damaged).write_bytes(content)
        wrong = [str(tmp_path / damaged) if part == str(samples) else part for part in command]
        assert cli.main([*wrong, "0.1", "--overwrite"]) == 2
        assert damaged in capsys.readouterr().err


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="needs the TensorFlow backend")
def test_files_next_to_a_saved_model_are_not_lost(saved, tmp_path, capsys):
    command = ["export", str(saved), str(tmp_path / "out")]
    assert cli.main(command) == 0
    assert cli.main([*command, "--overwrite"]) == 0
    before = (tmp_path / "out" / "saved_model.pb").stat().st_ino
    for name in ("notes.txt", "assets.extra/tf_serving_warmup_requests"):
        (tmp_path / "out" / name).write_text("mine")
        assert cli.main([*command, "--overwrite"]) == 2
        assert f"which would be lost: {name}." in capsys.readouterr().err
        assert (tmp_path / "out" / name).read_text() == "mine"
        (tmp_path / "out" / name).unlink()
    assert (tmp_path / "out" / "saved_model.pb").stat().st_ino == before


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="Keras cannot export there")
@pytest.mark.usefixtures("exported")
def test_a_run_leaves_its_ticket_ready_to_serve(tmp_path, capsys):
    tf = pytest.importorskip("tensorflow")
    options = {"rounds": 1, "steps": 4, "final-sparsity": 0.9, "out": tmp_path}
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    assert cli.main(["run", *arguments, "--seeds", "3", "4", "--controls"]) == 0
    place = tmp_path / "served" / "1"  # On one line, however long it is.
    assert f"First ticket for serving: {place}, " in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "served").iterdir()] == ["1"]
    assert not written.others_in(tmp_path, "run")  # Nothing counts as a file of the user.
    assert cli.main(["export", str(tmp_path), str(tmp_path / "served")]) == 2
    assert cli.main(["inspect", str(tmp_path)]) == 2
    names = ", ".join(str(tmp_path / f"ticket{n}.safetensors") for n in ("", "-1"))
    assert capsys.readouterr().err.count(f" Its tickets: {names}.\n") == 2
    ticket = ml.load_ticket(tmp_path / "ticket.safetensors")
    served = tf.saved_model.load(str(tmp_path / "served" / "1"))
    x = np.random.default_rng(0).random((3, *ticket.input_shape[1:]), "float32")
    np.testing.assert_allclose(served.serve(x), ticket.predict_on_batch(x), rtol=1e-4, atol=1e-5)
    report = serving.inspect(tmp_path / "served" / "1")
    assert sum(row.alive for row in report if row.path.endswith("kernel")) == (
        ml.sparsity_report(ticket).alive
    )


def test_inspect_a_keras_file(saved, capsys):
    assert cli.main(["inspect", str(saved)]) == 0
    report = capsys.readouterr().out
    size = sum(mask.size for mask in ml.get_masks(keras.models.load_model(saved)).values())
    assert f"{size * 4 + 44 * 4:,} bytes" in report
    assert f"on disk: {saved.stat().st_size:,} bytes" in report


@pytest.mark.once
@pytest.mark.parametrize("command", ["export", "inspect"])
@pytest.mark.parametrize("cut", [True, False])
def test_a_damaged_file_is_named_without_a_traceback(cut, command, saved, tmp_path, capsys):
    content = saved.read_bytes()
    half = len(content) // 2
    flipped = content[:half] + bytes(255 - byte for byte in content[half : half + 9])
    saved.write_bytes(content[:half] if cut else flipped + content[half + 9 :])
    out = tmp_path / "served" / "1"
    assert cli.main([command, str(saved), *([str(out)] if command == "export" else [])]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert (
        "exists, but it is not a '.keras' file or was cut short" if cut else "is damaged"
    ) in error
    assert not out.parent.exists()


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "There is no 'nowhere'"),
        (["export", "nowhere.keras", "out"], "There is no file 'nowhere.keras'"),
        (["export", __file__, "out"], "Expected a '.keras' file"),
    ],
)
def test_errors_are_explained_without_a_traceback(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.once
def test_wrong_values_are_refused(saved, tmp_path, capsys):
    assert cli.main(["export", "a.keras", "out", "--values", "int4"]) == 2
    assert "int4" in capsys.readouterr().err
    for ending, meant in ((".onnx", "onnx"), (".pt", "torch"), (".tflite", "all")):
        out = tmp_path / f"model{ending}"
        assert cli.main(["export", str(saved), str(out)]) == 2
        assert f"Pass --format {meant}" in capsys.readouterr().err
        assert not out.exists()


@pytest.mark.once
def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert "export" in text
    assert "inspect" in text


@pytest.mark.once
def test_help_names_what_export_takes(capsys):
    with pytest.raises(SystemExit):
        cli.main(["export", "--help"])
    usage, _, _ = capsys.readouterr().out.partition("\n\n")
    assert usage.split()[-2:] == ["MODEL", "OUT"]


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="needs the TensorFlow backend")
def test_a_path_that_tensorflow_takes_for_a_pattern(saved, tmp_path, recwarn):
    # A folder that matches the pattern, with the weights of another model.
    tf = pytest.importorskip("tensorflow")
    for name in ("seed1", "seed[1]", "a*?"):
        out = tmp_path / name / "1"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert cli.main(["export", str(saved), str(out)]) == 0
        assert [path.name for path in out.parent.iterdir()] == ["1"]
    recwarn.clear()
    with pytest.warns(
        UserWarning, match=r"interprets .*b\[0\].* as a pattern.*elsewhere to load it"
    ):
        serving.export_sparse_saved_model(keras.models.load_model(saved), tmp_path / "b[0]" / "1")
    moved = (tmp_path / "seed[1]" / "1").rename(tmp_path / "moved")
    served = tf.saved_model.load(str(moved))
    x = np.random.default_rng(0).random((3, 50), "float32")
    expected = keras.models.load_model(saved)(x)
    np.testing.assert_allclose(served.serve(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.once
def test_ticket_files_are_exported_and_inspected(saved, tmp_path, capsys):
    model = keras.models.load_model(saved)
    ticket, signs = tmp_path / "ticket.safetensors", tmp_path / "signs.safetensors"
    ml.save_ticket(model, ticket)
    ml.save_ticket(model, signs, signs_only=True)
    assert cli.main(["export", str(saved), str(tmp_path / "one")]) == 0
    assert cli.main(["export", str(ticket), str(tmp_path / "two")]) == 0
    packed = [tmp_path / name / "assets" / "weights.mlsp" for name in ("one", "two")]
    assert packed[0].read_bytes() == packed[1].read_bytes()
    assert cli.main(["inspect", str(ticket)]) == 0
    assert f"on disk: {ticket.stat().st_size:,} bytes" in capsys.readouterr().out
    for command in (["export", str(signs), str(tmp_path / "three")], ["inspect", str(signs)]):
        assert cli.main(command) == 2
        assert "signs.safetensors' contains only the signs" in capsys.readouterr().err
    ticket.write_bytes(ticket.read_bytes()[:-9])
    assert cli.main(["inspect", str(ticket)]) == 2
    assert "is not a ticket file, or is cut short" in capsys.readouterr().err


@pytest.mark.once
def test_onnx_files_are_written_and_not_replaced_without_being_asked(saved, tmp_path, capsys):
    pytest.importorskip("tf2onnx")
    out = tmp_path / "model.onnx"
    command = ["export", str(saved), str(out), "--format", "onnx"]
    assert cli.main(command) == 0
    assert f"on disk: {out.stat().st_size:,} bytes" in capsys.readouterr().out
    assert cli.main(command) == 2
    assert "pass --overwrite to replace it" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite"]) == 0
    assert cli.main([*command, "--overwrite", "--values", "float16"]) == 2
    assert "--values must be 'float32' (exact) or 'int8'. Rec" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite", "--level", "9"]) == 2
    assert "--level cannot be used with --format onnx" in capsys.readouterr().err

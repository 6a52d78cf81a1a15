"""Messages of the command about wrong names, files and folders: one line with what to do."""

import warnings

import numpy as np
import pytest

import own_data

pytest.importorskip("tyro")

import keras

import masked_layers as ml
from _lottery_ticket.commands import PruneOptions
from lottery_ticket_pruner import LotteryTicketPruner, cli, criteria, find_ticket
from lottery_ticket_pruner.checks import line_of
from lottery_ticket_pruner.folders import make_folder

pytestmark = pytest.mark.once

OWN = f"""{own_data.SOURCE}def needs(path, *, size):
    return load()
class Loader:
    def __call__(self, split):
        return load()
loader = Loader()
def pair():
    x, y = load()[0]
    return x, y[1:]
def lists():
    return [part.tolist() for part in pair()]
def nothing():
    pass
def raises():
    def inner(argument):
        pass
    inner()
"""
RUN = ("run", "--rounds", "1", "--steps", "4", "--seeds", "0", "--out", "out")


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
    """Returns a function that runs a failing command and returns the line that it prints."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "file").write_text("a file")

    def run(*command, lines=1):
        assert cli.main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith("lottery-ticket: ")
        assert "[Errno" not in error
        assert ".." not in error.replace("...", "").replace("../", "")
        # Python 3.13 marks places of a traceback in lines of their own that 3.11 leaves out.
        assert sum(bool(line.strip(" ~^")) for line in error.splitlines()) == lines
        assert not (tmp_path / "out").exists()
        return error.removeprefix("lottery-ticket: ").strip()

    return run


@pytest.mark.parametrize(
    ("option", "name", "meant"),
    [
        ("--strategy", "larg_final", "large_final"),
        ("--strategy", "zzz", None),
        ("--strategy", "magnitude", "large_final"),
        ("--kept", "rewnd", "rewind"),
        ("--pruned", "zerro", "zero"),
        ("--data", "minst", "mnist"),
    ],
)
def test_unknown_names_lead_to_those_that_there_are(said, option, name, meant):
    error = said(*RUN, option, name)
    assert f" {name!r}." in error
    assert "Known are: " in error
    assert "Pass a custom function" not in error
    assert "register`" not in error
    assert ("Did you mean" in error) == (meant is not None)
    if meant:
        assert f"Did you mean {meant!r}" in error
    assert option == "--data" or error.startswith(f"{option}: ")
    if option == "--strategy":
        assert name in said("sweep", "--over", f"strategy={name},random", "--out", "out")


def test_errors_of_keras_are_one_line_with_the_reason(capsys):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="Arguments received") as caught:
        model(np.ones((3, 5), "float32"))
    assert cli._print_error(caught.value, PruneOptions) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "\x1b" not in line
    assert "(3, 5)" in line
    assert "(3, 5)" in line_of(caught.value)
    cli._print_error(ValueError(f"'net.keras' does not fit. {caught.value}"), PruneOptions)
    assert capsys.readouterr().err == line.replace(": ", ": 'net.keras' does not fit. ", 1)
    cli._print_error(ValueError("a \x1b[1mbold\x1b[0m word"), PruneOptions)
    assert capsys.readouterr().err == "lottery-ticket: a \x1b[1mbold\x1b[0m word.\n"


def test_in_python_unknown_names_lead_on_too():
    with pytest.raises(ValueError, match=r"Did you mean 'large_final'\?.*criteria\.register"):
        criteria.get("larg_final")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "needs",
            "takes (path, *, size): missing a required argument: 'path'. Give them defaults",
        ),
        ("loader", "takes (split): missing a required argument: 'split'"),
        ("pair", "Received: a tuple of 2 (ndarray of shape (60, 4), ndarray of shape (59,))."),
        ("lists", "Received: a list of 2 (a list of 60 (list, list, list, list, ...), a list of"),
        ("nothing", "Received: NoneType."),
    ],
)
def test_functions_of_data_get_errors_that_say_what_is_expected(said, function, message):
    error = said(*RUN, "--data", f"own.py:{function}")
    assert error.startswith(f"own.py:{function} ")
    assert message in error
    expected = "((x_train, y_train), (x_test, y_test))"
    assert expected in error or "without arguments" in error


def test_errors_of_their_own_still_come_with_their_traceback(said):
    error = said(*RUN, "--data", "own.py:raises", lines=5)
    assert error.startswith("own.py:raises raised TypeError: raises.<locals>.inner() missing 1 ")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ((*RUN[:-1], "file", "--data", "own.py:load"), "'file' is a file, but a folder"),
        ((*RUN[:-1], "file/x/y", "--data", "own.py:load"), "'file' is a file, but a folder"),
        (("sweep", *RUN[1:-1], "file"), "'file' is a file, but a folder"),
        (
            ("supermask", "--criteria", "random", "--out", "file"),
            "'file' is a file, but a folder",
        ),
        (
            ("repeat", "nowhere"),
            "There is no folder 'nowhere'. Expected that of a run to repeat",
        ),
        (("repeat", "."), "'.' is not a run folder: it holds no config.json."),
        (("report", "nowhere"), "There is no folder 'nowhere'. Expected that of a run, or one wi"),
        (("report", "file"), "'file' is a file. Expected that of a run, or one with several, suc"),
        (("compare", "nowhere"), "There is no file or folder 'nowhere'. Expected a .keras, .h5 o"),
        (("inspect", "nowhere"), "There is no 'nowhere'. Expected a '.keras' file, a ticket ('.s"),
        (("instability", "--masks", "nowhere", "--out", "out"), "There is no folder 'nowhere'."),
        (
            ("export", "file", "out"),
            "Expected a '.keras' file or a ticket ('.safetensors'). Received: 'file'. To c",
        ),
        (("export", ".", "out"), "There is no file '.'. Received: the folder '.'."),
        (
            ("inspect", "file"),
            "'file' is neither a '.keras' file, a ticket ('.safetensors') nor a Saved",
        ),
    ],
)
def test_files_and_folders_are_named(said, command, message):
    assert said(*command).startswith(message)


@pytest.mark.parametrize("command", [("export", "m/x.h5", "out"), ("inspect", "m/x.h5")])
def test_models_in_other_formats_get_an_error_with_a_remedy(said, tmp_path, command):
    (tmp_path / "m").mkdir()
    masked = ml.convert_to_masked(keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # About the format.
        masked.save(tmp_path / "m" / "x.h5")
    error = said(*command)
    code = error.partition("`")[2].partition("`")[0]
    assert code.startswith("import keras, masked_layers; ")
    exec(code, {})  # The suggested remedy works.
    assert cli.main(["inspect", "m/x.keras"]) == 0
    masked.save_weights(tmp_path / "m" / "x.weights.h5")
    assert "save it with `model.save('m/x.keras')`" in said("inspect", "m/x.weights.h5")


def test_errors_of_the_system_are_reported_in_words(said, monkeypatch):
    from lottery_ticket_pruner.experiments import workbench

    def full(*_):
        raise OSError(28, "No space left on device", "out/x")

    monkeypatch.setattr(workbench, "load_and_resolve", full)
    assert said(*RUN) == "'out/x': No space left on device."


def test_warnings_of_a_command_come_without_lines_of_ours(tmp_path, capsys, monkeypatch):
    from lottery_ticket_pruner.commands import report

    def warned(_):
        # Prints a warning as Python does; pytest suppresses it.
        warning = UserWarning("'x' ends in the middle of a line.")
        print(warnings.formatwarning(warning, UserWarning, "results.py", 221), end="")

    monkeypatch.setattr(report, "write_report", warned)
    before = warnings.formatwarning
    assert cli.main(["report", str(tmp_path)]) == 0
    assert warnings.formatwarning is before
    text = "lottery-ticket: warning: 'x' ends in the middle of a line.\n"
    assert capsys.readouterr().out == text


def test_the_folder_of_a_report_must_not_be_a_file(said, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "run" / "results.csv").write_text("replicate,epoch,test_accuracy\n0,0,1\n")
    assert said("report", "run", "--out", "file", "--quiet").startswith("'file' is a file, but")


# --- In Python ------------------------------------------------------------------------------------


def compiled():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="a")])
    model.compile("sgd", "mse")
    return model


def test_missing_files_of_arrays_are_named(tmp_path):
    model = ml.convert_to_masked(compiled())
    for load in (
        lambda file: ml.load_masks(model, file),
        lambda file: LotteryTicketPruner.load(file, model),
    ):
        with pytest.raises(FileNotFoundError, match=r"^There is no file '.*nowhere\.npz'\.$"):
            load(tmp_path / "nowhere.npz")
        with pytest.raises(OSError, match=r"is a folder\. Expected an .npz file"):
            load(tmp_path)


def test_a_folder_is_created_or_the_file_in_its_place_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, there in (("file", "file"), ("file/a/b", "file"), ("link", "link")):
        with pytest.raises(NotADirectoryError, match=rf"{there}' is a file, but a folder"):
            make_folder(tmp_path / name)
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    with pytest.raises(NotADirectoryError, match="file' is a file, but a folder"):
        search(tmp_path / "file")


def search(folder):
    x, y = np.ones((8, 4), "float32"), np.ones((8, 3), "float32")
    return find_ticket(compiled(), x, y, rounds=1, steps=2, controls=(), checkpoint=folder)


def test_damaged_states_of_a_search_are_reported(tmp_path):
    search(tmp_path)
    # `restore` alone reads the trained weights of rounds.
    files = sorted(set(tmp_path.iterdir()) - set(tmp_path.glob("trained-*")))
    assert len(files) == 5
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=r"cut short or damaged: .*start over\.$") as caught:
            search(tmp_path)
        file.write_bytes(content)
        text = str(caught.value)
        assert str(file) in text
        assert ".." not in text
        for internal in ("JSONDecodeError", "Error(", "write it again"):
            assert internal not in text
    state = tmp_path / "state.json"
    for content, message in (
        ("{}", "it lacks 'round'"),
        ("[1]", "list indices"),
        ("", "Expecting"),
    ):
        state.write_text(content)
        with pytest.raises(ValueError, match=rf"state\.json' is not .*: {message}.*start over\.$"):
            search(tmp_path)

"""Errors of a full disk name a file, or the folder of temporary files."""

import contextlib
import tempfile

import keras
import pytest

pytest.importorskip("tyro")
pytest.importorskip("resource")

import resource

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner
from lottery_ticket_pruner.commands.jobs import message_of
from lottery_ticket_pruner.commands.optuna_search import Search
from lottery_ticket_pruner.compression import save_model
from lottery_ticket_pruner.experiments.results import CsvWriter
from lottery_ticket_pruner.experiments.tensorboard import EventWriter

pytestmark = pytest.mark.once


@contextlib.contextmanager
def full_disk(size):
    """Limits the size of files in bytes, as the system does it for every library."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def plain():
    return keras.Sequential([keras.Input((40,)), keras.layers.Dense(20)])


def search(path):
    pytest.importorskip("optuna")
    options = {"rate": [str(number) for number in range(8)]}
    made = Search(path.parent, options, [(value,) for value in options["rate"]], "study")
    made.run(8, lambda _: (1.0, 1.0))


def events(path):
    path.mkdir()
    with EventWriter(path) as writer:
        for step in range(50):
            writer.scalar("loss", 1.0, step)


def rows(path):
    writer = CsvWriter(path)
    for _ in range(50):
        writer.write({"round": 1})


WRITERS = {
    "model": lambda path: save_model(plain(), path.with_suffix(".keras")),
    "masks": lambda path: ml.save_masks(ml.convert_to_masked(plain()), path),
    "pruner": lambda path: LotteryTicketPruner(ml.convert_to_masked(plain())).save(path),
    "ticket": lambda path: ml.save_ticket(ml.convert_to_masked(plain()), path),
    "table": rows,
    "events": events,
    "optuna.log": search,
}


def test_the_message_of_a_job_whose_log_was_cut_says_so(tmp_path):
    log = tmp_path / "output.log"
    for text, message in (
        ("digits: 13", "exit status 2. Its log is cut, as by a full disk, after: digits: 13"),
        ("digits: 13\nlottery-ticket: 'a' is missing.\n", "'a' is missing."),
        ("lottery-ticket: 'a' is missing.\n\x1b[?25h", "'a' is missing."),
        ("lottery-ticket: warning: Slow.\nKeyError: 3\n", "KeyError: 3"),
        ("", "exit status 2"),
    ):
        log.write_text(text)
        assert message_of(log, 2) == message


@pytest.mark.parametrize("name", WRITERS)
def test_the_error_of_a_full_disk_names_where_it_was_written(name, tmp_path):
    with full_disk(200), pytest.raises(OSError, match="too large") as caught:
        WRITERS[name](tmp_path / name)
    temporary = tempfile.gettempdir()
    named = str(caught.value.filename)
    assert named.startswith(temporary if name == "model" else str(tmp_path / name))
    if name not in ("table", "events", "optuna.log"):  # Others are appended to.
        assert not list(tmp_path.iterdir())

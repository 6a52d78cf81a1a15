"""TensorFlow's lines on standard error, which tell users of a command nothing."""

import contextlib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator

_LEVEL = "TF_CPP_MIN_LOG_LEVEL"
_NOISE = re.compile(
    rb"WARNING: All log messages before absl::InitializeLog\(\)|[IWE]\d{4} \d\d:|[IWE]\d{4} \d{8,}|"
    rb"\d{4}-\d\d-\d\d .*: [IWE] |To enable the following instructions"
)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Silences TensorFlow's log from now on, and the lines that its import writes regardless.

    If TF_CPP_MIN_LOG_LEVEL asks for them, nothing is silenced.
    """
    if os.environ.setdefault(_LEVEL, "3") != "3":
        yield
        return
    logging.getLogger("tensorflow").addFilter(_is_of_use)
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            for line in held:
                if not _NOISE.match(line):
                    os.write(2, line)


def _is_of_use(record: logging.LogRecord) -> bool:
    """Leaves out a warning of several models, each of which is traced as often as it has to be.

    TensorFlow tells functions apart by their code, and `predict` has the same for all models.
    """
    return "triggered tf.function retracing" not in record.getMessage()

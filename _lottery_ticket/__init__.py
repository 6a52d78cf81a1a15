"""The start of the command `lottery-ticket`: what needs none of the imports that take seconds.

It is separate from the packages because these import Keras. Here are the options of all commands
(`commands.py`, `experiments.py`), the names that they take (`names.py`, `unknown.py`), and their
parser. Some imports of the packages swallow a KeyboardInterrupt, so an interruption ends the
process at any time until they are done.
"""

import os
import signal
import sys
from typing import Any


def main() -> int:
    """Runs the command on the arguments of the process, and returns its exit status."""
    stderr = os.dup(2)  # While the packages are imported, 2 is another file (`logs.py`).

    def end(*_: Any) -> None:
        os.write(stderr, b"Interrupted.\n")
        os._exit(130)

    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:  # And not a background job of a shell.
        signal.signal(signal.SIGINT, end)
    try:
        status = _run(interruptible)
        sys.stdout.flush()
    except BrokenPipeError:  # Of `| head`, which has read enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    if interruptible:  # Everything is written; only the interpreter has to end.
        signal.signal(signal.SIGINT, lambda *_: os._exit(status))
    return status


def _run(interruptible: bool) -> int:
    from _lottery_ticket import logs, parser, refusals, unknown

    try:
        options = parser.parse(sys.argv[1:])
        unknown.check(options)
    except (refusals.MissingExtraError, ValueError) as error:
        return parser.refuse(error)
    with logs.silenced():
        from lottery_ticket_pruner import cli
    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return cli.main(options=options)

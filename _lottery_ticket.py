"""Starts the command `lottery-ticket`, so that an interruption ends it quietly at any moment.

The packages take seconds to import, and some of what they import swallows a KeyboardInterrupt. So
this module is by itself and imports nothing that takes time.
"""

import os
import signal
import sys
from typing import Any


def main() -> int:
    """Runs the command on the arguments of the process, and returns its exit status."""
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:  # And not a job that a shell started in the background.
        signal.signal(signal.SIGINT, _end)
    from lottery_ticket_pruner import cli

    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    status = cli.main()
    if interruptible:  # All is written: what is left is the end of the interpreter.
        signal.signal(signal.SIGINT, lambda *_: os._exit(status))
    return status


def _end(*_: Any) -> None:
    os.write(2, b"Interrupted.\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())

"""Entry point of the command `lottery-ticket`, which lets an interruption end it at any time.

The packages take seconds to import, and some of their imports swallow a KeyboardInterrupt.
Therefore this module is separate and imports nothing that takes time.
"""

import os
import signal
import sys
from typing import Any


def main() -> int:
    """Runs the command on the arguments of the process, and returns its exit status."""
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:  # And not a background job of a shell.
        signal.signal(signal.SIGINT, _end)
    from lottery_ticket_pruner import cli

    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    status = cli.main()
    if interruptible:  # Everything is written; only the interpreter has to end.
        signal.signal(signal.SIGINT, lambda *_: os._exit(status))
    return status


def _end(*_: Any) -> None:
    os.write(2, b"Interrupted.\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())

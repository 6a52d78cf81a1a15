"""Ends the runs of a sweep together with the sweep, however it ends."""

import os
import threading

from _lottery_ticket.jobs import PARENT


def end_with_parent() -> None:
    """Ends this process when the sweep that started it ends. No effect outside a sweep."""
    if os.environ.pop(PARENT, None):
        threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    while os.read(0, 1024):
        pass
    # As if killed. The run resumes from its last round when the sweep is started again.
    os._exit(1)

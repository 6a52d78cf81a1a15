"""Runs without the export of their ticket, unless a test uses the fixture `exported`."""

from exports import exported, nothing_exported

__all__ = ["exported", "nothing_exported"]

"""Fixtures for tests of commands: a run exports its ticket only where that is tested."""

import pytest


@pytest.fixture
def exported():
    """Lets runs export a SavedModel."""


@pytest.fixture(autouse=True)
def nothing_exported(request, monkeypatch):
    """Lets runs go on without a SavedModel, which takes a quarter of the time of a short one."""
    if "exported" not in request.fixturenames:
        name = "lottery_ticket_pruner.experiments.run.export_sparse_saved_model"
        monkeypatch.setattr(name, refuse)


def refuse(*args, **kwargs):
    raise ImportError("not part of this test")

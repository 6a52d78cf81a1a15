"""Fixtures for all tests of the engine."""

import types

import keras
import pytest

from lottery_ticket_pruner.training import engine


@pytest.fixture(autouse=True)
def _nothing_said():
    engine._said.clear()


@pytest.fixture
def pace(monkeypatch):
    """Sets the seconds that steps take on the engine's clock, which stands still otherwise.

    There is one time for each kind of loop and one for `fit`. Returns the steps of each loop call.
    """
    now = 0.0

    def wait(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr(engine, "time", types.SimpleNamespace(perf_counter=lambda: now))

    def give(model, fit, **loops):
        current = engine.engine_of(model)
        train, plain_fit = current._loops.train, model.fit
        step = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: wait(fit))
        counts = []

        def timed(data, batches, kind, changes=None):
            train(data, batches, kind, changes)
            counts.append(len(batches))
            wait(len(batches) * loops[kind])

        def timed_fit(*args, callbacks=(), **kwargs):
            return plain_fit(*args, callbacks=[step, *callbacks], **kwargs)

        monkeypatch.setattr(current._loops, "train", timed)
        object.__setattr__(model, "fit", timed_fit)
        return counts

    return give

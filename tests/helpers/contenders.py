"""Trivial contenders, importable by the processes of `benchmarks`."""


def in_turns():
    """Yields contenders that return the number of their call."""
    calls = []

    def call():
        calls.append(None)
        return float(len(calls))

    return {"a": call, "b": call, "broken": lambda: 1 / 0}


def needs_a_peer():
    raise ModuleNotFoundError("No module named 'peer'", name="peer.inner")

"""Contenders that cost nothing, where the processes of `benchmarks` find them."""


def in_turns():
    """Contenders that say which call this is."""
    calls = []

    def call():
        calls.append(None)
        return float(len(calls))

    return {"a": call, "b": call, "broken": lambda: 1 / 0}


def needs_a_peer():
    raise ModuleNotFoundError("No module named 'peer'", name="peer.inner")

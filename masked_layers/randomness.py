"""Random streams, determined by a purpose, a seed and parts such as a path or a step."""

import hashlib
import zlib
from collections.abc import Callable, Sequence

import numpy as np

Part = int | str
Seed = int | Sequence[int] | None


def words(*parts: Part) -> list[int]:
    """Returns integers for a seed sequence: numbers unchanged, and a checksum of each text.

    Different parts give independent streams. Unlike `hash`, the result is the same in any process.
    """
    return [zlib.crc32(part.encode()) if isinstance(part, str) else int(part) for part in parts]


def _by_parts(purpose: str, seed: list[int], parts: Sequence[Part]) -> np.random.SeedSequence:
    return np.random.SeedSequence([*seed, *words(*parts)])


def _spawned(purpose: str, seed: list[int], parts: Sequence[Part]) -> np.random.SeedSequence:
    return np.random.SeedSequence([*seed, *words(*parts)], spawn_key=(0,))


def _by_digest(purpose: str, seed: list[int], parts: Sequence[Part]) -> np.random.SeedSequence:
    digests = [hashlib.sha256(str(part).encode()).digest() for part in parts]
    return np.random.SeedSequence([*seed, *(int.from_bytes(each, "big") for each in digests)])


def _by_purpose(purpose: str, seed: list[int], parts: Sequence[Part]) -> np.random.SeedSequence:
    # The purpose last: a seed sequence does not tell zeros at its end from no entries.
    return np.random.SeedSequence([*seed, *words(*parts, purpose)])


# The purposes, and the functions that compute their entropy. New purposes differ by their name.
# Earlier ones differ only by their parts, because results on disk were computed with these streams.
# Of two purposes with equal parts ("treatments" and "scores of masks"; "order of examples" and
# "mask updates"), one draws numbers and the other the seed of another generator.
PURPOSES: dict[str, Callable[[str, list[int], Sequence[Part]], np.random.SeedSequence]] = {
    "arms of a search": _by_parts,  # seed, arm or "masks" or "treatment", round, ...
    "augmentation": _spawned,
    "gradient batch": _by_purpose,  # seed, step
    "groups of test examples": _by_purpose,  # seed
    "mask updates": _by_parts,  # seed, step
    "order of examples": _by_parts,  # seed, ... or seed, epoch
    "rewiring": _by_parts,  # seed, step, path
    "sampled masks": _by_purpose,  # seed, path
    "scores of masks": _by_parts,  # seed, path
    "test samples": _by_purpose,  # seed, number
    "ties": _by_digest,  # seed, path
    "treatments": _by_parts,  # seed, path
}


def sequence(purpose: str, seed: Seed, *parts: Part) -> np.random.SeedSequence:
    """Returns the seed sequence of a purpose, which depends only on the arguments.

    Args:
        purpose: One of `PURPOSES`. Different purposes have independent streams.
        seed: One or more non-negative integers. None means a different seed at every call.
        *parts: Parts that distinguish the draws of this purpose, such as a path or a step.
    """
    given = np.random.SeedSequence().generate_state(4) if seed is None else seed
    return PURPOSES[purpose](
        purpose, [int(part) for part in np.array(given, dtype=object).reshape(-1)], parts
    )


def stream(purpose: str, seed: Seed, *parts: Part) -> np.random.Generator:
    """Returns the random generator of a purpose, with the arguments of `sequence`."""
    return np.random.default_rng(sequence(purpose, seed, *parts))


def integer(purpose: str, seed: Seed, *parts: Part, bits: int = 31) -> int:
    """Returns a non-negative integer with `bits` bits, as a seed for other generators.

    Args:
        purpose: One of `PURPOSES`.
        seed: One or more non-negative integers. None means a different seed at every call.
        *parts: Parts that distinguish the draws of this purpose, such as a path or a step.
        bits: Number of bits, at most 32.
    """
    return int(sequence(purpose, seed, *parts).generate_state(1)[0] >> (32 - bits))

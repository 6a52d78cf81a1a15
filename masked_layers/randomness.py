"""Random streams: one rule from a purpose, a seed and what tells draws apart to a generator."""

import hashlib
import zlib
from collections.abc import Callable, Sequence

import numpy as np

Part = int | str
Seed = int | Sequence[int] | None


def words(*parts: Part) -> list[int]:
    """Returns integers for a seed sequence: numbers as they are, and a checksum of each text.

    Distinct parts give independent streams. Unlike `hash`, the same ones in every process.
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


# What is drawn, and how its entropy is made. New purposes are told apart by their name. Earlier
# ones are told apart by their parts alone: results on disk were drawn from these very streams.
# Those with equal parts ("treatments" and "scores of masks"; "order of examples" and "mask
# updates") draw in different ways, numbers here and the seed of another generator there.
PURPOSES: dict[str, Callable[[str, list[int], Sequence[Part]], np.random.SeedSequence]] = {
    "arms of a search": _by_parts,  # seed, arm or "masks" or "treatment", round, ...
    "augmentation": _spawned,
    "gradient batch": _by_purpose,  # seed, step
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
    """Returns the seed sequence of a purpose: a function of the arguments alone.

    Args:
        purpose: One of `PURPOSES`. Different purposes have independent streams.
        seed: Non-negative integer, or several. None: the system gives another one at every call.
        *parts: What tells the draws of this purpose apart, such as the path of a weight or a step.
    """
    given = np.random.SeedSequence().generate_state(4) if seed is None else seed
    return PURPOSES[purpose](
        purpose, [int(part) for part in np.array(given, dtype=object).reshape(-1)], parts
    )


def stream(purpose: str, seed: Seed, *parts: Part) -> np.random.Generator:
    """Returns the random generator of a purpose, see `sequence`."""
    return np.random.default_rng(sequence(purpose, seed, *parts))


def integer(purpose: str, seed: Seed, *parts: Part, bits: int = 31) -> int:
    """Returns a non-negative integer of so many bits, as a seed for other generators.

    Args:
        purpose: As in `sequence`.
        seed: As in `sequence`.
        *parts: As in `sequence`.
        bits: At most 32.
    """
    return int(sequence(purpose, seed, *parts).generate_state(1)[0] >> (32 - bits))

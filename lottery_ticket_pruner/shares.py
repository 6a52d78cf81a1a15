"""Shares say how much goes: one number, or a number for each pattern of paths."""

import numbers
import re
from collections.abc import Mapping, Sequence

Share = float | Mapping[str, float]


def one_of(rate: Share | None, sparsity: Share | None) -> tuple[str, Share]:
    """The one that is given, with its name.

    Raises:
        ValueError: If both are given, or none.
    """
    if (rate is None) == (sparsity is None):
        raise ValueError(
            "Give exactly one of `rate` (share of the alive weights to drop now) and `sparsity` "
            "(share of all weights that are pruned afterwards). "
            f"Received: rate={rate!r}, sparsity={sparsity!r}"
        )
    return ("rate", rate) if sparsity is None else ("sparsity", sparsity)


def check_share(name: str, share: float) -> None:
    """Refuses what is not a number in [0, 1).

    Raises:
        ValueError: If it is none. The message has the name.
    """
    if isinstance(share, bool) or not isinstance(share, numbers.Real) or not 0 <= share < 1:
        raise ValueError(
            f"`{name}` must be a number in [0, 1). Received: {name}={share!r} "
            f"of type {type(share).__name__}"
        )


def shares_of(name: str, share: Share, paths: Sequence[str], scope: str) -> dict[str, float]:
    """The share that holds for each path.

    Raises:
        ValueError: If a share is not a number in [0, 1), a path has none, or a pattern is not one,
            is found nowhere or only where earlier ones hold.
    """
    if not isinstance(share, Mapping):
        check_share(name, share)
        return dict.fromkeys(paths, share)
    if scope == "global":
        raise ValueError(
            f'`{name}` per layer contradicts scope="global", where all layers share one threshold. '
            f"Give one number, or another scope. Received: {name}={share!r}"
        )
    for value in share.values():
        check_share(name, value)
    patterns = {}
    for key in share:
        if key == "default":
            continue
        try:
            patterns[key] = re.compile(key)
        except (re.error, TypeError) as error:
            raise ValueError(f"`{name}` has the key {key!r}, no pattern: {error}") from error
        if not any(patterns[key].search(path) for path in paths):
            raise ValueError(
                f"The pattern {key!r} of `{name}` is found in no path. The paths: {list(paths)}"
            )
    shares, used = {}, set()
    for path in paths:
        key = next((key for key, found in patterns.items() if found.search(path)), "default")
        key = path if path in share else key
        used.add(key)
        if key not in share:
            raise ValueError(
                f'`{name}` has neither a pattern that matches {path!r} nor a "default". '
                f"Received: {name}={share!r}"
            )
        shares[path] = share[key]
    if idle := [key for key in patterns if key not in used]:
        raise ValueError(
            f"{idle} of `{name}` would do nothing: earlier patterns take all the paths that these "
            f"are found in. Put them first. Received: {name}={share!r}"
        )
    return shares

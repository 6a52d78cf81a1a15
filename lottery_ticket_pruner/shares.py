"""Amounts to prune: one share, or a share for each pattern of paths."""

import re
from collections.abc import Collection, Mapping
from typing import TypeVar

from lottery_ticket_pruner.checks import is_number, share_meant

Share = float | Mapping[str, float]
_Share = TypeVar("_Share", bound=Share)


def one_of(rate: _Share | None, sparsity: _Share | None) -> tuple[str, _Share]:
    """Returns the argument that is given, with its name.

    Raises:
        ValueError: If both or neither are given.
    """
    if rate is not None and sparsity is None:
        return "rate", rate
    if rate is None and sparsity is not None:
        return "sparsity", sparsity
    raise ValueError(
        "Pass exactly one of `rate` (share of the kept weights to prune now) and `sparsity` "
        "(share of all weights that are pruned afterwards). "
        f"Received: rate={rate!r}, sparsity={sparsity!r}"
    )


def check_share(name: str, share: object) -> float:
    """Returns a share that is a number in [0, 1).

    Raises:
        ValueError: If it is not. The message contains `name`.
    """
    if not is_number(share) or not 0 <= share < 1:
        raise ValueError(
            f"`{name}` must be a number in [0, 1). Received: {name}={share!r} "
            f"of type {type(share).__name__}.{share_meant(share)}"
        )
    return share


def shares_of(name: str, share: Share, paths: Collection[str], scope: str) -> dict[str, float]:
    """Returns the share of each path.

    Raises:
        ValueError: If a share is not a number in [0, 1), a path has no share, a pattern is not a
            valid regular expression, or a pattern applies to no path (possibly because earlier
            patterns match all of its paths).
    """
    if not isinstance(share, Mapping):
        check_share(name, share)
        return dict.fromkeys(paths, share)
    if scope in ("global", "isomorphic"):
        raise ValueError(
            f'`{name}` per layer contradicts scope="{scope}", where layers share one threshold. '
            f"Pass one number, or use another scope. Received: {name}={share!r}"
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
            raise ValueError(
                f"`{name}` has the key {key!r}, which is not a valid regular expression: {error}"
            ) from error
        if not any(patterns[key].search(path) for path in paths):
            raise ValueError(
                f"The pattern {key!r} of `{name}` matches no path. The paths: {list(paths)}"
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
            f"{idle} of `{name}` would have no effect, because earlier patterns match all of their "
            f"paths. Put them first. Received: {name}={share!r}"
        )
    return shares

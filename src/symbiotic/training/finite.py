"""Is every number of a nested state finite? Cheap enough for every checkpoint: one sum a tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor


def not_finite(state: Any) -> str | None:
    """The name of the first floating tensor or number in nested containers that holds an inf or NaN, None without one.

    A sum is finite only if all its terms are. One that is not may have overflowed: then each term is looked at. Of a
    sharded tensor only this rank's part is seen, so that no rank waits for another.
    """
    return next((name for name, value in _leaves("", state) if not _finite(value)), None)


def lost_values(checkpoint: Mapping[str, Any]) -> str | None:
    """The first weight, or moment of an optimiser, of a Lightning checkpoint that is not finite; None where all are.
    States of callbacks are not looked at: logs may hold what could not be measured."""
    if (name := not_finite(checkpoint.get("state_dict", {}))) is not None:
        return name
    moments = {f"optimizer {n}": state.get("state") for n, state in enumerate(checkpoint.get("optimizer_states", ()))}
    return not_finite(moments)


def _finite(value: Tensor | float) -> bool:
    if isinstance(value, float):
        return abs(value) < float("inf")
    value = value.detach()
    value = value.to_local() if isinstance(value, DTensor) else value
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor | float]]:
    if isinstance(value, float) or (isinstance(value, Tensor) and value.is_floating_point()):
        yield name, value
    elif isinstance(value, Mapping):
        for key, child in value.items():
            yield from _leaves(f"{name}.{key}" if name else str(key), child)
    elif isinstance(value, list | tuple):
        for n, child in enumerate(value):
            yield from _leaves(f"{name}.{n}", child)

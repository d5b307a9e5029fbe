"""Several experts of a parent as one of the child, side by side (ours: wide experts at the parent's parameters).

A SwiGLU FFN over the joined hidden units computes the sum of its parts; the outgoing weights are divided by their
number, so it is their mean: as large as what a parent adds whose gates sum to one. Its router column is the mean, too.
Suffixes: E experts of the parent, m of which make one, D width, F hidden units of each.
"""

from __future__ import annotations

from torch import Tensor


def merged(name: str, tensor: Tensor, merge: int) -> Tensor:
    """A parent's tensor with every `merge` neighbouring experts joined; as it is for 1.

    name: says what it is: `….w_in` [E, D, 2F] (gate, then up), `….w_out` [E, F, D], a router [D, E], a bias [E].
    """
    if merge == 1:
        return tensor
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "w_in":
        parts = tensor.unflatten(0, (-1, merge)).unflatten(-1, (2, -1))  # [E/m, m, D, 2, F]
        return parts.permute(0, 2, 3, 1, 4).flatten(2)
    if leaf == "w_out":
        return tensor.unflatten(0, (-1, merge)).flatten(1, 2) / merge
    return tensor.unflatten(-1, (-1, merge)).mean(-1)

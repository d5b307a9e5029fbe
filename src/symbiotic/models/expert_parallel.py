"""Expert parallelism: each rank of a group holds some experts of a pool, and tokens travel to theirs and back.

The ranks of a group train on different tokens, so the group lies inside data parallelism. Routers, gates and everything
else stay as they are: what changes is where `Experts` computes its rows.
Suffixes: A rows (assignments) of this rank, a those that came here, E experts of a pool, e those held here, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from symbiotic.models.fused import scale_gradient


class _AllToAll(torch.autograd.Function):
    """Rows to their ranks; their gradients the same way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
        ctx.way_back = received, sent, group
        return _exchange(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(grad, *ctx.way_back), None, None, None


def _exchange(x: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out


def local(weight: Tensor) -> Tensor:
    """The experts that this rank holds of a stacked weight; any other weight as it is.

    The tokens of all ranks of the group add to the gradient of an expert, on one rank: divided by their number it is
    the mean over the group, as data parallelism makes one over all other ranks.
    """
    if not isinstance(weight, DTensor):
        return weight
    return scale_gradient(weight.to_local(), torch.tensor(1.0 / weight.device_mesh.size()))


def exchanged(
    compute: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    group: ProcessGroup,
    x_AD: Tensor,
    ends_E: Tensor,
    weight_scale_A1: Tensor | None,
) -> Tensor:
    """`compute` on the ranks that hold the experts; the arguments are those of `Experts.forward`, of all E experts.

    Every rank of the group has to call it, also without rows. One gather of counts, for which the host waits, and two
    exchanges of rows; a third where the gradient of the weights is scaled by rows.
    """
    size, me = dist.get_world_size(group), dist.get_rank(group)
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1)).long()
    counts = counts_E.new_empty(size * len(counts_E))
    dist.all_gather_into_tensor(counts, counts_E, group=group)
    counts_RRe = counts.view(size, size, -1)  # from rank, to rank, expert there
    rows = counts_RRe.sum(-1).tolist()
    sent, received = rows[me], [row[me] for row in rows]
    from_Re = counts_RRe[:, me]
    held = torch.arange(from_Re.shape[1], device=x_AD.device).repeat(size)
    order_a = held.repeat_interleave(from_Re.reshape(-1)).argsort(stable=True)  # they come by rank, and leave by expert
    x_aD = _AllToAll.apply(x_AD, sent, received, group)[order_a]
    scale_a1 = None if weight_scale_A1 is None else _exchange(weight_scale_A1, sent, received, group)[order_a]
    y_aD = compute(x_aD, from_Re.sum(0).cumsum(0).int(), scale_a1)
    return _AllToAll.apply(y_aD[order_a.argsort()], received, sent, group)

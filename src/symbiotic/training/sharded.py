"""Tensors that may be sharded: this rank's part, the whole, and norms over ranks and meshes.

Each element of a sharded parameter, or gradient, lies on one rank of the run (see `models.sharding`): squares are
summed where they lie, and once over all ranks, whatever mesh a parameter is on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this rank: its own memory, so that it may be written to."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state put together, on the CPU, in rank 0; of the sharded tensors nothing in the others, which have to call it
    too. They come one after another: no rank needs room for more than one on top of what it has."""
    found = {}
    for name, value in state.items():
        together = value.full_tensor().detach() if isinstance(value, DTensor) else value.detach()
        if not isinstance(value, DTensor) or dist.get_rank() == 0:
            found[name] = together.cpu()
    return found


def group_norms(groups: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """[] norm of all tensors of each group together, in float32; 0 of none. Collective where any is sharded."""
    device = next((tensor.device for group in groups for tensor in group), None)
    squares = [_squares(group) for group in groups]
    summed = torch.stack([s if s is not None else torch.zeros((), device=device) for s in squares])
    if any(isinstance(tensor, DTensor) for group in groups for tensor in group):
        dist.all_reduce(summed)
    return list(summed.sqrt().unbind())


def _squares(group: Sequence[Tensor]) -> Tensor | None:
    norms = torch._foreach_norm([local(tensor) for tensor in group]) if group else []
    return torch.stack([norm.float() ** 2 for norm in norms]).sum() if norms else None


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """[] norm of all gradients together."""
    if any(isinstance(gradient, DTensor) for gradient in gradients):
        return group_norms([gradients])[0]
    return nn.utils.get_total_norm(gradients)


def clip(parameters: Sequence[nn.Parameter], largest: float, norm: Tensor) -> None:
    """Scale the gradients so that their norm, which is `norm`, is at most `largest`; in place."""
    given = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if any(isinstance(gradient, DTensor) for gradient in given):
        torch._foreach_mul_([local(gradient) for gradient in given], (largest / (norm + 1e-6)).clamp(max=1.0))
    else:
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)

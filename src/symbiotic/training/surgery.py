"""What is done about gradients that conflict: with the momentum (MAOP), or of the two tasks (torchjd's aggregators).

Suffix: T tasks. A gradient is a list of tensors, one a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from symbiotic.schema import ConfigError, Surgery

NO_MOMENTUM = 1e-12  # below this |m|^2 has no direction (Rosetta)
ROUNDING = 1e-9  # of torchjd's solvers: a weight this near to 1 is 1

# --------------------------------------------------------------------------- against the momentum


# g <- g - (g.m / |m|^2) m   where g.m < 0
def without_opposition(gradient: Tensor, momentum: Tensor) -> Tensor:
    """The gradient without what points against the momentum; as it is where nothing does, or where |m|^2 < 1e-12.

    Of one tensor, in float32. The products of sharded tensors run over all shards. Waits for nothing on the host.
    """
    g, m = gradient.float(), momentum.float()
    product, square = (g * m).sum(), (m * m).sum()
    opposed = (product < 0) & (square >= NO_MOMENTUM)
    share = torch.where(opposed, product / square.clamp(min=NO_MOMENTUM), torch.zeros_like(square))
    return (g - share * m).to(gradient.dtype)


def project_on_momentum(optimizer: Optimizer, roles: Collection[str]) -> None:
    """MAOP (Rosetta, arXiv 2607.00293), in place: `without_opposition` of every gradient and Adam's first moment.

    Tensor by tensor: each weight of each layer is judged by itself (ours; the source does not say what g.m runs over).
    roles: of the parameter groups that it is done to; empty: all. Does nothing to a parameter without a gradient, or
    that the optimiser has not moved yet.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if not roles or group["role"] in roles else ():
            momentum = optimizer.state.get(parameter, {}).get("exp_avg")
            if parameter.grad is not None and momentum is not None:
                parameter.grad.copy_(without_opposition(parameter.grad, momentum))


# --------------------------------------------------------------------------- of the tasks

Weighting = Callable[[Tensor], Tensor]  # [T, T] products of the tasks' gradients -> [T] what they are weighed with


def task_weighting(cfg: Surgery) -> Weighting:
    """torchjd's aggregator `cfg.method` as a function of the products, scaled so that equal gradients give their sum.

    PCGrad (arXiv 2001.06782) sums as it is. UPGrad (2406.16232) returns the mean where nothing conflicts: times T.
    CAGrad (2110.14048) returns 1 + c times the mean where the gradients agree: times T / (1 + c).

    Raises:
        ConfigError: torchjd, or a solver that it needs for this method, is not installed.
    """
    try:
        from torchjd import aggregation

        if cfg.method == "pcgrad":
            return aggregation.PCGradWeighting()
        if cfg.method == "cagrad":
            averse = aggregation.CAGradWeighting(cfg.cagrad_c)
            return lambda products_TT: averse(products_TT) * len(products_TT) / (1.0 + cfg.cagrad_c)
        unconflicting = aggregation.UPGradWeighting()
        return lambda products_TT: unconflicting(products_TT) * len(products_TT)
    except ImportError:
        raise ConfigError(f"surgery.method={cfg.method}: needs torchjd: pip install 'symbiotic[surgery]'") from None


def task_weights(products_TT: Tensor, weighting: Weighting) -> list[float]:
    """What each task's gradient is weighed with; 1 each is their plain sum.

    The products are divided by their trace: torchjd's constants are absolute (gradients whose squared norms add up to
    less than 1e-4 would count as zero), its weights do not depend on the scale. Where a task's gradient is exactly zero
    nothing conflicts, and the sum is taken (CAGrad would stop); so it is where one is not finite. PCGrad draws the
    order of the tasks from the global generator, which is left as it was.
    """
    host_TT = products_TT.double().cpu()
    squares_T = host_TT.diagonal()
    if not bool(host_TT.isfinite().all()) or not bool((squares_T > 0).all()):
        return [1.0] * len(host_TT)
    with torch.random.fork_rng(devices=[]):
        return [float(weight) for weight in weighting(host_TT / squares_T.sum())]


def products(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    """[T, T] dot products of T gradients, each over all its tensors; float64."""

    def dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
        parts = [torch.dot(a.flatten().float(), b.flatten().float()) for a, b in zip(first, second, strict=True)]
        return torch.stack(parts).double().sum()

    return torch.stack([torch.stack([dot(first, second) for second in gradients]) for first in gradients])


class TaskGradients:
    """The gradient of each task on some parameters, summed over the micro-batches of an optimiser step.

    `.grad` fills as always; `combine` then adds what the combination differs from the plain sum by. So where nothing
    conflicts, PCGrad and UPGrad train bit for bit as without. The parameters together make one vector.
    """

    def __init__(self, cfg: Surgery, parameters: Sequence[nn.Parameter]) -> None:
        self.weighting, self.parameters = task_weighting(cfg), list(parameters)
        self.losses: dict[str, Tensor] = {}  # task -> its weighted loss on the current micro-batch, with the graph
        self.sums: dict[str, list[Tensor]] = {}

    def add(self, micro_batches: int) -> None:
        """Before the backward pass of one of `micro_batches`, over which the step's gradient is the mean."""
        for task, loss in self.losses.items():
            part = loss / micro_batches
            grads = list(torch.autograd.grad(part, self.parameters, retain_graph=True, materialize_grads=True))
            before = self.sums.get(task)  # not added to in place: autograd may hand out views
            self.sums[task] = grads if before is None else list(torch._foreach_add(before, grads))
        self.losses = {}

    def clear(self) -> None:
        self.sums = {}

    def combine(self) -> None:
        """Before the clip. Parameters without a gradient (frozen ones) take no part."""
        live = [i for i, parameter in enumerate(self.parameters) if parameter.grad is not None]
        parts = [[grads[i] for i in live] for grads in self.sums.values()]
        if not live or not parts:
            return
        total = [grad for parameter in self.parameters if (grad := parameter.grad) is not None]
        for weight, part in zip(task_weights(products(parts), self.weighting), parts, strict=True):
            if abs(weight - 1.0) > ROUNDING:
                torch._foreach_add_(total, part, alpha=weight - 1.0)

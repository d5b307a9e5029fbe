"""The MoE layer: pools are storage, visibility is a table, shared experts have a scope.

Every system of the project is this file with other tables. Suffixes: N tokens, D width, F expert hidden, E experts
of a pool (or all), C router columns, K of top-k, A = N*K assignments, M kinds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from symbiotic.layout import kinds_by_pool, mixes, pool_sizes, router_of, router_pools, shared_scopes, shield_kinds
from symbiotic.models.balance import z_loss
from symbiotic.models.expert_parallel import exchanged, local
from symbiotic.models.fused import combine, gather, scale_gradient, swiglu
from symbiotic.models.lora import Adaptable
from symbiotic.models.places import Places, product
from symbiotic.models.routing import Columns, columns_to_experts, count_by_kind, route, straight_through
from symbiotic.models.task_router import TaskRouter, TaskStats
from symbiotic.schema import KINDS, Model, System


class LayerTrace(NamedTuple):
    """What one MoE layer did with every token, padding included; for probes and the inspector."""

    probs_NE: Tensor  # the router's probability of every expert
    experts_NK: Tensor  # the chosen experts, numbered pool after pool
    gates_NK: Tensor
    routed_ND: Tensor  # what the routed experts added to the residual stream
    shared_ND: Tensor  # what the shared experts added
    visible_NE: Tensor  # bool, the experts that the token could choose among


class LayerStats(NamedTuple):
    counts_ME: Tensor
    probs_ME: Tensor
    z: Tensor
    trace: LayerTrace | None = None
    task: TaskStats | None = None


class Experts(Adaptable):
    """One pool: E SwiGLU experts in stacked weights, one `grouped_mm` for all of them.

    An `nn.ModuleList` would crash DDP when an expert gets no token (spec: reliability 1.12); stacked weights do not.
    """

    group: ProcessGroup | None = None  # of the ranks that share the experts out (see `expert_parallel`)

    def __init__(self, num_experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(num_experts, width, 2 * hidden))
        self.w_out = nn.Parameter(torch.empty(num_experts, hidden, width))

    def forward(self, x_AD: Tensor, ends_E: Tensor, weight_scale_A1: Tensor | None = None) -> Tensor:
        """x_AD sorted by expert; ends_E int32, where each expert's tokens end. An empty pool is still called.

        weight_scale_A1: factor on each row's part in the gradient of the weights (shield mode `weights`).
        """
        if self.group is None:
            return self.compute(x_AD, ends_E, weight_scale_A1)
        return exchanged(self.compute, self.group, x_AD, ends_E, weight_scale_A1)

    def compute(self, x_AD: Tensor, ends_E: Tensor, weight_scale_A1: Tensor | None = None) -> Tensor:
        if len(x_AD) == 0:  # the backward of grouped_mm refuses an empty operand; the weights must stay in the graph
            return x_AD + 0.0 * sum(local(weight).sum() for weight in self.parameters())
        hidden_AF = swiglu(self.times("w_in", x_AD, weight_scale_A1, ends_E))
        return self.times("w_out", hidden_AF, weight_scale_A1, ends_E)


class SharedExpert(Adaptable):
    """A SwiGLU FFN that every token of its scope passes through; optionally gated (Qwen1.5-MoE)."""

    def __init__(self, width: int, hidden: int, gated: bool = False) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(width, 2 * hidden))
        self.w_out = nn.Parameter(torch.empty(hidden, width))
        self.gate = nn.Parameter(torch.empty(width, 1)) if gated else None

    def forward(self, x_ND: Tensor, weight_scale_N1: Tensor | None = None) -> Tensor:
        """weight_scale_N1: factor on each token's part in the gradient of the weights (shield mode `weights`)."""
        hidden_NF = swiglu(self.times("w_in", x_ND, weight_scale_N1))
        y_ND = self.times("w_out", hidden_NF, weight_scale_N1)
        return y_ND if self.gate is None else y_ND * torch.sigmoid(product(x_ND, self.gate, weight_scale_N1))


class MoE(nn.Module):
    """Routed experts in pools, their routers, and shared experts, laid out as the system says.

    dense: a layer without routed experts, whose one FFN has this hidden width (`model.dense_layers`).
    """

    expert_C: Tensor
    visible_MC: Tensor
    sees_RC: Tensor
    bias: Tensor | None
    routed_off = False  # True: as if the routed experts added nothing (see `shared_only`)

    def __init__(self, model: Model, system: System, dense: int = 0) -> None:
        super().__init__()
        sizes = {} if dense else pool_sizes(model, system)
        columns = {} if dense else router_pools(system)
        self.cfg, self.num_experts = router_of(model, system), sum(sizes.values())
        self.straight_through, self.alpha_scale = system.gate == "straight_through", system.alpha_scale
        hidden = system.merge * model.expert_hidden
        self.shield_mode, self.shielded_kinds = system.shield.mode, shield_kinds(system)
        self.pools = nn.ModuleDict({p: Experts(e, model.width, hidden) for p, e in sizes.items()})
        self.kinds_by_pool = kinds_by_pool(system) if sizes else None
        self.routers = nn.ParameterDict()
        for name, pool in columns.items():  # one by one: ParameterDict sorts a plain dict, and the order is the layout
            self.routers[name] = nn.Parameter(torch.empty(model.width, sizes[pool]))
        self.scopes = {"dense": KINDS} if dense else shared_scopes(system)
        hidden = dense or model.shared_hidden + (0 if sizes else model.router.top_k * model.expert_hidden)
        gated = model.gated_shared and not dense  # the FFN of a dense layer is no shared expert (Qwen2-MoE)
        self.shared = nn.ModuleDict({s: SharedExpert(model.width, hidden, gated) for s in self.scopes})
        self.mix = nn.Parameter(torch.empty(1)) if sizes and mixes(system) else None
        self.task_router: TaskRouter | None = None
        if sizes:
            table = Columns(model, system)
            self.one_to_one, self.all_visible = table.one_to_one, bool(table.visible_MC.all())
            self.register_buffer("expert_C", table.expert_C, persistent=False)
            self.register_buffer("visible_MC", table.visible_MC, persistent=False)
            if system.task_router:
                self.task_router = TaskRouter(model.width, table.routers_RM)
                self.register_buffer("sees_RC", table.sees_RC, persistent=False)
        self.register_buffer("bias", torch.zeros(len(table.expert_C)) if sizes and model.router.bias else None)

    def forward(self, x_ND: Tensor, places: Places) -> tuple[Tensor, LayerStats | None]:
        y_ND, stats = self.routed(x_ND, places) if self.pools else (torch.zeros_like(x_ND), None)
        if self.routed_off:
            y_ND = torch.zeros_like(y_ND)
        y_ND = routed_ND = self.mixed(y_ND, 1)
        for name in self.shared:
            y_ND = self.add_shared(y_ND, x_ND, name, places)
        if stats is not None and stats.trace is not None:
            trace = stats.trace._replace(routed_ND=routed_ND, shared_ND=y_ND - routed_ND)
            stats = stats._replace(trace=trace)
        return y_ND, stats

    def mixed(self, y_ND: Tensor, side: int) -> Tensor:
        """The part of an output in `s (alpha E + (1 - alpha) S)`, alpha = sigmoid(a) (UTAMoE): of routed experts, E, on
        side 1, of shared ones, S, on side -1, as 1 - sigmoid(a) = sigmoid(-a). As it is where nothing is mixed."""
        if self.mix is None or self.alpha_scale is None:
            return y_ND
        return y_ND * (self.alpha_scale * torch.sigmoid(side * self.mix.float())).to(y_ND.dtype)

    # ------------------------------------------------------------------ routed experts

    def routed(self, x_ND: Tensor, places: Places) -> tuple[Tensor, LayerStats]:
        """`y = sum_{i in S} w_i E_i(x)`; each token chooses S among the columns that its kind, or its task, sees.

        Logits, gates and counts are in float32 under autocast too: bfloat16 cannot count to 257.
        """
        with torch.autocast(x_ND.device.type, enabled=False):
            visible_NC, task = self.visible(x_ND, places)
            logits_NC = x_ND.float() @ torch.cat(list(self.routers.values()), dim=1).float()
            gates_NK, columns_NK, probs_NC = route(logits_NC, visible_NC, self.cfg, self.bias)
            if self.straight_through:
                gates_NK = straight_through(gates_NK, columns_NK, probs_NC)
            counts_MC = count_by_kind(columns_NK, places.kinds_NM, logits_NC.shape[1])
            probs_MC = places.kinds_NM.T @ probs_NC
            if not self.one_to_one:
                counts_MC = columns_to_experts(counts_MC, self.expert_C, self.num_experts)
                probs_MC = columns_to_experts(probs_MC, self.expert_C, self.num_experts)
            z = z_loss(logits_NC, visible_NC, places.valid_N)
        experts_NK = self.expert_C[columns_NK]
        y_ND = self.dispatch(x_ND, gates_NK.to(x_ND.dtype), experts_NK, places)
        trace = None
        if places.trace:
            seen_NC = torch.ones_like(probs_NC) if visible_NC is None else visible_NC.to(probs_NC)
            probs_NE, seen_NE = (columns_to_experts(v, self.expert_C, self.num_experts) for v in (probs_NC, seen_NC))
            trace = LayerTrace(probs_NE, experts_NK, gates_NK, y_ND, y_ND, seen_NE > 0)
        return y_ND, LayerStats(counts_MC, probs_MC, z, trace, task)

    def visible(self, x_ND: Tensor, places: Places) -> tuple[Tensor | None, TaskStats | None]:
        """[N, C] the columns that each token sees: by its kind, or by the task router's choice. None: all."""
        if self.task_router is not None:
            group_N, task = self.task_router(x_ND, places)
            return self.sees_RC[group_N], task
        return (None if self.all_visible else self.visible_MC[places.kind_N]), None

    def dispatch(self, x_ND: Tensor, gates_NK: Tensor, experts_NK: Tensor, places: Places) -> Tensor:
        """Sort the assignments by expert, one grouped product per pool, sum each token's k outputs.

        Padding sorts behind the last expert and is not computed. The sum runs in the order of the gates, so a
        layout with several pools open to all gives the same bits as one pool.
        """
        experts_A = experts_NK.masked_fill(~places.valid_N[:, None], self.num_experts).reshape(-1)
        sorted_A, order_A = experts_A.sort(stable=True)
        every_E = torch.arange(self.num_experts, device=sorted_A.device)
        ends_E = torch.searchsorted(sorted_A, every_E, right=True, out_int32=True)
        place_A = torch.empty_like(order_A).scatter_(0, order_A, torch.arange(len(order_A), device=order_A.device))
        x_AD = gather(x_ND, order_A, place_A)
        y_AD = self.run_pools(x_AD, order_A // experts_NK.shape[1], ends_E, places)
        return combine(y_AD, gates_NK, order_A, place_A)

    @torch.compiler.disable
    def run_pools(self, x_AD: Tensor, tokens_A: Tensor, ends_E: Tensor, places: Places) -> Tensor:
        """[A, D]: what the expert of each assignment makes of its token; zero behind the last expert (padding).

        Lengths of tensors depend on the data here, so it is the one break in the graph of a compiled block, and stays
        eager.
        """
        sizes, start, first, outputs = self.rows_of_pools(ends_E, places), 0, 0, []
        *parts, behind = x_AD.split([*sizes, len(x_AD) - sum(sizes)])
        for (name, pool), rows, part_aD in zip(self.pools.items(), sizes, parts, strict=True):
            after = first + len(pool.w_in)  # type: ignore[arg-type]
            scale_a1 = self.gradient_scale(f"pools.{name}", tokens_A[start : start + rows], places)
            ends_e = (ends_E[first:after] - start).clamp(0, rows)  # within the rows, also where a logit is not finite
            outputs.append(self.shielded(pool, scale_a1, part_aD, ends_e))
            start, first = start + rows, after
        if len(outputs) == 1 and not len(behind):
            return outputs[0]
        return torch.cat([*outputs, torch.zeros_like(behind, dtype=outputs[0].dtype)])  # bfloat16 under autocast

    def rows_of_pools(self, ends_E: Tensor, places: Places) -> list[int]:
        """How many assignments come to each pool. Where kinds tell, no layer waits for its router's choice; else the
        host waits for it here."""
        if self.kinds_by_pool is not None:
            return [self.cfg.top_k * places.count(kinds) for kinds in self.kinds_by_pool.values()]
        ends = [0, *ends_E.tolist()]
        after = [0, *itertools.accumulate(len(pool.w_in) for pool in self.pools.values())]  # type: ignore[arg-type]
        return [ends[b] - ends[a] for a, b in itertools.pairwise(after)]

    # ------------------------------------------------------------------ shared experts, and the shield

    def add_shared(self, y_ND: Tensor, x_ND: Tensor, name: str, places: Places) -> Tensor:
        """`y + E_shared(x)` on the tokens of its scope, the gradient of shielded kinds scaled."""
        expert, scope = self.shared[name], self.scopes[name]
        if set(scope) == set(KINDS):
            added = self.shielded(expert, self.gradient_scale(f"shared.{name}", None, places), x_ND)
            return y_ND + self.mixed(added, -1)
        index = places.index(scope)
        added = self.shielded(expert, self.gradient_scale(f"shared.{name}", index, places), x_ND[index])
        added = self.mixed(added, -1)
        return y_ND.index_add(0, index, added.to(y_ND.dtype))

    def gradient_scale(self, component: str, rows: Tensor | None, places: Places) -> Tensor | None:
        """[n, 1] factor on the gradient of these tokens (None: of all) through a component; None: no shield."""
        scale_N1 = places.gradient_scale(self.shielded_kinds.get(component, ()))
        return scale_N1 if scale_N1 is None or rows is None else scale_N1[rows]

    def shielded(self, expert: nn.Module, scale_n1: Tensor | None, *inputs: Tensor) -> Tensor:
        """`expert(*inputs)` with the gradient of each row scaled; mode `weights`: only that of the expert's weights,
        so that lower layers still learn through its output."""
        if scale_n1 is None:
            return expert(*inputs)
        if self.shield_mode == "weights":
            return expert(*inputs, scale_n1)
        return scale_gradient(expert(*inputs), scale_n1)


@contextmanager
def shared_only(model: nn.Module) -> Iterator[None]:
    """Inside, the routed experts of every MoE layer of `model` add nothing; routing itself goes on as before."""
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    before = [layer.routed_off for layer in layers]
    try:
        for layer in layers:
            layer.routed_off = True
        yield
    finally:
        for layer, off in zip(layers, before, strict=True):
            layer.routed_off = off

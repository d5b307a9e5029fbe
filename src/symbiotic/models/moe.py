"""The MoE layer: pools are storage, visibility is a table, shared experts have a scope.

Every system of the project is this file with other tables. Suffixes: N tokens, D width, F expert hidden, E experts
of a pool (or all), C router columns, K of top-k, A = N*K assignments, M kinds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from symbiotic.layout import pool_sizes, router_pools, shared_scopes, shield_kinds
from symbiotic.models.balance import z_loss
from symbiotic.models.places import Places, scale_gradient
from symbiotic.models.routing import Columns, columns_to_experts, count_by_kind, route
from symbiotic.schema import KINDS, Model, System


class LayerStats(NamedTuple):
    counts_ME: Tensor
    probs_ME: Tensor
    z: Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2F] -> [..., F]: `silu(gate) * up`, gate and up fused in one product."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class Experts(nn.Module):
    """One pool: E SwiGLU experts in stacked weights, one `grouped_mm` for all of them.

    An `nn.ModuleList` would crash DDP when an expert gets no token (spec: reliability 1.12); stacked weights do not.
    """

    def __init__(self, num_experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(num_experts, width, 2 * hidden))
        self.w_out = nn.Parameter(torch.empty(num_experts, hidden, width))

    def forward(self, x_AD: Tensor, ends_E: Tensor) -> Tensor:
        """x_AD sorted by expert; ends_E int32, where each expert's tokens end. An empty pool is still called."""
        if len(x_AD) == 0:  # the backward of grouped_mm refuses an empty operand; the weights must stay in the graph
            return x_AD + 0.0 * (self.w_in.sum() + self.w_out.sum())
        hidden = swiglu(F.grouped_mm(x_AD, self.w_in, offs=ends_E))
        return F.grouped_mm(hidden, self.w_out, offs=ends_E)


class SharedExpert(nn.Module):
    """A SwiGLU FFN that every token of its scope passes through; optionally gated (Qwen1.5-MoE)."""

    def __init__(self, width: int, hidden: int, gated: bool = False) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(width, 2 * hidden))
        self.w_out = nn.Parameter(torch.empty(hidden, width))
        self.gate = nn.Parameter(torch.empty(width, 1)) if gated else None

    def forward(self, x_ND: Tensor, weight_scale: Tensor | None = None) -> Tensor:
        """weight_scale: [] factor on the gradient of the weights only (shield mode `weights`)."""

        def weight(w: Tensor) -> Tensor:
            return w if weight_scale is None else scale_gradient(w, weight_scale)

        y_ND = swiglu(x_ND @ weight(self.w_in)) @ weight(self.w_out)
        return y_ND if self.gate is None else y_ND * torch.sigmoid(x_ND @ weight(self.gate))


class MoE(nn.Module):
    """Routed experts in pools, their routers, and shared experts, laid out as the system says.

    dense: a layer without routed experts, whose one FFN has this hidden width (`model.dense_layers`).
    """

    expert_C: Tensor
    visible_MC: Tensor

    def __init__(self, model: Model, system: System, dense: int = 0) -> None:
        super().__init__()
        sizes = {} if dense else pool_sizes(model, system)
        columns = {} if dense else router_pools(system)
        self.cfg, self.num_experts = model.router, sum(sizes.values())
        self.shield_mode, self.shielded = system.shield.mode, shield_kinds(system)  # component -> kinds
        self.pools = nn.ModuleDict({p: Experts(e, model.width, model.expert_hidden) for p, e in sizes.items()})
        self.routers = nn.ParameterDict()
        for name, pool in columns.items():  # one by one: ParameterDict sorts a plain dict, and the order is the layout
            self.routers[name] = nn.Parameter(torch.empty(model.width, sizes[pool]))
        self.scopes = {"dense": KINDS} if dense else shared_scopes(system)
        hidden = dense or model.shared_hidden + (0 if sizes else model.router.top_k * model.expert_hidden)
        self.shared = nn.ModuleDict({s: SharedExpert(model.width, hidden, model.gated_shared) for s in self.scopes})
        if sizes:
            table = Columns(model, system)
            self.one_to_one, self.all_visible = table.one_to_one, bool(table.visible_MC.all())
            self.register_buffer("expert_C", table.expert_C, persistent=False)
            self.register_buffer("visible_MC", table.visible_MC, persistent=False)

    def forward(self, x_ND: Tensor, places: Places) -> tuple[Tensor, LayerStats | None]:
        y_ND, stats = self.routed(x_ND, places) if self.pools else (torch.zeros_like(x_ND), None)
        for name in self.shared:
            y_ND = self.add_shared(y_ND, x_ND, name, places)
        return y_ND, stats

    # ------------------------------------------------------------------ routed experts

    def routed(self, x_ND: Tensor, places: Places) -> tuple[Tensor, LayerStats]:
        """`y = sum_{i in S} w_i E_i(x)`; each token chooses S among the columns that its kind sees.

        Logits, gates and counts are in float32 under autocast too: bfloat16 cannot count to 257.
        """
        visible_NC = None if self.all_visible else self.visible_MC[places.kind_N]
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NC = x_ND.float() @ torch.cat(list(self.routers.values()), dim=1).float()
            gates_NK, columns_NK, probs_NC = route(logits_NC, visible_NC, self.cfg)
            counts_MC = count_by_kind(columns_NK, places.kinds_NM, logits_NC.shape[1])
            probs_MC = places.kinds_NM.T @ probs_NC
            if not self.one_to_one:
                counts_MC = columns_to_experts(counts_MC, self.expert_C, self.num_experts)
                probs_MC = columns_to_experts(probs_MC, self.expert_C, self.num_experts)
            z = z_loss(logits_NC, visible_NC, places.valid_N)
        y_ND = self.dispatch(x_ND, gates_NK.to(x_ND.dtype), self.expert_C[columns_NK], places)
        return y_ND, LayerStats(counts_MC, probs_MC, z)

    def dispatch(self, x_ND: Tensor, gates_NK: Tensor, experts_NK: Tensor, places: Places) -> Tensor:
        """Sort the assignments by expert, one grouped product per pool, sum each token's k outputs.

        Padding sorts behind the last expert and is not computed. The sum runs in the order of the gates, so a
        layout with several pools open to all gives the same bits as one pool.
        """
        k = experts_NK.shape[1]
        experts_A = experts_NK.masked_fill(~places.valid_N[:, None], self.num_experts).reshape(-1)
        order_A = experts_A.argsort(stable=True)
        counts_E = torch.bincount(experts_A, minlength=self.num_experts + 1)
        ends_E = counts_E.cumsum(0)
        last = torch.tensor([len(pool.w_in) for pool in self.pools.values()]).cumsum(0) - 1  # type: ignore[arg-type]
        stops = ends_E[last.to(ends_E.device)].tolist()
        tokens_A = order_A // k
        outputs, start, first = [], 0, 0
        for (name, pool), stop in zip(self.pools.items(), stops, strict=True):
            after = first + len(pool.w_in)  # type: ignore[arg-type]
            ends = (ends_E[first:after] - start).int()
            y = pool(x_ND[tokens_A[start:stop]], ends)
            outputs.append(self.shielded_rows(y, f"pools.{name}", tokens_A[start:stop], places))
            start, first = stop, after
        outputs.append(x_ND.new_zeros(len(order_A) - start, x_ND.shape[1]))
        place_A = torch.empty_like(order_A).scatter_(0, order_A, torch.arange(len(order_A), device=order_A.device))
        y_NKD = torch.cat(outputs)[place_A].view(*experts_NK.shape, -1)
        return (gates_NK[..., None] * y_NKD).sum(1)

    # ------------------------------------------------------------------ shared experts and their shield

    def add_shared(self, y_ND: Tensor, x_ND: Tensor, name: str, places: Places) -> Tensor:
        """`y + E_shared(x)` on the tokens of its scope, the gradient of shielded kinds scaled."""
        expert, scope = self.shared[name], self.scopes[name]
        kinds = self.shielded.get(f"shared.{name}", ())
        if set(scope) == set(KINDS):
            return y_ND + self.call_shared(expert, x_ND, None, kinds, places)
        index = places.index(scope)
        added = self.call_shared(expert, x_ND[index], index, kinds, places)
        return y_ND.index_add(0, index, added.to(y_ND.dtype))

    def call_shared(
        self, expert: nn.Module, x_ND: Tensor, index: Tensor | None, kinds: tuple[str, ...], places: Places
    ) -> Tensor:
        scale_N1 = places.gradient_scale(kinds)
        if scale_N1 is None:
            return expert(x_ND)
        if self.shield_mode == "weights":
            return self.weights_shielded(expert, x_ND, index, kinds, places)
        return scale_gradient(expert(x_ND), scale_N1 if index is None else scale_N1[index])

    def weights_shielded(
        self, expert: nn.Module, x_ND: Tensor, index: Tensor | None, kinds: tuple[str, ...], places: Places
    ) -> Tensor:
        """Tokens of the shielded kinds see weights whose gradient is scaled; the gradient to lower layers passes."""
        assert places.shield is not None
        hit_N = places.is_kind(kinds) if index is None else places.is_kind(kinds)[index]
        hit, rest = hit_N.nonzero().squeeze(-1), (~hit_N).nonzero().squeeze(-1)
        shielded = expert(x_ND[hit], 1.0 - places.shield)
        y_ND = shielded.new_zeros(x_ND.shape).index_copy(0, hit, shielded)
        return y_ND.index_copy(0, rest, expert(x_ND[rest]).to(y_ND.dtype))

    def shielded_rows(self, y_AD: Tensor, component: str, tokens_A: Tensor, places: Places) -> Tensor:
        scale_N1 = places.gradient_scale(self.shielded.get(component, ()))
        return y_AD if scale_N1 is None else scale_gradient(y_AD, scale_N1[tokens_A])

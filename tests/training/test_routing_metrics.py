"""Routing metrics against closed forms, a token-by-token simulation and random routing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch

from symbiotic.schema import KINDS
from symbiotic.training import routing_metrics as rm


def simulate_capacity(experts: torch.Tensor, num_experts: int, factor: float, c_min: int = 1) -> float:
    """Token by token: an expert takes assignments until it is full; the share that was taken. experts [N, k]."""
    limit = max(c_min, math.floor(experts.numel() * factor / num_experts))
    load, kept = [0] * num_experts, 0
    for expert in experts.flatten().tolist():
        if load[expert] < limit:
            load[expert] += 1
            kept += 1
    return kept / experts.numel()


def random_choices(num_tokens: int, top_k: int, num_experts: int, seed: int, skew: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, num_experts, generator=generator) + skew * torch.linspace(0, 1, num_experts)
    return scores.topk(top_k, dim=-1).indices


def counts_of(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    return torch.bincount(experts.flatten(), minlength=num_experts).float()


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
@pytest.mark.parametrize("skew", [0.0, 0.5, 3.0])
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(97, 2, 8), (256, 1, 16), (31, 3, 5)])
def test_capacity_rate_equals_a_token_by_token_simulation(
    tokens: int, top_k: int, experts: int, skew: float, factor: float
) -> None:
    chosen = random_choices(tokens, top_k, experts, seed=tokens, skew=skew)
    rate = rm.capacity_rate(counts_of(chosen, experts), torch.ones(experts, dtype=torch.bool), factor)
    assert rate.item() == pytest.approx(simulate_capacity(chosen, experts, factor), abs=1e-12)
    assert rate.item() <= 1.0


@pytest.mark.parametrize(("top_k", "experts"), [(1, 4), (2, 8), (8, 128)])
def test_total_collapse_gives_k_over_e(top_k: int, experts: int) -> None:
    counts = torch.zeros(experts)
    counts[:top_k] = 1024.0
    visible = torch.ones(experts, dtype=torch.bool)
    assert rm.capacity_rate(counts, visible).item() == pytest.approx(top_k / experts)
    assert rm.utilisation(counts, visible).item() == pytest.approx(top_k / experts)
    assert rm.active(counts, visible).item() == pytest.approx(top_k / experts)
    assert rm.dead(counts, visible).item() == pytest.approx(1 - top_k / experts)
    assert rm.max_vio(counts, visible).item() == pytest.approx(experts / top_k - 1)


def test_balance_is_one_and_the_minimal_capacity_binds() -> None:
    visible = torch.ones(8, dtype=torch.bool)
    even = torch.full((8,), 10.0)
    assert rm.capacity_rate(even, visible).item() == 1.0
    assert rm.utilisation(even, visible).item() == pytest.approx(1.0)
    assert rm.max_vio(even, visible).item() == pytest.approx(0.0)
    lonely = torch.zeros(8).index_fill(0, torch.tensor([3]), 2.0)  # floor(2/8) = 0, so only C_min lets one in
    assert rm.capacity_rate(lonely, visible).item() == pytest.approx(0.5)
    assert rm.capacity_rate(lonely, visible, c_min=2).item() == pytest.approx(1.0)


def test_invisible_experts_change_nothing() -> None:
    counts = torch.tensor([5.0, 1.0, 3.0])
    padded, visible = torch.tensor([5.0, 0.0, 1.0, 3.0, 0.0]), torch.tensor([True, False, True, True, False])
    for function in (rm.capacity_rate, rm.utilisation, rm.active, rm.dead, rm.max_vio):
        assert function(padded, visible).item() == pytest.approx(function(counts, visible[visible]).item())


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "factor"), [(256, 2, 8, 1.0), (500, 2, 16, 1.25), (40, 3, 7, 1.0), (64, 1, 32, 1.0)]
)
def test_random_baseline_equals_simulated_random_routing(tokens: int, top_k: int, experts: int, factor: float) -> None:
    repeats = 400
    chosen = random_choices(repeats * tokens, top_k, experts, seed=1).view(repeats, tokens * top_k)
    counts = torch.zeros(repeats, experts).scatter_add_(1, chosen, torch.ones(chosen.shape))
    rates = rm.capacity_rate(counts, torch.ones(experts, dtype=torch.bool), factor)
    expected = rm.random_capacity_rate(tokens, top_k, experts, factor)
    assert rates.mean().item() == pytest.approx(expected, abs=4 * rates.std().item() / repeats**0.5 + 1e-9)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(4, 1, 3), (3, 2, 4), (5, 2, 3)])
def test_random_baseline_equals_the_mean_over_all_routings(
    tokens: int, top_k: int, experts: int, factor: float
) -> None:
    """Every way in which N tokens can choose k of E experts, one by one."""
    choices = list(itertools.combinations(range(experts), top_k))
    routings = itertools.product(choices, repeat=tokens)
    rates = [simulate_capacity(torch.tensor(routing), experts, factor) for routing in routings]
    expected = sum(rates) / len(rates)
    assert rm.random_capacity_rate(tokens, top_k, experts, factor) == pytest.approx(expected, abs=1e-12)


def test_random_baseline_is_near_the_single_draws_of_the_spec() -> None:
    assert rm.random_capacity_rate(4096, 8, 128) == pytest.approx(0.977, abs=2e-3)
    assert rm.random_capacity_rate(256, 2, 8) == pytest.approx(0.953, abs=6e-3)


def test_random_baseline_at_its_edges() -> None:
    assert math.isnan(rm.random_capacity_rate(0, 2, 8))
    assert rm.random_capacity_rate(100, 4, 4) == 1.0  # every token takes every expert
    assert rm.random_capacity_rate(1, 1, 8) == 1.0
    assert rm.random_capacity_rate(100, 4, 4, factor=0.5) == pytest.approx(0.5)
    assert 0.998 < rm.random_capacity_rate(2_000_000, 8, 128) < 1.0
    assert rm.random_capacity_rate(1000, 2, 16, factor=0.01) == pytest.approx(1 / 125, rel=1e-6)


def test_overlap_of_equal_disjoint_and_half_shared_loads() -> None:
    a, b = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 3.0, 3.0])
    assert rm.overlap(a, 5 * a).item() == pytest.approx(1.0)
    assert rm.overlap(a, b).item() == pytest.approx(0.0)
    half = torch.tensor([0.0, 1.0, 1.0, 0.0])
    assert rm.overlap(a, half).item() == pytest.approx(0.5)


def window(
    micro_batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    visible: torch.Tensor,
    factors: Sequence[float] = (1.0, 1.25),
) -> dict[str, torch.Tensor]:
    """The sums of micro-batches (counts [L, M, E], tokens [M]), as a monitor keeps them; k is 2."""
    sums: dict[str, torch.Tensor] = {}
    for counts, tokens in micro_batches:
        added = rm.capacity_sums(counts, tokens, visible, factors)
        added["random"] = torch.tensor(rm.random_rates(tokens.tolist(), visible, 2, factors), dtype=torch.float64)
        sums = {name: sums.get(name, 0.0) + value for name, value in added.items()}
    return sums


def planted(num_layers: int = 2, share: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """12 experts, all visible: text on experts 0-5 and latents on 6-11, each evenly, up to one expert in each half."""
    counts = torch.zeros(num_layers, len(KINDS), 12)
    counts[:, 0, :6] = 200.0
    counts[:, 3, 6:] = 200.0
    moved = round(200 * (1 - share))
    for kind, first in ((0, 0), (3, 6)):
        counts[:, kind, first] += moved
        counts[:, kind, first + 1] -= moved
    return counts, torch.tensor([600.0, 0.0, 0.0, 600.0]), torch.ones(len(KINDS), 12, dtype=torch.bool)


def test_kinds_show_what_the_pooled_number_hides() -> None:
    """Spec, section 6: .98 pooled while each kind has .50."""
    counts, tokens, visible = planted(share=0.88)
    out = rm.summarise(window([(counts, tokens)], visible), visible)
    assert out["routing/capacity@1/all"] == pytest.approx(0.98)
    for kind in ("text", "vae"):
        assert out[f"routing/capacity@1/{kind}"] == pytest.approx(0.5)
        assert out[f"routing/capacity@1/{kind}/random"] > 0.95
    assert out["routing/overlap/text-vae"] == pytest.approx(0.0)


def test_summary_names_layers_and_baselines() -> None:
    counts, tokens, visible = planted()
    counts[1, 3] = 0.0
    counts[1, 3, :2] = 600.0  # layer 1 collapses for latents
    out = rm.summarise(window([(counts, tokens)], visible), visible)
    assert out["routing/layer0/capacity@1/vae"] == pytest.approx(0.5)
    assert out["routing/layer1/capacity@1/vae"] == pytest.approx(2 / 12)
    assert out["routing/capacity@1/vae"] == pytest.approx((0.5 + 2 / 12) / 2)
    assert out["routing/layer1/maxvio/vae"] == pytest.approx(5.0)
    random = rm.random_capacity_rate(600, 2, 12, 1.25)
    assert out["routing/capacity@1.25/vae/random"] == pytest.approx(random)
    assert not any(name.endswith("/vit") or name.endswith("/prompt") for name in out)
    assert all(math.isfinite(value) for value in out.values())


def test_capacity_and_its_baseline_are_means_over_the_micro_batches_with_tokens() -> None:
    visible = torch.ones(len(KINDS), 4, dtype=torch.bool)

    def micro_batch(text: list[float], vae: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
        counts = torch.zeros(1, len(KINDS), 4)
        counts[0, 0], counts[0, 3] = torch.tensor(text), torch.tensor(vae)
        return counts, counts[0].sum(-1) / 2

    batches = [
        micro_batch([8.0, 8.0, 0.0, 0.0], [0.0] * 4),  # text .5, on other experts each time: even over the window
        micro_batch([0.0, 0.0, 20.0, 20.0], [3.0, 3.0, 3.0, 3.0]),
        micro_batch([0.0] * 4, [12.0, 12.0, 0.0, 0.0]),
    ]
    out = rm.summarise(window(batches, visible, (1.0,)), visible, (1.0,))
    assert out["routing/capacity@1/text"] == pytest.approx(0.5)
    assert out["routing/utilisation/text"] > 0.8  # of the window
    assert out["routing/capacity@1/vae"] == pytest.approx((1.0 + 0.5) / 2)
    text = [rm.random_capacity_rate(n, 2, 4) for n in (8, 20)]
    pooled = [rm.random_capacity_rate(n, 2, 4) for n in (8, 26, 12)]
    assert out["routing/capacity@1/text/random"] == pytest.approx(sum(text) / 2, abs=1e-15)
    assert out["routing/capacity@1/all/random"] == pytest.approx(sum(pooled) / 3, abs=1e-15)
    assert len({round(rate, 6) for rate in pooled}) == 3  # it does depend on the number of tokens


def test_baseline_is_left_out_where_kinds_see_different_experts() -> None:
    counts, tokens, visible = planted()
    visible[:3, 6:] = False
    visible[3, :6] = False
    alone = counts.clone(), tokens.clone()
    alone[0][:, 3], alone[1][3] = 0.0, 0.0  # text alone sees the same experts; one micro-batch does not make a baseline
    out = rm.summarise(window([(counts, tokens), alone], visible), visible)
    assert out["routing/capacity@1/text"] == pytest.approx(1.0)
    assert "routing/capacity@1/und/random" in out
    assert "routing/capacity@1/all" in out
    assert "routing/capacity@1/all/random" not in out


def test_a_model_without_experts_has_no_routing_metrics() -> None:
    none, visible = torch.zeros(0, len(KINDS), 0), torch.zeros(len(KINDS), 0, dtype=torch.bool)
    assert rm.summarise(window([(none, torch.ones(len(KINDS)))], visible), visible) == {}


def test_drift_by_hand() -> None:
    """One layer that swaps two experts for half of its tokens, one that goes from sure to even."""
    before = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [1.0, 0.0]]])
    now = torch.tensor([[[0.0, 1.0], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]]])
    middle = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert rm.drift(now, before).tolist() == pytest.approx([0.5, middle - 0.5])
    assert rm.drift(now, now).tolist() == [0.0, 0.0]
    assert rm.by_layer("drift/text", torch.tensor([0.5, 0.25])) == {
        "routing/drift/text": 0.375, "routing/layer0/drift/text": 0.5, "routing/layer1/drift/text": 0.25
    }  # fmt: skip


def test_miscount_names_layer_and_kind() -> None:
    counts, tokens, _ = planted()
    assert rm.miscount(counts, tokens, top_k=2) is None
    counts[1, 3, 0] += 1
    message = rm.miscount(counts, tokens, top_k=2)
    assert message is not None
    assert "layer 1" in message
    assert "vae" in message

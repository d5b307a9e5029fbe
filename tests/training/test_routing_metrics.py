"""Routing metrics against closed forms, a token-by-token simulation and random routing."""

from __future__ import annotations

import math

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


def planted(num_layers: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """12 experts, all visible: text on experts 0-5 and latents on 6-11, each evenly."""
    counts = torch.zeros(num_layers, len(KINDS), 12)
    counts[:, 0, :6] = 20.0
    counts[:, 3, 6:] = 20.0
    return counts, torch.tensor([60.0, 0.0, 0.0, 60.0]), torch.ones(len(KINDS), 12, dtype=torch.bool)


def test_kinds_show_what_the_pooled_number_hides() -> None:
    out = rm.summarise(*planted(), top_k=2)
    assert out["routing/capacity@1/all"].item() == pytest.approx(1.0)
    assert out["routing/capacity@1/text"].item() == pytest.approx(0.5)
    assert out["routing/capacity@1/vae"].item() == pytest.approx(0.5)
    assert out["routing/overlap/text-vae"].item() == pytest.approx(0.0)


def test_summary_names_layers_and_baselines() -> None:
    counts, tokens, visible = planted()
    counts[1, 3] = 0.0
    counts[1, 3, :2] = 60.0  # layer 1 collapses for latents
    out = rm.summarise(counts, tokens, visible, top_k=2, factors=(1.0, 1.25))
    assert out["routing/layer0/capacity@1/vae"].item() == pytest.approx(0.5)
    assert out["routing/layer1/capacity@1/vae"].item() == pytest.approx(2 / 12)
    assert out["routing/capacity@1/vae"].item() == pytest.approx((0.5 + 2 / 12) / 2)
    assert out["routing/layer1/maxvio/vae"].item() == pytest.approx(5.0)
    random = rm.random_capacity_rate(60, 2, 12, 1.25)
    assert out["routing/capacity@1.25/vae/random"].item() == pytest.approx(random)
    assert not any(name.endswith("/vit") or name.endswith("/prompt") for name in out)
    assert all(torch.isfinite(value) for value in out.values())


def test_baseline_is_left_out_where_kinds_see_different_experts() -> None:
    counts, tokens, visible = planted()
    visible[:3, 6:] = False
    visible[3, :6] = False
    out = rm.summarise(counts, tokens, visible, top_k=2)
    assert out["routing/capacity@1/text"].item() == pytest.approx(1.0)
    assert "routing/capacity@1/und/random" in out
    assert "routing/capacity@1/all/random" not in out


def test_a_model_without_experts_has_no_routing_metrics() -> None:
    assert rm.summarise(torch.zeros(0, 4, 0), torch.ones(4), torch.zeros(4, 0, dtype=torch.bool), top_k=2) == {}


def test_miscount_names_layer_and_kind() -> None:
    counts, tokens, _ = planted()
    assert rm.miscount(counts, tokens, top_k=2) is None
    counts[1, 3, 0] += 1
    message = rm.miscount(counts, tokens, top_k=2)
    assert message is not None
    assert "layer 1" in message
    assert "vae" in message

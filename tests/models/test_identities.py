"""What must hold (systems.md section 7, (a) to (i) where they concern the model)."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from factory import SYSTEMS, build, level, load_system, random_batch, tiny_model
from symbiotic.layout import router_of
from symbiotic.models.balance import balance_loss
from symbiotic.models.batch import VAE, Batch
from symbiotic.models.fused import combine, swiglu
from symbiotic.models.moe import Experts, SharedExpert
from symbiotic.models.places import Places, product
from symbiotic.models.routing import RoutingStats, route
from symbiotic.models.unified import Output, UnifiedModel
from symbiotic.objectives.flow import flow_loss, noised
from symbiotic.schema import KINDS, Router, Shield, System

PARTITIONED = ("symbiotic", "mot", "bagel", "tripartite")


def generation_gradients(model: UnifiedModel, batch: Batch, shield: float) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    out = model(noised(batch), shield=level(shield))
    flow_loss(out.prediction, batch, "x").backward()
    return {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}


def shared_norms(gradients: dict[str, torch.Tensor], layers: int) -> list[float]:
    return [
        sum(float(g.norm()) for n, g in gradients.items() if n.startswith(f"blocks.{i}.moe.shared."))
        for i in range(layers)
    ]


def symbiotic(mode: str) -> UnifiedModel:
    model = tiny_model()
    system = dataclasses.replace(load_system("symbiotic", model), shield=Shield(mode, {"shared": ("vae",)}))  # type: ignore[arg-type]
    return UnifiedModel(model, system).initialise(0)


# ------------------------------------------------------------------ (d) shielding


def test_shielded_generation_gradient_is_zero_in_the_last_layer_and_leaks_below() -> None:
    norms = shared_norms(generation_gradients(symbiotic("output"), random_batch(), 1.0), 3)
    assert norms[-1] == 0.0
    assert norms[0] > 0.0  # through attention to the prompt: token-level shielding is not loss-level isolation


def test_without_text_nothing_leaks() -> None:
    norms = shared_norms(generation_gradients(symbiotic("output"), random_batch(4, ("latents",)), 1.0), 3)
    assert norms == [0.0, 0.0, 0.0]


def test_strict_shield_leaks_nothing_in_any_layer() -> None:
    gradients = generation_gradients(symbiotic("strict"), random_batch(), 1.0)
    assert shared_norms(gradients, 3) == [0.0, 0.0, 0.0]
    assert float(gradients["latent_head.weight"].norm()) > 0


def test_weights_mode_blocks_the_weights_but_not_the_path() -> None:
    """Only the shared weights of the shielded tokens get nothing; what lies below still learns through the output."""
    batch = random_batch(4, ("latents",))
    blocked, free = symbiotic("weights"), symbiotic("output")
    by_weights = generation_gradients(blocked, batch, 1.0)
    assert shared_norms(by_weights, 3) == [0.0, 0.0, 0.0]
    by_output = generation_gradients(free, batch, 1.0)
    assert not torch.equal(by_weights["latent_in.weight"], by_output["latent_in.weight"])


@pytest.mark.parametrize("mode", ["output", "weights", "strict"])
def test_shielding_leaves_the_forward_as_it_is(mode: str) -> None:
    model, batch = symbiotic(mode), noised(random_batch())
    free, shielded = model(batch, shield=level(0.0)), model(batch, shield=level(1.0))
    assert torch.equal(free.logits, shielded.logits)
    assert torch.equal(free.prediction, shielded.prediction)
    with torch.no_grad():
        torch.testing.assert_close(model(batch).prediction, free.prediction, rtol=0, atol=1e-6)


def test_the_level_scales_the_gradient_through_shared_outputs() -> None:
    """One layer, latents only: the gradient of the shared weights at level 0.9 is a tenth of the free one."""
    model = tiny_model(num_layers=1)
    net = UnifiedModel(model, load_system("symbiotic", model)).initialise(0)
    batch = random_batch(4, ("latents",))
    free = generation_gradients(net, batch, 0.0)["blocks.0.moe.shared.all.w_in"]
    scaled = generation_gradients(net, batch, 0.9)["blocks.0.moe.shared.all.w_in"]
    torch.testing.assert_close(scaled, 0.1 * free, rtol=1e-4, atol=1e-9)


def test_understanding_gradient_passes_the_shield() -> None:
    model, batch = symbiotic("output"), random_batch(6, ("lm", "mmu"))
    grads = []
    for value in (0.0, 1.0):
        model.zero_grad()
        model(batch, shield=level(value)).logits.logsumexp(-1).sum().backward()
        grads.append(model.blocks[0].moe.shared["all"].w_in.grad.clone())  # type: ignore[union-attr,index]
    assert torch.equal(grads[0], grads[1])
    assert float(grads[0].norm()) > 0


def test_a_routed_pool_can_be_shielded() -> None:
    model = tiny_model()
    system = load_system("standard_separable", model)
    system = dataclasses.replace(system, shield=Shield("output", {"pools.und": ("vae",)}))
    net, batch = UnifiedModel(model, system).initialise(0), random_batch(4, ("latents",))
    gradients = generation_gradients(net, batch, 1.0)
    assert all(float(gradients[f"blocks.{i}.moe.pools.und.w_in"].norm()) == 0 for i in range(3))
    assert all(float(gradients[f"blocks.{i}.moe.pools.gen.w_in"].norm()) > 0 for i in range(3))


# ------------------------------------------------------------------ (f) (i) balance and routing


def stats_of(counts: torch.Tensor, probs: torch.Tensor, tokens: torch.Tensor) -> RoutingStats:
    return RoutingStats(counts[None], probs[None], tokens)


def test_balance_loss_is_one_at_balance_and_n_over_k_at_collapse() -> None:
    one_router, visible = torch.ones(1, 4), torch.ones(4, 8, dtype=torch.bool)
    tokens, k = torch.tensor([16.0, 0.0, 16.0, 16.0]), 2
    even = tokens[:, None].expand(4, 8)
    assert float(balance_loss(stats_of(even * k / 8, even / 8, tokens), one_router, visible)) == pytest.approx(1.0)
    counts = torch.zeros(4, 8)
    counts[:, :2] = tokens[:, None]
    assert float(balance_loss(stats_of(counts, counts / 2, tokens), one_router, visible)) == pytest.approx(8 / 2)


def test_balance_loss_leaves_out_routers_without_tokens() -> None:
    routers = torch.tensor([[1.0, 1, 1, 0], [0, 0, 0, 1.0]])
    visible = torch.zeros(4, 8, dtype=torch.bool)
    visible[:3, :4], visible[3, 4:] = True, True
    tokens = torch.tensor([10.0, 0.0, 0.0, 0.0])
    counts = visible * tokens[:, None] * 2 / 4
    assert float(balance_loss(stats_of(counts, counts / 2, tokens), routers, visible)) == pytest.approx(1.0)


@torch.no_grad()
def test_top_k_of_all_experts_with_equal_logits_is_their_mean() -> None:
    net = build("standard_moe", router=Router(top_k=8))
    moe, batch = net.blocks[0].moe, random_batch()
    torch.nn.init.zeros_(moe.routers["all"])  # type: ignore[union-attr,index,arg-type]
    x = torch.randn(batch.kind.numel(), 32)
    y, _ = moe.routed(x, Places(batch, None))  # type: ignore[union-attr,operator]
    pool: Experts = moe.pools["all"]  # type: ignore[union-attr,index,assignment]
    mean = torch.stack([swiglu(x @ w) @ v for w, v in zip(pool.w_in, pool.w_out, strict=True)]).mean(0)
    valid = batch.segment.reshape(-1) >= 0
    torch.testing.assert_close(y[valid], mean[valid], rtol=1e-4, atol=1e-6)
    assert float(y[~valid].abs().sum()) == 0.0  # padding is not computed


def test_gates_follow_the_formula_on_the_visible_columns() -> None:
    logits, visible = torch.randn(50, 8), torch.rand(50, 8) > 0.4
    visible[:, :3] = True
    gates, columns, probs = route(logits, visible, Router(top_k=2))
    for n in range(50):
        p = torch.softmax(logits[n, visible[n]], 0)
        top = p.topk(2)
        torch.testing.assert_close(gates[n], top.values / top.values.sum())
        assert visible[n].nonzero().squeeze(-1)[top.indices].tolist() == columns[n].tolist()
    assert float(probs[~visible].sum()) == 0.0
    raw, _, _ = route(logits, visible, Router(top_k=2, normalize=False, scale=2.0))
    torch.testing.assert_close(raw, 2 * probs.gather(1, columns))
    sigmoid, chosen, _ = route(logits, None, Router(top_k=3, normalize=False, score="sigmoid"))
    torch.testing.assert_close(sigmoid, logits.sigmoid().gather(1, chosen))


# ------------------------------------------------------------------ (g) layouts that must agree


def same_output(a: Output, b: Output) -> None:
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.prediction, b.prediction)


def test_pools_open_to_all_equal_standard_moe_bit_for_bit() -> None:
    net = build("standard_moe")
    model = net.cfg
    both = ("first", "second")
    layout = System(
        "open",
        pools={"first": 0.25, "second": 0.75},
        visible=dict.fromkeys(KINDS, both),
        shared={"all": KINDS},
    )
    split = UnifiedModel(model, layout)
    state = {}
    for name, value in net.state_dict().items():
        if ".pools.all." in name:
            state[name.replace(".all.", ".first.")], state[name.replace(".all.", ".second.")] = value[:2], value[2:]
        elif ".routers.all" in name:
            state[name.replace(".all", ".first")] = value[:, :2]
            state[name.replace(".all", ".second")] = value[:, 2:]
        else:
            state[name] = value
    split.load_state_dict(state)
    batch = noised(random_batch())
    same_output(net(batch), split(batch))
    assert torch.equal(net(batch).routing.counts, split(batch).routing.counts)


def test_tied_copies_of_bagel_and_mot_equal_one_stream() -> None:
    """(g): two copies of the same attention, norms and shared expert compute what one does."""
    net = build("symbiotic")
    batch = noised(random_batch())
    for name in ("mot", "bagel"):
        twin = UnifiedModel(net.cfg, load_system(name, net.cfg))
        own = net.state_dict()
        tied = {
            n: own[n] if n in own else own[".".join("all" if p in ("und", "gen") else p for p in n.split("."))]
            for n in twin.state_dict()
        }
        twin.load_state_dict(tied)
        for a, b in zip(
            (net(batch).logits, net(batch).prediction), (twin(batch).logits, twin(batch).prediction), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ (h) visibility


@pytest.mark.parametrize("name", PARTITIONED)
def test_no_token_enters_an_expert_of_the_other_side(name: str) -> None:
    net = build(name)
    counts = net(noised(random_batch())).routing.counts
    generation = net.visible_experts[VAE]
    assert float(counts[:, VAE, ~generation].sum()) == 0
    assert float(counts[:, :VAE, generation].sum()) == 0
    assert float(counts.sum()) > 0


@pytest.mark.parametrize("name", SYSTEMS)
def test_counts_are_k_per_token_and_probabilities_one(name: str) -> None:
    net, batch = build(name), random_batch()
    stats = net(noised(batch)).routing
    tokens = torch.stack([((batch.kind == m) & (batch.segment >= 0)).sum() for m in range(4)]).float()
    assert torch.equal(stats.tokens, tokens)
    if name == "dense":
        assert stats.counts.numel() == 0
        return
    assert torch.equal(stats.counts.sum(-1), (router_of(net.cfg, net.system).top_k * tokens).expand(3, 4))
    torch.testing.assert_close(stats.probs.sum(-1), tokens.expand(3, 4), rtol=1e-5, atol=1e-4)


# ------------------------------------------------------------------ grouped_mm and its reference


def test_grouped_product_equals_the_loop_forward_and_backward() -> None:
    pool = Experts(5, 16, 12)
    for p in pool.parameters():
        torch.nn.init.normal_(p, std=0.3)
    sizes = [7, 0, 3, 11, 1]
    x = torch.randn(sum(sizes), 16, requires_grad=True)
    pool(x, torch.tensor(sizes).cumsum(0).int()).square().sum().backward()
    got = [x.grad.clone(), *(p.grad.clone() for p in pool.parameters())]  # type: ignore[union-attr]
    x.grad = None
    pool.zero_grad()
    loop = [swiglu(part @ pool.w_in[e]) @ pool.w_out[e] for e, part in enumerate(x.split(sizes))]
    torch.cat(loop).square().sum().backward()
    for a, b in zip(got, [x.grad, *(p.grad for p in pool.parameters())], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_an_empty_pool_keeps_its_parameters_in_the_graph() -> None:
    pool = Experts(3, 8, 4)
    for p in pool.parameters():
        torch.nn.init.normal_(p)
    y = pool(torch.zeros(0, 8), torch.zeros(3, dtype=torch.int32))
    y.sum().backward()
    assert y.shape == (0, 8)
    assert all(p.grad is not None and float(p.grad.abs().sum()) == 0 for p in pool.parameters())


def test_gated_shared_expert() -> None:
    expert = SharedExpert(8, 6, gated=True)
    for p in expert.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(5, 8)
    gate, up = (x @ expert.w_in).chunk(2, -1)
    want = ((F.silu(gate) * up) @ expert.w_out) * torch.sigmoid(x @ expert.gate)  # type: ignore[operator]
    torch.testing.assert_close(expert(x), want)


# ------------------------------------------------------------------ partial levels, mixed precision


def prompt_gradient(mode: str, value: float) -> torch.Tensor:
    """Generation gradient of the prompt's experts in the first of two layers, which latents reach by attention only.

    No component is a target, so that nothing but the strict attention scales anything.
    """
    model = tiny_model(num_layers=2)
    system = dataclasses.replace(load_system("symbiotic", model), shield=Shield(mode, {}))  # type: ignore[arg-type]
    net = UnifiedModel(model, system).initialise(0)
    return generation_gradients(net, random_batch(6, ("t2i",)), value)["blocks.0.moe.pools.und.w_out"]


def test_strict_scales_what_latents_read_from_the_prompt_by_the_level() -> None:
    free = prompt_gradient("strict", 0.0)
    assert float(free.norm()) > 0
    torch.testing.assert_close(prompt_gradient("strict", 0.9), 0.1 * free, rtol=1e-3, atol=1e-8)
    assert float(prompt_gradient("strict", 1.0).norm()) == 0.0
    assert float(prompt_gradient("output", 1.0).norm()) > 0


def test_weights_mode_scales_the_weights_by_the_level() -> None:
    batch, model = random_batch(4, ("latents",)), tiny_model(num_layers=1)
    system = dataclasses.replace(load_system("symbiotic", model), shield=Shield("weights", {"shared": ("vae",)}))
    net = UnifiedModel(model, system).initialise(0)
    free, scaled = (generation_gradients(net, batch, value) for value in (0.0, 0.9))
    name = "blocks.0.moe.shared.all.w_out"
    torch.testing.assert_close(scaled[name], 0.1 * free[name], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(scaled["latent_in.weight"], free["latent_in.weight"], rtol=1e-4, atol=1e-8)


def test_balance_loss_is_the_mean_over_layers_and_routers() -> None:
    """Router one is balanced (1) in both layers; router two collapsed (n/k = 4) in one layer, balanced in the other."""
    routers = torch.tensor([[1.0, 1, 1, 0], [0, 0, 0, 1.0]])
    tokens, k, visible = torch.tensor([8.0, 0.0, 8.0, 16.0]), 1, torch.zeros(4, 8, dtype=torch.bool)
    visible[:3, :4], visible[3, 4:] = True, True
    even = visible * tokens[:, None] * k / 4
    collapsed = even.clone()
    collapsed[3, 4:] = torch.tensor([16.0, 0, 0, 0])
    counts = torch.stack([even, collapsed])
    loss = balance_loss(RoutingStats(counts, counts / k, tokens), routers, visible)
    assert float(loss) == pytest.approx((1 + 1 + 1 + 4) / 4)


@pytest.mark.filterwarnings("ignore:.*Cannot dispatch to fused implementation")
@pytest.mark.parametrize("name", SYSTEMS)
def test_under_autocast_every_system_trains_and_counts_stay_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, batch, combined = build(name), random_batch(200), []

    def watched(y_AD: Tensor, *more: Tensor) -> Tensor:
        combined.append(y_AD.dtype)
        return combine(y_AD, *more)

    monkeypatch.setattr("symbiotic.models.moe.combine", watched)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(noised(batch))
        balance = balance_loss(out.routing, net.routers_RM, net.visible_experts)
        task = 0.0 if out.task is None else out.task
        (out.logits.float().logsumexp(-1).sum() + out.prediction.float().square().sum() + balance + task).backward()
    assert out.routing.tokens.max() > 512  # beyond what bfloat16 can count
    assigned = router_of(net.cfg, net.system).top_k * out.routing.tokens
    assert torch.equal(out.routing.counts.sum(-1), assigned.expand(len(out.routing.counts), 4))
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())
    assert set(combined) <= {torch.bfloat16}  # what experts gave is kept for the way back: not in float32


@pytest.mark.parametrize("scaled", [False, True])
def test_under_autocast_experts_are_computed_like_a_matrix_product(scaled: bool) -> None:
    x, w = torch.randn(10, 16, generator=torch.Generator().manual_seed(0)), torch.randn(2, 16, 8)
    ends = torch.tensor([4, 10], dtype=torch.int32)
    for leaf in (x, w):
        leaf.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = product(x, w, torch.ones(10, 1) if scaled else None, ends)
        by_hand = torch.cat([x[:4] @ w[0], x[4:] @ w[1]])
    assert y.dtype == by_hand.dtype == torch.bfloat16
    torch.testing.assert_close(y, by_hand)
    found = torch.autograd.grad(y.float().square().sum(), (x, w))
    torch.testing.assert_close(found, torch.autograd.grad(by_hand.float().square().sum(), (x, w)), rtol=2e-2, atol=0.5)
    assert {g.dtype for g in found} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the kernel wants rows of a multiple of 16 bytes
        assert product(x[:, :12], w[:, :12], None, ends).dtype == torch.float32


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_can_be_laid_out_without_memory(name: str) -> None:
    """On the meta device, as a sharded run builds its model before the weights are loaded."""
    model = tiny_model()
    with torch.device("meta"):
        net = UnifiedModel(model, load_system(name, model))
    assert all(p.is_meta for p in net.parameters())
    assert torch.equal(net.visible_experts, build(name).visible_experts)

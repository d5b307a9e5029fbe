"""Low-rank updates: nothing at the start, the formula afterwards, expert by expert where weights are stacked."""

from __future__ import annotations

import pytest
import torch

from factory import build, load_system, random_batch, tiny_model
from symbiotic.layout import lora_place, parameter_names
from symbiotic.models.lora import LowRank, is_lora, merge
from symbiotic.models.unified import UnifiedModel
from symbiotic.objectives.flow import noised
from symbiotic.schema import Lora, Shield

TARGETS = (r"\.attention\.\w+\.[qkvo]\.weight$", r"\.moe\.(pools|shared)\.\w+\.w_(in|out)$")
R4 = Lora(rank=4, alpha=8.0, targets=TARGETS)


def trained(model: UnifiedModel, lora: Lora = R4) -> UnifiedModel:
    """With updates that are not zero any more."""
    model.adapt(lora, seed=0)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if is_lora(name) and name.endswith(".b"):
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("system", ["utamoe", "bagel", "standard_moe", "dense"])
def test_fresh_updates_leave_every_output_as_it_is_bit_for_bit(system: str) -> None:
    plain, adapted, batch = build(system), build(system).adapt(R4, seed=0), noised(random_batch())
    a, b = plain(batch), adapted(batch)
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.prediction, b.prediction)
    assert torch.equal(a.routing.probs, b.routing.probs)
    b.logits.square().sum().backward()
    grads = {n: p.grad for n, p in adapted.named_parameters() if is_lora(n)}
    assert grads
    assert all(g is not None for g in grads.values())
    assert any(bool(g.any()) for n, g in grads.items() if n.endswith(".b") and g is not None)


def test_updates_are_drawn_from_seed_and_name() -> None:
    one, again, other = (build("utamoe").adapt(R4, seed=s).state_dict() for s in (0, 0, 1))
    a = "blocks.0.moe.pools.gen.lora.w_in.a"
    assert torch.equal(one[a], again[a])
    assert not torch.equal(one[a], other[a])
    assert not torch.equal(one[a], one["blocks.1.moe.pools.gen.lora.w_in.a"])
    assert not one[a.replace(".a", ".b")].any()


def test_names_are_known_without_building() -> None:
    model = tiny_model()
    system = load_system("bagel", model)
    net = UnifiedModel(model, system).adapt(R4, seed=0)
    targeted = [
        n for n in parameter_names(model, system) if n.endswith(("q.weight", "k.weight", "v.weight", "o.weight"))
    ]
    targeted += [n for n in parameter_names(model, system) if n.endswith((".w_in", ".w_out")) and ".moe." in n]
    expected = {"{}.lora.{}.{}".format(*lora_place(name), side) for name in targeted for side in "ab"}
    assert {name for name, _ in net.named_parameters() if is_lora(name)} == expected


@pytest.mark.parametrize("ends", [[3, 3, 7], [0, 0, 7], [7, 7, 7]])
def test_a_stacked_update_is_a_loop_over_experts(ends: list[int]) -> None:
    """Experts without a token included; values and gradients."""
    generator = torch.Generator().manual_seed(0)
    update = LowRank((3, 16, 24), R4)
    for parameter in update.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(7, 16, generator=generator)
    y = update(x, None, torch.tensor(ends, dtype=torch.int32))
    parts = [x[a:b] @ update.a[e] @ update.b[e] * 2.0 for e, (a, b) in enumerate(zip([0, *ends], ends, strict=False))]
    torch.testing.assert_close(y, torch.cat(parts), rtol=1e-4, atol=1e-4)
    grouped = torch.autograd.grad(y.square().sum(), list(update.parameters()))
    looped = torch.autograd.grad(torch.cat(parts).square().sum(), list(update.parameters()))
    for a, b in zip(grouped, looped, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("system", ["utamoe", "mot", "standard_separable"])
def test_merged_weights_compute_what_weights_and_updates_do(system: str) -> None:
    net, batch = trained(build(system)), noised(random_batch())
    plain = UnifiedModel(net.cfg, net.system)
    plain.load_state_dict(merge(net.state_dict(), R4))
    with torch.no_grad():
        a, b, before = net(batch), plain(batch), build(system)(batch)
    torch.testing.assert_close(a.logits, b.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.prediction, b.prediction, rtol=1e-5, atol=1e-5)
    assert torch.equal(a.routing.counts, b.routing.counts)
    assert float((a.logits - before.logits).abs().max()) > 1e-2  # the updates do something


def test_the_update_of_a_linear_layer_by_its_formula() -> None:
    net = trained(build("utamoe"))
    projections = net.blocks[0].attention["all"]  # type: ignore[index]
    x = torch.randn(5, 32)
    update = projections.lora["q"]
    y = torch.nn.functional.rms_norm(x, (32,), projections.norm.weight, 1e-6)
    expected = y @ projections.q.weight.T + 8.0 / 4 * (y @ update.a) @ update.b
    torch.testing.assert_close(projections.updated("q", projections.q(y), y), expected)


def test_a_shielded_shared_expert_keeps_the_generation_gradient_off_its_update() -> None:
    model = tiny_model(num_layers=1)
    for mode in ("output", "weights"):
        system = load_system("symbiotic", model, shield={"mode": mode, "targets": {"shared": ["vae"]}})
        assert isinstance(system.shield, Shield)
        net = trained(UnifiedModel(model, system).initialise(0))
        batch = noised(random_batch(4, ("latents",)))
        net(batch, shield=torch.tensor(1.0)).prediction.square().sum().backward()
        names = [name for name, _ in net.named_parameters() if ".shared.all.lora." in name]
        assert len(names) == 4
        assert all(not net.get_parameter(name).grad.any() for name in names)  # type: ignore[union-attr]

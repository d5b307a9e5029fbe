"""The shield in every mode, scope and target: what the generation gradient reaches, and what stays as it is."""

from __future__ import annotations

import pytest
import torch

from factory import random_batch
from shields import (
    GENERATION,
    UNDERSTANDING,
    WHOLE,
    Gradients,
    by_layer,
    close,
    collected,
    edits,
    forward,
    gradients,
    joined,
    latents_only,
    same_bits,
    shielded,
    weighed,
    with_norms,
)
from symbiotic.models.attention import rope_angles
from symbiotic.models.moe import MoE
from symbiotic.models.places import Places, product

MODES = ("output", "weights", "strict")
SCOPES = (("vae",), ("vae", "vit"))
TARGETS = (("symbiotic", "shared"), ("standard_separable", "shared"), ("standard_separable", "pools.und"))
modes = pytest.mark.parametrize("mode", MODES)
scopes = pytest.mark.parametrize("kinds", SCOPES, ids="+".join)
targets = pytest.mark.parametrize(("system", "target"), TARGETS)
last = "blocks.2.moe."


def of(found: Gradients, prefix: str) -> Gradients:
    part = {name: value for name, value in found.items() if name.startswith(prefix)}
    assert part
    return part


# ------------------------------------------------------------------ where nothing, and where something, arrives


@targets
@scopes
@modes
def test_the_last_layer_gets_exactly_nothing_and_lower_ones_what_leaks(
    mode: str, kinds: tuple[str, ...], system: str, target: str
) -> None:
    """The leak goes through attention to the prompt; `strict` closes it (ours)."""
    reached = by_layer(gradients(shielded(system, mode, target, kinds), random_batch(6, ("t2i", "mmu"))), target)
    assert reached[-1] == 0.0
    assert all(value == 0.0 for value in reached) if mode == "strict" else all(value > 0.0 for value in reached[:-1])


@targets
@scopes
def test_without_a_shield_every_layer_is_reached(kinds: tuple[str, ...], system: str, target: str) -> None:
    for batch in (random_batch(6, ("t2i", "mmu")), latents_only()):
        unshielded = gradients(shielded(system, "none", target, kinds), batch)
        assert min(by_layer(unshielded, target)) > 0.0
        same_bits(unshielded, gradients(shielded(system, "none", target, kinds), batch, None))
        same_bits(unshielded, gradients(shielded(system, "output", target, kinds), batch, None))


@targets
@scopes
@modes
def test_sequences_of_latents_leak_nothing(mode: str, kinds: tuple[str, ...], system: str, target: str) -> None:
    model = shielded(system, mode, target, kinds)
    found = gradients(model, latents_only())
    assert by_layer(found, target) == [0.0, 0.0, 0.0]
    assert float(found["latent_in.weight"].abs().max()) > 0.0


@modes
def test_scope_says_whether_what_latents_read_is_shielded_too(mode: str) -> None:
    """An image is read and one generated, no word: the only way down is through the read image's tokens."""
    narrow, wide = (by_layer(gradients(shielded(mode=mode, kinds=kinds), edits())) for kinds in SCOPES)
    assert wide == [0.0, 0.0, 0.0]
    assert narrow == [0.0, 0.0, 0.0] if mode == "strict" else min(narrow[:-1]) > 0.0


@modes
def test_only_the_target_is_shielded(mode: str) -> None:
    """`pools.und` is closed to the latents that choose it; `pools.gen` and the shared expert are not."""
    found = gradients(shielded("standard_separable", mode, "pools.und"), latents_only())
    assert by_layer(found, "pools.und") == [0.0, 0.0, 0.0]
    assert min(by_layer(found, "pools.gen")) > 0.0
    assert min(by_layer(found)) > 0.0
    assert min(float(found[f"blocks.{i}.moe.routers.und"].abs().max()) for i in range(3)) > 0.0


def test_what_lies_below_learns_through_the_weights_shield_of_a_pool_but_not_through_the_output_shield() -> None:
    batch = latents_only()
    free = gradients(shielded("standard_separable", "weights", "pools.und"), batch, 0.0)
    by_weights = gradients(shielded("standard_separable", "weights", "pools.und"), batch)
    by_output = gradients(shielded("standard_separable", "output", "pools.und"), batch)
    rest = [name for name in free if "pools.und" not in name]
    close({name: free[name] for name in rest}, {name: by_weights[name] for name in rest})
    assert not torch.allclose(free["latent_in.weight"], by_output["latent_in.weight"], rtol=1e-3)


# ------------------------------------------------------------------ the level


@targets
@modes
def test_half_a_level_is_half_the_gradient_of_the_last_layer(mode: str, system: str, target: str) -> None:
    """Linear in the level: in the last layer only shielded tokens give the target a generation gradient."""
    model, batch = shielded(system, mode, target), random_batch(6, ("t2i", "mmu"))
    free, half = (of(gradients(model, batch, value), f"{last}{target}.") for value in (0.0, 0.5))
    assert min(float(value.abs().max()) for value in free.values()) > 0.0
    same_bits({name: 0.5 * value for name, value in free.items()}, half)


@targets
@scopes
@modes
def test_the_forward_is_the_same_bit_for_bit(mode: str, kinds: tuple[str, ...], system: str, target: str) -> None:
    model, batch = shielded(system, mode, target, kinds), random_batch(9)
    free = forward(model, batch, None)
    for value in (0.0, 0.3, 1.0):
        out = forward(model, batch, value)
        assert torch.equal(out.logits, free.logits)
        assert torch.equal(out.prediction, free.prediction)
        assert torch.equal(out.routing.counts, free.routing.counts)
        assert torch.equal(out.routing.probs, free.routing.probs)


@targets
@modes
def test_level_zero_is_no_shield(mode: str, system: str, target: str) -> None:
    model, batch = shielded(system, mode, target), random_batch(9)
    close(gradients(model, batch, None, WHOLE), gradients(model, batch, 0.0, WHOLE))


@targets
@scopes
@modes
def test_nobody_on_the_host_reads_the_level(mode: str, kinds: tuple[str, ...], system: str, target: str) -> None:
    """On the meta device, where a value that is asked for raises: no branch on it, and nothing that waits for it."""
    block = shielded(system, mode, target, kinds).to("meta").blocks[0]
    batch, level = random_batch(6).to("meta"), torch.zeros((), device="meta")
    places, x_ND = Places(batch, level), torch.randn(batch.kind.numel(), 32, device="meta")
    _, normed_ND = block.before_moe(x_ND, places, rope_angles(batch.position.reshape(-1), 8, 1e4))  # type: ignore[operator]
    moe: MoE = block.moe  # type: ignore[assignment]
    assert moe.add_shared(x_ND, normed_ND, "all", places).shape == x_ND.shape
    scale = moe.gradient_scale("shared.all" if target == "shared" else target, torch.arange(5, device="meta"), places)
    assert scale is not None
    assert scale.shape == (5, 1)
    with pytest.raises(RuntimeError):  # the instrument
        float(level)


# ------------------------------------------------------------------ understanding


@targets
@modes
def test_the_understanding_gradient_passes(mode: str, system: str, target: str) -> None:
    """The CE of texts, answers and captions, bit for bit: no word attends to latents here."""
    model, batch = shielded(system, mode, target), random_batch(9)
    free = gradients(model, batch, None, UNDERSTANDING)
    assert min(by_layer(free, target)) > 0.0
    same_bits(free, gradients(model, batch, 1.0, UNDERSTANDING))


@modes
def test_read_images_in_the_scope_are_shielded_from_every_loss(mode: str) -> None:
    """With `vit` in the scope less of the answers' CE arrives; what words give stays: the shield stands per token.

    `strict` adds nothing to it: only latents read detached keys and values, and no answer depends on them.
    """
    model = shielded(mode=mode, kinds=("vae", "vit"))
    free, kept = (gradients(model, random_batch(6, ("mmu",)), value, UNDERSTANDING) for value in (None, 1.0))
    for layer in (0, 1):
        part = f"blocks.{layer}.moe.shared."
        assert not torch.allclose(of(free, part)[f"{part}all.w_in"], of(kept, part)[f"{part}all.w_in"], rtol=1e-2)
    same_bits(of(free, last), of(kept, last))  # the answer reads no image token after the last layer
    words = random_batch(6, ("lm", "t2i"))
    same_bits(gradients(model, words, None, UNDERSTANDING), gradients(model, words, 1.0, UNDERSTANDING))
    if mode == "strict":
        output = shielded(mode="output", kinds=("vae", "vit"))
        same_bits(gradients(output, random_batch(6, ("mmu",)), 1.0, UNDERSTANDING), kept)


# ------------------------------------------------------------------ accumulation, recomputation, mixed precision


@targets
@modes
def test_accumulated_micro_batches_give_the_gradient_of_one_batch(mode: str, system: str, target: str) -> None:
    model = shielded(system, mode, target)
    parts = [with_norms(random_batch(6, ("t2i", "mmu", "lm"), seed)) for seed in (0, 1)]
    for value in (1.0, 0.9):
        whole = gradients(model, joined(parts), value)
        model.zero_grad(set_to_none=True)
        for batch in parts:
            weighed(model, forward(model, batch, value), batch, GENERATION).backward()
        close(whole, collected(model))
        assert (by_layer(collected(model), target)[-1] == 0.0) == (value == 1.0)


@targets
@modes
def test_recomputed_activations_give_the_same_gradient_and_count_once(mode: str, system: str, target: str) -> None:
    model, batch = shielded(system, mode, target), random_batch(9)
    counts, passes = forward(model, batch).routing.counts, []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: passes.append(1))
    kept = [gradients(model, batch, value, weights) for value in (1.0, 0.9) for weights in (GENERATION, WHOLE)]
    before, model.recompute = len(passes), True
    again = [gradients(model, batch, value, weights) for value in (1.0, 0.9) for weights in (GENERATION, WHOLE)]
    assert len(passes) == before + 2 * before  # every block ran a second time
    for one, other in zip(kept, again, strict=True):
        same_bits(one, other)
    assert by_layer(again[0], target)[-1] == 0.0
    assert torch.equal(forward(model, batch).routing.counts, counts)


@pytest.mark.filterwarnings("ignore:.*Cannot dispatch to fused implementation")
@targets
@modes
def test_the_zeros_hold_in_mixed_precision(mode: str, system: str, target: str) -> None:
    model, batch = shielded(system, mode, target, gated_shared=True), random_batch(9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(model, batch)
        reached = by_layer(found, target)
        assert torch.equal(forward(model, batch).prediction, forward(model, batch, None).prediction)
    assert reached[-1] == 0.0
    assert mode != "strict" or max(reached) == 0.0
    assert all(value.dtype == torch.float32 for value in found.values())


# ------------------------------------------------------------------ the shielded product


def test_the_scaled_product_by_hand() -> None:
    """Rows for two experts, and a plain product: the weights get a tenth of what the first row gives them."""
    x = torch.arange(8.0).view(2, 4).requires_grad_()
    scale, grad = torch.tensor([[0.1], [1.0]]), torch.tensor([[1.0, 1.0, 0.0, 2.0], [5.0, 0.0, 1.0, 1.0]])
    w = torch.arange(16.0).view(4, 4).requires_grad_()
    product(x, w, scale).backward(grad)
    torch.testing.assert_close(w.grad, x.detach().T @ (scale * grad))
    torch.testing.assert_close(x.grad, grad @ w.detach().T)
    stacked = torch.arange(32.0).view(2, 4, 4).requires_grad_()
    x.grad = None
    product(x, stacked, scale, torch.tensor([1, 2], dtype=torch.int32)).backward(grad)
    torch.testing.assert_close(stacked.grad, torch.einsum("ed,ef->edf", x.detach(), scale * grad))
    torch.testing.assert_close(x.grad, torch.einsum("ef,edf->ed", grad, stacked.detach()))

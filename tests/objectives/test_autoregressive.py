"""Image codes: what stands where, what sees what, and the loss."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from factory import SYSTEMS, build, code_batch, level, samples
from symbiotic.data.errors import DataError
from symbiotic.data.packing import before_image, collate, with_codes
from symbiotic.layout import parameter_names
from symbiotic.models.batch import VAE
from symbiotic.models.unified import UnifiedModel
from symbiotic.objectives.autoregressive import START, image_ce, shifted
from symbiotic.objectives.total import loss_terms, model_input, task_terms, term_weights, training_terms
from symbiotic.schema import Objective

K = 11
OBJECTIVE = Objective(name="autoregressive", codebook_size=K, image_ce_weight=0.5)


def test_each_code_stands_behind_its_predecessor_and_images_do_not_touch() -> None:
    image = samples(1, ("t2i",))[0]
    batch = collate([with_codes(image, [3, 0, 5, 10, 1, 2]), with_codes(image, [7, 7, 7, 9, 9, 9])], 48)
    assert shifted(batch).codes.tolist() == [START, 4, 1, 6, 11, 2, START, 8, 8, 8, 10, 10]
    assert batch.codes.tolist() == [3, 0, 5, 10, 1, 2, 7, 7, 7, 9, 9, 9], "the targets stay"


def test_another_number_of_codes_than_of_patches_is_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"sample t2i-0: 5 codes for images of 6 patches"):
        with_codes(samples(1, ("t2i",))[0], [1] * 5)


def test_what_stands_before_an_image_is_the_sample_without_it() -> None:
    image = with_codes(samples(1, ("t2i",))[0], [1] * 6)
    head = before_image(image)
    assert len(head) == len(image) - 6
    assert VAE not in head.kind
    assert (len(head.codes), len(head.latent_grid), len(head.latents)) == (0, 0, 0)
    assert head.tokens.tolist() == image.tokens[:-6].tolist()


def test_the_loss_is_the_cross_entropy_by_its_definition() -> None:
    batch = code_batch(K)
    logits = torch.randn(len(batch.codes), K, generator=torch.Generator().manual_seed(0))
    by_hand = sum(-math.log(float(row.exp()[c] / row.exp().sum())) for row, c in zip(logits, batch.codes, strict=True))
    assert float(image_ce(logits, batch)) == pytest.approx(by_hand, rel=1e-5)
    assert float(image_ce(torch.zeros(len(batch.codes), K), batch)) == pytest.approx(len(batch.codes) * math.log(K))


def test_perplexity_under_teacher_forcing_is_that_of_the_training_loss() -> None:
    """One image a forward, code by code from the left, each by the logits of a forward that ends there."""
    net = build("symbiotic", codebook=K)
    image = with_codes(samples(3, ("t2i",))[2], [3, 0, 5, 10, 1, 2])
    whole = collate([image], len(image))
    trained = loss_terms(net, net(model_input(whole)), whole, OBJECTIVE)["image_ce"]
    nats = 0.0
    for n in range(1, 7):
        short = {name: getattr(image, name)[: len(image) - 6 + n] for name in ("tokens", "kind", "span", "target")}
        made = dataclasses.replace(
            image, **short, causal=image.causal[: len(image) - 6 + n], latents=image.latents[:n],
            latent_grid=image.latent_grid[:n], codes=image.codes[:n],
        )  # fmt: skip
        batch = collate([made], len(made))
        logits = net(model_input(batch)).prediction[-1]
        nats += float(F.cross_entropy(logits, torch.tensor(int(image.codes[n - 1]))).detach())
    assert math.exp(nats / 6) == pytest.approx(math.exp(float(trained.detach())), rel=1e-5)


@pytest.mark.parametrize("system", SYSTEMS)
def test_no_code_sees_a_later_one(system: str) -> None:
    net, batch = build(system, codebook=K), code_batch(K, count=3, tasks=("t2i",))
    before = net(model_input(batch)).prediction.detach()
    changed = batch.codes.clone()
    changed[3] = (changed[3] + 1) % K  # the fourth of six codes of the first image
    after = net(model_input(dataclasses.replace(batch, codes=changed))).prediction.detach()
    moved = ((before - after).abs() > 1e-5).any(1)  # below: sums over other neighbours are rounded otherwise
    assert not moved[:4].any(), "its own prediction and those before it do not move"
    assert bool(moved[4:6].all()), "those behind it do"
    assert not moved[6:].any(), "other images do not"


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_names_of_the_parameters_are_known_without_the_model(system: str) -> None:
    net = build(system, codebook=K)
    known = parameter_names(net.cfg, net.system, codebook=K)
    assert sorted(known) == sorted(name for name, _ in net.named_parameters())
    assert "latent_in.weight" in dict(net.named_parameters())
    assert not any(name.startswith("time_in") for name, _ in net.named_parameters())


def test_terms_and_weights_have_the_name_of_the_objective() -> None:
    net, batch = build("symbiotic", codebook=K), code_batch(K)
    _, terms = training_terms(net, batch, OBJECTIVE)
    assert list(terms) == ["ce", "image_ce", "balance", "z"]
    assert term_weights(OBJECTIVE)["image_ce"] == 0.5
    assert task_terms(OBJECTIVE) == {"understanding": "ce", "generation": "image_ce"}
    logits = net(shifted(batch)).prediction.detach()
    assert float(terms["image_ce"].detach()) == pytest.approx(float(image_ce(logits, batch) / batch.flow_norm))


def test_the_shield_holds_for_codes_as_for_patches() -> None:
    """Generation-only gradient: exactly 0 on the last layer's shared experts, some below; the forward is the same."""
    net, batch = build("symbiotic", codebook=K), code_batch(K)
    shielded, open_ = net(shifted(batch), shield=level(1.0)), net(shifted(batch), shield=level(0.0))
    assert torch.equal(shielded.prediction, open_.prediction)
    image_ce(shielded.prediction, batch).backward()
    norms = [float(block.moe.shared["all"].w_in.grad.norm()) for block in net.blocks]
    assert norms[-1] == 0.0
    assert norms[0] > 0.0


def test_understanding_only_batches_have_no_codes() -> None:
    net, batch = build("symbiotic", codebook=K), code_batch(K, tasks=("lm", "mmu"))
    _, terms = training_terms(net, batch, OBJECTIVE)
    assert float(terms["image_ce"].detach()) == 0.0
    terms["image_ce"].backward()
    assert float(net.latent_head.weight.grad.abs().max()) == 0.0, "the head stays in the graph"


def test_codes_cost_no_parameter_but_those_in_and_out() -> None:
    codes, patches = build("symbiotic", codebook=K), build("symbiotic")
    assert isinstance(codes, UnifiedModel)
    same = dict(patches.named_parameters())
    other = {name for name, p in codes.named_parameters() if name not in same or p.shape != same[name].shape}
    assert other == {"latent_in.weight", "latent_head.weight", "latent_head.bias"}

"""Sampling of image codes: with the cache as without it, by what probabilities, whatever the batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from factory import SYSTEMS, build, samples
from symbiotic.data.packing import Sample, before_image, collate, with_codes
from symbiotic.generation.codes import guided, likely, pick, sample_codes, start_draws
from symbiotic.models.batch import Batch
from symbiotic.models.cache import KVCache
from symbiotic.objectives.total import model_input
from symbiotic.schema import Sampler

K = 11


def images(count: int) -> list[Sample]:
    """Images of 6 codes behind captions of unequal lengths."""
    made = [with_codes(s, np.zeros(6)) for s in samples(count, ("t2i",))]
    cut = dict.fromkeys(("tokens", "kind", "span", "causal", "target"))
    return [dataclasses.replace(s, **{name: getattr(s, name)[i:] for name in cut}) for i, s in enumerate(made)]


def rows(chosen: list[Sample]) -> Batch:
    return collate(chosen, max(len(s) for s in chosen), rows=[[i] for i in range(len(chosen))])


def without_cache(net: torch.nn.Module, chosen: list[Sample], draws: Tensor, sampler: Sampler) -> Tensor:
    """The same sampling by forwards over whole sequences."""
    made = torch.zeros(len(chosen), 6, dtype=torch.long)
    for place in range(6):
        now = [
            with_codes(dataclasses.replace(s, latents=np.zeros((6, 0))), c) for s, c in zip(chosen, made, strict=True)
        ]
        logits = net(model_input(rows(now))).prediction.view(len(chosen), 6, K)[:, place]
        n = len(draws)
        made[:, place] = pick(likely(guided(logits, sampler.guidance), sampler), draws[:, place]).repeat(len(made) // n)
    return made[: len(draws)]


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sampling_with_the_cache_equals_sampling_without(system: str, guidance: float) -> None:
    net, sampler = build(system, codebook=K).eval(), Sampler(guidance=guidance)
    chosen = images(4 if guidance != 1 else 3)
    draws = start_draws(0, range(2 if guidance != 1 else 3), 6)
    grid = torch.from_numpy(chosen[0].latent_grid)
    with torch.no_grad():
        cached = sample_codes(net, rows([before_image(s) for s in chosen]), grid, draws, sampler)
        assert torch.equal(cached, without_cache(net, chosen, draws, sampler))
    assert len(cached.unique()) > 2, "not the same code everywhere"


def test_logits_with_the_cache_equal_those_of_one_forward() -> None:
    """Word by word as well: the cache is of any tokens."""
    net = build("bagel").eval()
    sample = samples(1, ("lm",))[0]
    whole = rows([sample])
    everywhere = torch.ones_like(whole.kind, dtype=torch.bool)
    with torch.no_grad():
        at_once, cache, found = net(whole, logits_at=everywhere).logits, KVCache(), []
        for first, after in ((0, 5), (5, 6), (6, len(sample))):
            part = {n: getattr(whole, n)[:, first:after] for n in ("tokens", "kind", "position", "segment", "span")}
            part |= {n: getattr(whole, n)[:, first:after] for n in ("causal", "target", "task")}
            step = dataclasses.replace(whole, **part)
            found.append(net(step, logits_at=everywhere[:, first:after], cache=cache).logits)
    torch.testing.assert_close(torch.cat(found), at_once, rtol=1e-5, atol=1e-6)


def test_an_image_depends_on_its_seed_and_number_alone() -> None:
    net, chosen = build("symbiotic", codebook=K).eval(), images(3)
    grid, sampler = torch.from_numpy(chosen[0].latent_grid), Sampler(guidance=1.0)
    heads = [before_image(s) for s in chosen]
    together = sample_codes(net, rows(heads), grid, start_draws(5, [0, 1, 2], 6), sampler)
    alone = sample_codes(net, rows(heads[1:2]), grid, start_draws(5, [1], 6), sampler)
    assert torch.equal(together[1:2], alone)
    other = sample_codes(net, rows(heads[1:2]), grid, start_draws(6, [1], 6), sampler)
    assert not torch.equal(other, alone)


def test_a_batch_of_another_number_of_prompts_is_refused() -> None:
    net, chosen = build("symbiotic", codebook=K), images(3)
    with pytest.raises(ValueError, match="2 images at guidance 2 need 4 prompts, not 3"):
        sample_codes(net, rows(chosen), torch.zeros(6, 2), start_draws(0, [0, 1], 6), Sampler())


LOGITS = torch.tensor([[2.0, 0.0, 1.0, -1.0]])


def test_probabilities_by_hand() -> None:
    plain = likely(LOGITS, Sampler())
    torch.testing.assert_close(plain, LOGITS.double().softmax(1))
    torch.testing.assert_close(likely(LOGITS, Sampler(temperature=0.5)), (LOGITS.double() * 2).softmax(1))
    assert likely(LOGITS, Sampler(temperature=0.0)).tolist() == [[1.0, 0.0, 0.0, 0.0]]
    two = likely(LOGITS, Sampler(top_k=2))
    torch.testing.assert_close(two[0, [0, 2]], torch.tensor([2.0, 1.0], dtype=torch.float64).softmax(0))
    assert two[0, [1, 3]].tolist() == [0.0, 0.0]
    first = float(plain[0, 0])  # .64
    assert likely(LOGITS, Sampler(top_p=first - 0.01)).tolist() == [[1.0, 0.0, 0.0, 0.0]]
    assert (likely(LOGITS, Sampler(top_p=first + 0.01)) > 0).tolist() == [[True, False, True, False]]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**20), st.integers(0, 4), st.floats(0.05, 1.0), st.floats(0.1, 3.0))
def test_what_is_picked_has_a_probability(seed: int, top_k: int, top_p: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    probs = likely(torch.randn(5, 4, generator=generator), Sampler(top_k=top_k, top_p=top_p, temperature=temperature))
    torch.testing.assert_close(probs.sum(1), torch.ones(5, dtype=torch.float64))
    if top_k:
        assert int((probs > 0).sum(1).max()) <= top_k
    draws = torch.rand(5, generator=generator, dtype=torch.float64)
    for draw in (draws, torch.zeros(5, dtype=torch.float64), torch.full((5,), 1 - 1e-16, dtype=torch.float64)):
        chosen = pick(probs, draw)
        assert bool((probs.gather(1, chosen[:, None]) > 0).all())


def test_draws_are_spent_as_probabilities_say() -> None:
    probs = torch.tensor([[0.2, 0.0, 0.5, 0.3]], dtype=torch.float64).expand(1000, 4)
    chosen = pick(probs, (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    assert torch.bincount(chosen, minlength=4).tolist() == [200, 0, 500, 300]

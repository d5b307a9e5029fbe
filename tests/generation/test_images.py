"""Image sampling: with an oracle in the model's place, the data come back."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor, nn

from factory import build
from symbiotic.data.packing import GenImage, Text, build_sample, collate
from symbiotic.generation.images import euler_times, sample_latents, start_noise, to_pixels
from symbiotic.models.batch import Batch
from symbiotic.models.cache import KVCache
from symbiotic.models.embeddings import patchify
from symbiotic.models.unified import Output
from symbiotic.schema import Sampler

LATENTS, PATCH = 6, 48
EMPTY = torch.zeros(8, 12, 3, dtype=torch.uint8).numpy()


def captions(count: int, guided: bool, first: int = 0) -> Batch:
    """`count` captions of different lengths, and behind them as many sequences without one."""
    texts = [[1, *range(8, 10 + first + i), 5] for i in range(count)] + [[1, 6, 5]] * (count if guided else 0)
    some = [build_sample("c", "t2i", [Text(text), GenImage(EMPTY)]) for text in texts]
    return collate(some, max(len(s) for s in some), rows=[[i] for i in range(len(some))])


class Oracle(nn.Module):
    """Knows the data [L, P] of its rows, and answers as an `x` or a `velocity` model would on the straight path."""

    def __init__(self, data: Tensor, prediction: str) -> None:
        super().__init__()
        self.data, self.prediction, self.times = data, prediction, list[float]()

    def forward(self, batch: Batch, *, logits_at: Tensor, cache: KVCache) -> Output:
        assert not logits_at.any(), "sampling needs no logits"
        if not cache.fixed:  # the prompts, once
            assert not self.times
            assert not len(batch.latents)
            return Output(torch.zeros(0, 8), batch.latents, batch.ce_norm, batch.ce_norm, None)  # type: ignore[arg-type]
        assert torch.equal(batch.latents, batch.noise)
        self.times.append(batch.time[0].item())
        time = batch.time[:, None]
        answer = self.data if self.prediction == "x" else (batch.latents - self.data) / time
        return Output(torch.zeros(0, 8), answer, time.sum(), time.sum(), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("prediction", ["x", "velocity"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_an_oracle_recovers_the_data(prediction: str, shift: float, guidance: float) -> None:
    copies = 2 if guidance != 1 else 1
    data = torch.rand(3 * LATENTS, PATCH, generator=torch.Generator().manual_seed(3)) * 2 - 1
    oracle = Oracle(data.repeat(copies, 1), prediction)
    batch = captions(3, guided=copies == 2)
    made = sample_latents(
        oracle, batch, start_noise(0, [0, 1, 2], LATENTS, PATCH), Sampler(12, guidance, shift), prediction
    )
    torch.testing.assert_close(made.view(-1, PATCH), data, atol=2e-5, rtol=0)
    assert oracle.times == pytest.approx(euler_times(12, shift)[:-1])


@pytest.mark.parametrize("guidance", [0.0, 0.5, 2.0, 5.0])
def test_guidance_is_linear_in_the_two_predictions(guidance: float) -> None:
    with_caption, without = torch.full((LATENTS, PATCH), 0.3), torch.full((LATENTS, PATCH), -0.1)
    oracle = Oracle(torch.cat([with_caption, without]), "x")
    made = sample_latents(oracle, captions(1, True), start_noise(0, [0], LATENTS, PATCH), Sampler(4, guidance), "x")
    torch.testing.assert_close(made, torch.full_like(made, -0.1 + guidance * 0.4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_times_run_from_noise_to_data(shift: float) -> None:
    times = euler_times(10, shift)
    assert (times[0], times[-1], len(times)) == (1.0, 0.0, 11)
    assert all(a > b for a, b in itertools.pairwise(times))
    assert times[5] == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5))


@pytest.mark.parametrize(("steps", "shift"), [(0, 1.0), (4, 0.0), (4, -1.0)])
def test_a_sampler_that_cannot_run_is_refused(steps: int, shift: float) -> None:
    with pytest.raises(ValueError, match="sampler"):
        euler_times(steps, shift)


def test_noise_is_a_function_of_seed_and_index() -> None:
    noise = start_noise(7, range(5), LATENTS, PATCH)
    assert torch.equal(start_noise(7, [4, 2], LATENTS, PATCH), noise[[4, 2]])
    assert not torch.equal(start_noise(8, [4], LATENTS, PATCH)[0], noise[4])
    assert not torch.equal(noise[0], noise[1])
    many = start_noise(0, range(200), LATENTS, PATCH)
    assert many.mean().abs() < 0.02
    assert abs(many.std() - 1) < 0.02


@pytest.mark.parametrize("system", ["symbiotic", "standard_moe"])
def test_an_image_does_not_depend_on_its_batch(system: str) -> None:
    model, sampler = build(system).eval(), Sampler(steps=4, guidance=2.0)
    noise = start_noise(1, [0, 1, 2, 3], LATENTS, PATCH)
    together = sample_latents(model, captions(4, True), noise, sampler)
    for i in range(4):
        alone = sample_latents(model, captions(1, True, first=i), noise[i : i + 1], sampler)
        torch.testing.assert_close(alone[0], together[i], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_guidance_one_equals_the_captioned_rows_alone() -> None:
    """Guidance 1 leaves the second half of the batch out; 1 + 1e-6 computes it and must agree."""
    model, noise = build("symbiotic").eval(), start_noise(1, [0, 1], LATENTS, PATCH)
    short = sample_latents(model, captions(2, False), noise, Sampler(3, 1.0))
    full = sample_latents(model, captions(2, True), noise, Sampler(3, 1.0 + 1e-6))
    torch.testing.assert_close(short, full, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("system", ["symbiotic", "bagel"])
def test_prompts_that_are_kept_change_no_image(system: str) -> None:
    """One Euler step of velocity: the noise minus what the whole sequence says in one forward."""
    model, batch = build(system).eval(), captions(3, True)
    noise = start_noise(1, [0, 1, 2], LATENTS, PATCH)
    made = sample_latents(model, batch, noise, Sampler(1, 2.0), "velocity")
    x = noise.reshape(-1, PATCH).repeat(2, 1)
    whole = dataclasses.replace(batch, latents=x, time=torch.ones(len(x)))
    caption, free = model(whole).prediction.chunk(2)
    torch.testing.assert_close(made.view(-1, PATCH), x.chunk(2)[0] - (2 * caption - free), atol=1e-4, rtol=1e-4)


def test_a_batch_without_the_free_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 24 latents in the batch, not 12"):
        sample_latents(Oracle(torch.zeros(12, PATCH), "x"), captions(2, False), torch.zeros(2, 6, 48), Sampler(2, 2.0))


def test_sampling_takes_no_gradient_and_leaves_the_batch() -> None:
    model, batch = build("symbiotic"), captions(1, True)
    before = dataclasses.replace(batch, latents=batch.latents.clone(), time=batch.time.clone())
    made = sample_latents(model, batch, start_noise(0, [0], LATENTS, PATCH), Sampler(2, 2.0))
    assert not made.requires_grad
    assert torch.equal(batch.latents, before.latents)
    assert torch.equal(batch.time, before.time)


def test_pixels_round_trip_and_are_clipped() -> None:
    images = torch.randint(0, 256, (2, 8, 12, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    latents = patchify(images.float() / 127.5 - 1, 4)
    assert torch.equal(to_pixels(latents, 8, 12), images)
    assert to_pixels(torch.full((1, 6, 48), 7.0), 8, 12).unique().tolist() == [255]
    assert to_pixels(torch.full((1, 6, 48), -7.0), 8, 12).unique().tolist() == [0]

"""Training of our VQ autoencoder, and what it is worth: reconstruction and use of the codebook.

First without quantisation, so that the codebook starts as the k-means of an encoder that is worth following; then with
it: straight-through gradient, commitment loss, codes as moving averages. One thread: the same bytes on every core
count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from symbiotic.images.autoencoder import VQAutoencoder
from symbiotic.images.tokenizer import ImageTokenizer, to_input

COMMITMENT = 0.25  # beta of equation 3, arXiv 1711.00937
BATCH = 500  # pictures that are measured at a time


@dataclass(frozen=True)
class Recipe:
    """How long and on what it trains. warmup: share of the steps without quantisation. revive: steps between two
    searches for dead codes, which end at three quarters of the training."""

    steps: int = 800
    batch: int = 64
    lr: float = 3e-3
    seed: int = 0
    warmup: float = 0.15
    revive: int = 20


@contextmanager
def one_thread(seed: int) -> Iterator[None]:
    """Sums in one order, random numbers from a seed; both as before afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def rate(done: float) -> float:
    """Factor of the learning rate when this share of the steps is done: a linear rise over a tenth, then a cosine."""
    return min(1.0, 0.05 + 9.5 * done) if done < 0.1 else 0.5 + 0.5 * math.cos(math.pi * (done - 0.1) / 0.9)


def train(pixels: Tensor, recipe: Recipe, **arguments: int) -> VQAutoencoder:
    """uint8 [n, H, W, 3] and the arguments of `VQAutoencoder` -> the trained tokenizer."""
    with one_thread(recipe.seed):
        tokenizer = VQAutoencoder(**arguments)
        optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step / recipe.steps))
        generator = torch.Generator().manual_seed(recipe.seed)
        start = max(1, round(recipe.warmup * recipe.steps))
        for step in range(recipe.steps):
            if step == start:
                _start_codebook(tokenizer, pixels, generator)
            x = to_input(pixels[torch.randint(len(pixels), (recipe.batch,), generator=generator)])
            reviving = step % recipe.revive == 0 and step < 0.75 * recipe.steps
            loss = _quantised(tokenizer, x, reviving, generator) if step >= start else _plain(tokenizer, x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return tokenizer.eval().requires_grad_(False)


def _plain(tokenizer: VQAutoencoder, x: Tensor) -> Tensor:
    return F.mse_loss(tokenizer.decoder(tokenizer.encoder(x)), x)


def _quantised(tokenizer: VQAutoencoder, x: Tensor, reviving: bool, generator: torch.Generator) -> Tensor:
    """Equation 3 of arXiv 1711.00937, the middle term replaced by moving averages."""
    z = tokenizer.encoder(x).permute(0, 2, 3, 1)
    z_ND, book = z.flatten(0, 2), tokenizer.codebook
    numbers_N = book(z_ND)
    q_ND = book.codes[numbers_N]
    through = (z_ND + (q_ND - z_ND).detach()).view(z.shape).permute(0, 3, 1, 2)
    loss = F.mse_loss(tokenizer.decoder(through), x) + COMMITMENT * F.mse_loss(z_ND, q_ND)
    book.follow(z_ND.detach(), numbers_N)
    if reviving:
        book.revive(z_ND.detach(), 0.1, generator)
    return loss


@torch.no_grad()
def _start_codebook(tokenizer: VQAutoencoder, pixels: Tensor, generator: torch.Generator) -> None:
    some = pixels[torch.randperm(len(pixels), generator=generator)[:BATCH]]
    tokenizer.codebook.start(tokenizer.encoder(to_input(some)).permute(0, 2, 3, 1).flatten(0, 2), generator)


def measure(tokenizer: ImageTokenizer, pixels: Tensor) -> dict[str, float]:
    """uint8 [n, H, W, 3] -> what encoding and decoding them costs.

    mse: mean squared error in units of [-1, 1]; psnr: its peak signal-to-noise ratio in dB, 10 log10(2² / mse);
    codes_used: share of the codebook that occurs; perplexity: 2^entropy of the codes, at most their number;
    codes_kept: share of codes that encoding the reconstruction gives again.
    """
    _, height, width, _ = pixels.shape
    error = kept = 0.0
    counts = torch.zeros(tokenizer.codebook_size, dtype=torch.int64)
    for some in pixels.split(BATCH):
        codes = tokenizer.encode(some)
        again = tokenizer.decode(codes, height, width)
        error += float((to_input(again) - to_input(some)).double().square().sum())
        kept += int((tokenizer.encode(again) == codes).sum())
        counts += torch.bincount(codes.flatten(), minlength=len(counts))
    mse, share = error / pixels.numel(), counts[counts > 0].double() / counts.sum()
    return {
        "images": len(pixels),
        "mse": mse,
        "psnr": 10 * math.log10(4 / mse) if mse else math.inf,
        "codes_used": len(share) / len(counts),
        "perplexity": float(torch.exp(-(share * share.log()).sum())),
        "codes_kept": kept / int(counts.sum()),
    }


def timed_training(pixels: Tensor, recipe: Recipe, **arguments: int) -> tuple[VQAutoencoder, dict[str, float]]:
    """`train`, and the seconds that it took: of this process's CPU, and on the clock."""
    cpu, clock = time.process_time(), time.perf_counter()
    tokenizer = train(pixels, recipe, **arguments)
    return tokenizer, {"cpu_seconds": time.process_time() - cpu, "seconds": time.perf_counter() - clock}

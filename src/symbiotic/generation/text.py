"""Greedy decoding through the training forward, batched over prompts of different lengths.

A prompt is computed once, then one place a row and token, beside the keys and values of what stands before.
Shapes: B prompts (one a row), T places a row, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from symbiotic.models.batch import IGNORE, TEXT, Batch
from symbiotic.models.cache import KVCache


def prompt_lengths(prompts: Batch) -> Tensor:
    """[B] tokens of each row's prompt.

    Raises:
        ValueError: a row that is not exactly one sample from place 0, padded on the right.
    """
    valid = prompts.segment >= 0
    lengths = valid.sum(1)
    prefix = torch.arange(valid.shape[1], device=valid.device) < lengths[:, None]
    if bool((prompts.segment > 0).any()) or bool((lengths == 0).any()) or not torch.equal(valid, prefix):
        raise ValueError("decoding needs one prompt a row, from place 0, padded on the right")
    return lengths


def last_logits(model: nn.Module, prompts: Batch) -> Tensor:
    """[B, V] float: logits for the token that follows each row's prompt."""
    last = prompt_lengths(prompts) - 1
    return _logits_at(model, prompts, last)


def _logits_at(model: nn.Module, batch: Batch, place_B: Tensor, **more: Any) -> Tensor:
    places = torch.arange(batch.tokens.shape[1], device=place_B.device)
    return model(batch, logits_at=places == place_B[:, None], **more).logits.float()


@torch.no_grad()
def greedy(model: nn.Module, prompts: Batch, eos: int, max_new_tokens: int) -> list[list[int]]:
    """The most likely continuation of each prompt, token by token, without `eos`.

    A row stops at `eos` or after `max_new_tokens`; what a row decodes does not depend on the other rows. The caller
    puts the model in evaluation mode.

    Raises:
        ValueError: a row that is not exactly one sample from place 0.
    """
    length_B = prompt_lengths(prompts)
    answers: list[list[int]] = [[] for _ in range(len(length_B))]
    running_B, token_B, cache = torch.ones_like(length_B, dtype=torch.bool), torch.zeros_like(length_B), KVCache()
    with torch.compiler.set_stance("force_eager"):  # a compiled block would be compiled again for every length
        for number in range(max_new_tokens):
            if number == 0:
                logits = _logits_at(model, prompts, length_B - 1, cache=cache)
            else:
                logits = _after(model, prompts, token_B, length_B + number - 1, running_B, cache)
            token_B = token_B.masked_scatter(running_B, logits.argmax(-1))
            running_B = running_B & (token_B != eos)
            for row in running_B.nonzero().squeeze(-1).tolist():
                answers[row].append(int(token_B[row]))
            if not running_B.any():
                break
    return answers


def _after(
    model: nn.Module, prompts: Batch, token_B: Tensor, place_B: Tensor, running_B: Tensor, cache: KVCache
) -> Tensor:
    """[n, V]: logits behind `token_B` at `place_B`, of the n rows that run; the others get padding."""
    segment = running_B[:, None].long() - 1
    step = one_place(prompts, tokens=token_B[:, None], position=place_B[:, None], segment=segment)
    return model(step, logits_at=running_B[:, None], cache=cache).logits.float()


def one_place(prompts: Batch, **given: Tensor) -> Batch:
    """One more place a row of the same samples: a word, unless the fields that are given say otherwise."""
    zero = torch.zeros(len(prompts.tokens), 1, dtype=torch.long, device=prompts.tokens.device)
    words = {"tokens": zero, "kind": zero + TEXT, "position": zero, "segment": zero, "span": zero - 1}
    words |= {"causal": zero == 1, "target": zero + IGNORE, "task": prompts.task[:, :1], "codes": prompts.codes[:0]}
    images = {name: getattr(prompts, name)[:0] for name in ("vit_patches", "vit_grid", "latents", "latent_grid")}
    rest = {"noise": prompts.noise[:0], "time": prompts.time[:0]}
    return Batch(**{**words, **images, **rest, "ce_norm": prompts.ce_norm, "flow_norm": prompts.flow_norm, **given})

"""Greedy decoding through the training forward, batched over prompts of different lengths.

Every token is computed again at every step (no key/value cache): answers here are two to four tokens.
Shapes: B prompts (one a row), T places a row, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from symbiotic.models.batch import IGNORE, TEXT, Batch

_PADDING = {
    "tokens": 0,
    "kind": TEXT,
    "position": 0,
    "segment": -1,
    "span": -1,
    "causal": 0,
    "target": IGNORE,
    "task": -1,
}


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


def _logits_at(model: nn.Module, batch: Batch, place_B: Tensor) -> Tensor:
    places = torch.arange(batch.tokens.shape[1], device=place_B.device)
    return model(batch, logits_at=places == place_B[:, None]).logits.float()


@torch.no_grad()
def greedy(model: nn.Module, prompts: Batch, eos: int, max_new_tokens: int) -> list[list[int]]:
    """The most likely continuation of each prompt, token by token, without `eos`.

    A row stops at `eos` or after `max_new_tokens`; what a row decodes does not depend on the other rows. The caller
    puts the model in evaluation mode.

    Raises:
        ValueError: a row that is not exactly one sample from place 0.
    """
    length = prompt_lengths(prompts)
    batch = _resized(prompts, int(length.max()))
    running = torch.ones_like(length, dtype=torch.bool)
    answers: list[list[int]] = [[] for _ in range(len(length))]
    for _ in range(max_new_tokens):
        chosen = _logits_at(model, batch, length - 1).argmax(-1)
        running &= chosen != eos
        for row in running.nonzero().squeeze(-1).tolist():
            answers[row].append(int(chosen[row]))
        if not running.any():
            break
        batch = _appended(batch, chosen, length, running)
        length = length + running
    return answers


def _appended(batch: Batch, token_B: Tensor, length_B: Tensor, running_B: Tensor) -> Batch:
    """The batch with `token_B` put behind the running rows."""
    batch = _resized(batch, max(batch.tokens.shape[1], int((length_B + running_B).max())))
    row = running_B.nonzero().squeeze(-1)
    place = length_B[row]
    task = batch.task[row, place - 1]
    values = {"tokens": token_B[row], "position": place, "segment": torch.zeros_like(place), "task": task}
    for name, value in values.items():
        getattr(batch, name)[row, place] = value
    return batch


def _resized(batch: Batch, width: int) -> Batch:
    """A copy with rows of `width` places: cut, or padded on the right."""
    more = width - batch.tokens.shape[1]
    changed = {name: F.pad(getattr(batch, name)[:, :width], (0, max(0, more)), value=v) for name, v in _PADDING.items()}
    return dataclasses.replace(batch, **{name: value.clone() for name, value in changed.items()})

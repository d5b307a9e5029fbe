"""Log-probabilities of continuations of prompts, many at a time.

Continuations of one token behind the same prompt (the letters of a choice) cost one forward for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from symbiotic.data.packing import Text, build_sample
from symbiotic.evaluation.benchmark import device_of
from symbiotic.evaluation.prompts import one_a_row

MASK_PLACES = 2**25
"""Rows times squared width of a forward, at most: its attention mask takes so many bytes, its scores several times."""


class Continuation(NamedTuple):
    """Token ids, neither of them empty."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def row(self) -> tuple[int, ...]:
        """What the model reads: every token but the last."""
        return self.prompt + self.tokens[:-1]


def continuation_scores(model: nn.Module, wanted: Sequence[Continuation], batch_size: int) -> list[tuple[float, bool]]:
    """Of each continuation its log-probability, and whether greedy decoding would give it.

    Args:
        batch_size: rows of a forward, at most; long rows go in smaller batches.
    """
    rows = sorted({one.row for one in wanted}, key=lambda row: (len(row), row))
    last = {one.row: 1 for one in wanted}
    for one in wanted:
        last[one.row] = max(last[one.row], len(one.tokens))
    log_probs: dict[tuple[int, ...], Tensor] = {}
    for some in batches_of_rows(rows, batch_size):
        log_probs |= zip(some, _log_probs(model, some, [last[row] for row in some]), strict=True)
    return [_score(one, log_probs[one.row]) for one in wanted]


def batches_of_rows(rows: Sequence[tuple[int, ...]], batch_size: int) -> Iterator[list[tuple[int, ...]]]:
    """Consecutive rows, sorted by length, in batches that the memory of attention allows."""
    some: list[tuple[int, ...]] = []
    for row in rows:
        if some and (len(some) == batch_size or (len(some) + 1) * len(row) ** 2 > MASK_PLACES):
            yield some
            some = []
        some.append(row)
    if some:
        yield some


def _log_probs(model: nn.Module, rows: Sequence[tuple[int, ...]], counts: Sequence[int]) -> list[Tensor]:
    """Of each row, [count, V] float on the CPU: log-probabilities of what follows its last `count` places."""
    batch = one_a_row([build_sample("", "lm", [Text(list(row))]) for row in rows]).to(device_of(model))
    places = torch.arange(batch.tokens.shape[1])
    end, count = (torch.tensor(x)[:, None] for x in ([len(row) for row in rows], counts))
    asked = (places < end) & (places >= end - count)
    logits = model(batch, logits_at=asked.to(batch.tokens.device)).logits
    return list(logits.float().log_softmax(-1).cpu().split(list(counts)))


def _score(one: Continuation, log_probs: Tensor) -> tuple[float, bool]:
    ours, tokens = log_probs[len(log_probs) - len(one.tokens) :], torch.tensor(one.tokens)
    picked = ours.gather(1, tokens[:, None])
    return float(picked.sum()), bool((ours.argmax(-1) == tokens).all())

"""Log-probabilities of continuations of prompts, many at a time.

Continuations of one token behind the same prompt (the letters of a choice) cost one forward for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from symbiotic.data.packing import Text, build_sample
from symbiotic.evaluation.benchmark import device_of
from symbiotic.evaluation.prompts import by_length, one_a_row


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
    for places in by_length([len(row) for row in rows], batch_size):
        some = [rows[i] for i in places]
        log_probs |= zip(some, _log_probs(model, some, [last[row] for row in some]), strict=True)
    return [_score(one, log_probs[one.row]) for one in wanted]


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

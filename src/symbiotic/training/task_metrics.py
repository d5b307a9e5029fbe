"""What task routers did: pure functions on counts of tokens, and their names in the log.

Suffixes: L MoE layers, M kinds, R groups of experts (see `models/task_router.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from symbiotic.schema import KINDS
from symbiotic.training.routing_metrics import by_layer


def accuracy(predicted_LMR: Tensor, task_M: Tensor) -> Tensor:
    """[L, M]: share of the tokens of a kind whose task was predicted right; NaN without tokens.

    task_M: the group that is the truth for a kind.
    """
    return share(predicted_LMR).gather(2, task_M[None, :, None].expand(len(predicted_LMR), -1, 1)).squeeze(2)


def share(tokens_LMR: Tensor) -> Tensor:
    """[L, M, R]: share of the tokens of a kind in each group."""
    return tokens_LMR.double() / tokens_LMR.double().sum(-1, keepdim=True)


def task_metrics(
    predicted_LMR: Tensor, sent_LMR: Tensor, routers_RM: Tensor, names_R: Sequence[str]
) -> dict[str, float]:
    """Of every kind with tokens, as the mean over layers and per layer i:

        task/accuracy/KIND      task/share/KIND/GROUP      and the same under task/layer{i}/...

    accuracy is that of the prediction, also where training goes by the truth; share is of where tokens were sent.
    """
    right_LM, share_LMR = accuracy(predicted_LMR, routers_RM.argmax(0)), share(sent_LMR)
    out: dict[str, float] = {}
    for m in torch.nonzero(sent_LMR.sum((0, 2)) > 0).flatten().tolist():
        out |= by_layer(f"accuracy/{KINDS[m]}", right_LM[:, m], "task")
        for r, name in enumerate(names_R):
            out |= by_layer(f"share/{KINDS[m]}/{name}", share_LMR[:, m, r], "task")
    return out

"""The task router: one hard choice per token and layer, of the group of experts that serves its task.

UTAMoE (arXiv 2506.03591). A group is a distinct row of `system.visible`: the router columns that the tokens of some
kinds see. Suffixes as in `routing.py`; R groups, as many as there are routers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from symbiotic.models.places import Places
from symbiotic.models.routing import count_by_kind


class TaskStats(NamedTuple):
    """What the task router of one layer did; padding is not in it."""

    loss: Tensor  # [] cross-entropy with the true task, mean over the tokens
    predicted_MR: Tensor  # tokens of a kind by the group that was predicted
    sent_MR: Tensor  # and by the group whose experts they used


class TaskRouter(nn.Linear):
    """`argmax softmax(W_t x + b)`: the group that a token is sent to.

    The choice is hard, so that only the supervision by the true task trains it: `CE(softmax(W_t x + b), task)`. The
    true task of a token is the group of its kind.
    """

    task_M: Tensor

    def __init__(self, width: int, routers_RM: Tensor) -> None:
        super().__init__(width, len(routers_RM))
        self.register_buffer("task_M", routers_RM.argmax(0), persistent=False)

    def forward(self, x_ND: Tensor, places: Places) -> tuple[Tensor, TaskStats]:  # type: ignore[override]
        """[N] the group of each token, and what is counted. In float32 under autocast too."""
        logits_NR = F.linear(x_ND.float(), self.weight.float(), self.bias.float())
        true_N, predicted_N = self.task_M[places.kind_N], logits_NR.argmax(-1)
        sent_N = predicted_N if places.by_truth is None else torch.where(places.by_truth, true_N, predicted_N)
        loss_N = F.cross_entropy(logits_NR, true_N, reduction="none") * places.valid_N
        loss = loss_N.sum() / places.valid_N.sum().clamp(min=1)
        counts = (count_by_kind(to_N[:, None], places.kinds_NM, self.out_features) for to_N in (predicted_N, sent_N))
        return sent_N, TaskStats(loss, *counts)

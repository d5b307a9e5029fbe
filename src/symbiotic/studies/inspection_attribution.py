"""What an answer or an image depends on: integrated gradients on the embedded tokens.

    value of token n = sum over d of (x_nd - b_nd) * mean over a in [0, 1] of d score(b + a (x - b)) / d x_nd

(arXiv 1703.01365, eq. 1, by captum's Gauss-Legendre rule.) The baseline b is the same sequence saying nothing: `<unk>`
for every word, gray patches, no codes; special tokens and places stay. It is not zero, where the first norm makes the
score jump. The values add up to score(x) - score(b), but for the error of the sum and for jumps where a token changes
experts on the way; what is missing is said (`gap`).
Suffixes: N tokens, D width, S points between baseline and input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from symbiotic.data.tokenizer import EOS, SPECIALS, UNK
from symbiotic.evaluation.benchmark import measuring
from symbiotic.generation.text import greedy
from symbiotic.models.batch import Batch
from symbiotic.models.unified import UnifiedModel
from symbiotic.objectives.autoregressive import START
from symbiotic.objectives.text import ce_loss
from symbiotic.objectives.total import generation_loss, model_input
from symbiotic.schema import ConfigError, Objective

if TYPE_CHECKING:
    from captum.attr import IntegratedGradients

ANSWER_TOKENS = 32
STEPS = 64

Score = Callable[[Tensor], Tensor]
"""[N, D] embedded tokens -> []."""


@dataclass(frozen=True)
class Attribution:
    """about: of what. values_N: what each token adds to the score. score, baseline: of the sequence, and of the same
    saying nothing."""

    about: str
    values_N: Tensor
    score: float
    baseline: float

    @property
    def gap(self) -> float:
        """What the values do not add up to."""
        return self.score - self.baseline - float(self.values_N.double().sum())


def library() -> type[IntegratedGradients]:
    """Raises ConfigError where captum is not installed."""
    try:
        from captum.attr import IntegratedGradients
    except ImportError as error:
        raise ConfigError("attribute=true: needs captum, of the extra eval: pip install -e '.[eval]'") from error
    return IntegratedGradients


def attributed(model: UnifiedModel, batch: Batch, score: Score, about: str, steps: int = STEPS) -> Attribution:
    """What each token of a batch of one row adds to the score."""
    with measuring(model):
        with torch.no_grad():
            x_ND, silent_ND = model.embedding(batch), model.embedding(silent(batch))
            ends = [float(score(end_ND)) for end_ND in (x_ND, silent_ND)]
        points = library()(lambda x_SND: torch.stack([score(x_ND) for x_ND in x_SND]))
        found = points.attribute(x_ND[None], silent_ND[None], n_steps=steps, internal_batch_size=1)
    return Attribution(about, found[0].sum(-1).detach().cpu(), *ends)


def silent(batch: Batch) -> Batch:
    """The batch with nothing said: the baseline."""
    return replace(
        batch,
        tokens=torch.where(batch.tokens < len(SPECIALS), batch.tokens, UNK),
        vit_patches=torch.zeros_like(batch.vit_patches),
        latents=torch.zeros_like(batch.latents),
        codes=torch.full_like(batch.codes, START),
    )


def answer_ids(model: UnifiedModel, prompt: Batch) -> list[int]:
    """The model's own greedy answer, without `<eos>`."""
    with measuring(model):
        return greedy(model, prompt, EOS, ANSWER_TOKENS)[0]


def answer_score(model: UnifiedModel, batch: Batch) -> Score:
    """Log-probability of the batch's targets, in nats."""
    return lambda x_ND: -ce_loss(model(batch, embedded=x_ND).logits, batch)


def image_score(model: UnifiedModel, clean: Batch, objective: Objective) -> Score:
    """How well the model predicts the image from what it sees: minus the loss, summed over the latents."""
    seen = model_input(clean)
    return lambda x_ND: -generation_loss(model(seen, embedded=x_ND).prediction, clean, objective)


IMAGE = {
    "flow": "the image: minus the squared error of its patches, summed",
    "autoregressive": "the image: log-probability of its codes, in nats",
}
"""Objective -> what the score of an image is."""

"""Greedy decoding: what a row decodes is a matter of that row alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from factory import VOCABULARY, build, samples
from symbiotic.data.packing import ReadImage, Sample, Text, build_sample, collate
from symbiotic.generation.text import greedy, last_logits
from symbiotic.models.batch import Batch
from symbiotic.models.cache import KVCache
from symbiotic.models.unified import Output

NEVER = -1


def rows(some: list[Sample], extra: int = 0) -> Batch:
    width = max(len(sample) for sample in some) + extra
    return collate(some, width, rows=[[i] for i in range(len(some))])


def prompt(*tokens: int) -> Sample:
    return build_sample("p", "lm", [Text(list(tokens))])


class Successor(nn.Module):
    """Says that the next token is the last one plus one; refuses to be asked at padding."""

    def forward(self, batch: Batch, *, logits_at: torch.Tensor, cache: KVCache | None = None) -> Output:
        assert (batch.segment[logits_at] == 0).all()
        logits = F.one_hot(batch.tokens[logits_at] + 1, 100).float()
        none = torch.zeros(())
        return Output(logits, batch.latents, none, none, None)  # type: ignore[arg-type]


def test_each_row_continues_until_its_own_end() -> None:
    prompts = rows([prompt(1, 17), prompt(3, 5, 9, 18), prompt(2, 3, 19), prompt(30)])
    assert greedy(Successor(), prompts, eos=20, max_new_tokens=4) == [[18, 19], [19], [], [31, 32, 33, 34]]


def test_no_new_token_is_no_answer() -> None:
    assert greedy(Successor(), rows([prompt(1)]), eos=20, max_new_tokens=0) == [[]]


@pytest.mark.parametrize("system", ["symbiotic", "standard_moe", "bagel"])
def test_batched_equals_single(system: str) -> None:
    model = build(system).eval()
    texts = [build_sample(f"s{n}", "lm", [Text(list(range(8, 8 + n)))]) for n in (3, 11, 7)]
    mixed = [*texts, *samples(4, ("mmu", "lm"))]
    together = greedy(model, rows(mixed, extra=3), NEVER, 5)
    assert together == [greedy(model, rows([one]), NEVER, 5)[0] for one in mixed]
    assert together[::-1] == greedy(model, rows(mixed[::-1]), NEVER, 5)
    assert len({tuple(answer) for answer in together}) > 1, "the prompts do not matter"


def test_the_end_token_cuts_and_frees_no_other_row() -> None:
    model = build("symbiotic").eval()
    prompts = rows(samples(6, ("lm", "mmu")))
    free = greedy(model, prompts, NEVER, 5)
    eos = free[0][2]
    cut = greedy(model, prompts, eos, 5)
    assert cut == [answer[: answer.index(eos)] if eos in answer else answer for answer in free]


def test_decoding_equals_reading_the_answer_back() -> None:
    """Token for token, the decoded answer is the argmax of one forward over prompt and answer."""
    model = build("symbiotic").eval()
    words = list(range(10, 20))
    answer = greedy(model, rows([prompt(*words)]), NEVER, 4)[0]
    whole = rows([prompt(*words, *answer)])
    places = torch.arange(whole.tokens.shape[1])[None]
    logits = model(whole, logits_at=(places >= 9) & (places < 13)).logits
    assert logits.argmax(-1).tolist() == answer


def test_the_prompts_stay_as_they_are() -> None:
    prompts = rows(samples(2, ("lm",)))
    before = prompts.tokens.clone(), prompts.segment.clone()
    greedy(build("dense").eval(), prompts, NEVER, 3)
    assert torch.equal(prompts.tokens, before[0])
    assert torch.equal(prompts.segment, before[1])


def test_last_logits_stand_behind_the_last_token_of_each_row() -> None:
    logits = last_logits(Successor(), rows([prompt(1, 2), prompt(5, 6, 7)]))
    assert logits.argmax(-1).tolist() == [3, 8]


def test_packed_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="one prompt a row"):
        greedy(Successor(), collate([prompt(1), prompt(2)], 8), NEVER, 1)


def test_the_image_of_a_prompt_matters() -> None:
    model = build("symbiotic").eval()
    picture = torch.arange(8 * 12 * 3).view(8, 12, 3).to(torch.uint8).numpy()
    pair = [build_sample("i", "mmu", [ReadImage(p), Text([9, 10])]) for p in (picture, 255 - picture)]
    logits = last_logits(model, rows(pair))
    assert logits.shape == (2, VOCABULARY)
    assert not torch.allclose(logits[0], logits[1])

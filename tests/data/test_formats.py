"""Records to sequences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from symbiotic.data.errors import DataError
from symbiotic.data.formats import (
    drop_caption,
    generation_parts,
    measure,
    question_parts,
    reading_parts,
    record_sample,
    render_knowledge_prompt,
)
from symbiotic.data.packing import build_sample
from symbiotic.data.shards import ShardIndex, ShardReader
from symbiotic.data.tokenizer import BOS, EOS, GEN, NULL, Tokenizer
from symbiotic.models.batch import IGNORE, PROMPT, VAE

PIXELS = np.full((8, 8, 3), 200, np.uint8)
TOKENIZER = Tokenizer.build(["what", "is", "it", "?", "red", "blue", ".", "answer"])


def test_a_statement_is_learnt_whole_and_a_question_by_its_answer() -> None:
    statement = record_sample("s", {"task": "lm", "text": "it is red ."}, None, TOKENIZER)
    assert (statement.target != IGNORE).sum() == 5  # four words and <eos>
    question = record_sample("q", {"task": "lm", "prompt": "what is it ?", "answer": "B"}, None, TOKENIZER)
    assert question.target[question.target != IGNORE].tolist() == [TOKENIZER.letters[1], EOS]


def test_the_answer_is_predicted_at_the_end_of_the_prefix() -> None:
    prompt = render_knowledge_prompt("what is it ?", ["red", "blue", "red", "blue"])
    assert prompt == "what is it ? A red B blue C red D blue answer"
    whole = build_sample("w", "lm", question_parts(prompt, TOKENIZER, "C"))
    prefix = build_sample("p", "lm", question_parts(prompt, TOKENIZER))
    assert whole.tokens[: len(prefix)].tolist() == prefix.tokens.tolist()
    assert whole.target[len(prefix) - 1] == TOKENIZER.letters[2]
    assert (prefix.target == IGNORE).all()
    pictured = build_sample("p", "mmu", reading_parts(PIXELS, "what is it ?", TOKENIZER))
    assert (pictured.target == IGNORE).all()


def test_a_dropped_caption_is_the_unconditional_sequence() -> None:
    kept = build_sample("g", "t2i", generation_parts(PIXELS, "red .", TOKENIZER))
    expected = build_sample("g", "t2i", generation_parts(PIXELS, None, TOKENIZER))
    dropped = drop_caption(kept)
    for name, value in vars(expected).items():
        assert np.array_equal(getattr(dropped, name), value), name
    assert dropped.tokens.tolist() == [BOS, NULL, GEN, 0, 0, 0, 0]
    assert dropped.kind.tolist() == [PROMPT] * 3 + [VAE] * 4
    assert (dropped.target == IGNORE).all()
    assert (kept.target != IGNORE).sum() == 3  # two words and <gen>


def test_counts_without_the_image_are_those_of_the_sample(
    corpus: Path, index: ShardIndex, tokenizer: Tokenizer
) -> None:
    reader = ShardReader(corpus / "shards", index)
    for number in range(0, len(index), 7):
        record, pixels = reader.read(number)
        sample, counts = record_sample("k", record, pixels, tokenizer), measure(record, tokenizer)
        assert counts.tokens == len(sample) == index.num_tokens[number]
        assert counts.ce == (sample.target != IGNORE).sum() == index.num_ce[number]
        assert counts.latents == len(sample.latents) == index.num_latents[number]
        if counts.latents:
            short = drop_caption(sample)
            assert (counts.dropped_tokens, counts.dropped_ce) == (len(short), 0)
        else:
            assert (counts.dropped_tokens, counts.dropped_ce) == (counts.tokens, counts.ce)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"task": "speech"}, "task 'speech' is none of t2i"),
        ({}, "task None is none of"),
        ({"task": "lm", "prompt": "what"}, "a record of task lm needs the key 'answer'"),
        ({"task": "mmu", "question": "what", "answer": "red"}, "a record of task mmu needs an image"),
    ],
)
def test_bad_records_are_refused(record: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        record_sample("k", record, None, TOKENIZER)

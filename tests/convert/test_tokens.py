"""A pretrained tokenizer as one of ours: the same texts are the same vectors, whatever moved."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from checkpoints import OLMOE, tensors, write
from symbiotic.convert.families import model_of_file
from symbiotic.convert.huggingface import read_parent, swap_rows
from symbiotic.convert.tokens import adapted
from symbiotic.data.tokenizer import EOS, IMAGE, PAD, SPECIALS, Tokenizer
from symbiotic.schema import ConfigError

TEXTS = ("the cat sat on the mat.", "A B C D answer 47!", "the \u00e9l\u00e8ve: <image>, naturally", "")
ROWS = 320


def bpe(specials: list[str], first: bool = True) -> tokenizers.Tokenizer:
    """A byte-level BPE as most models have. first: its specials have the first ids, not the last."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials if first else [], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(["the cat sat on the mat the rat"] * 20, trainer)
    if not first:
        inner.add_special_tokens(specials)
    return inner


def folder_of(path: Path, inner: tokenizers.Tokenizer, **names: Any) -> Path:
    write(path, OLMOE | {"vocab_size": ROWS}, tensors(OLMOE | {"vocab_size": ROWS}))
    inner.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    return path


VARIANTS = {
    "end of text first": (
        bpe(["<|endoftext|>", "<|padding|>"]),
        {"eos_token": "<|endoftext|>", "pad_token": "<|padding|>"},
    ),
    "specials last": (
        bpe(["<|end|>", "<unk>"], first=False),
        {"eos_token": {"content": "<|end|>"}, "pad_token": "<|end|>"},
    ),
    "names of ours elsewhere": (bpe(["<s>", "<eos>", "<bos>", "<pad>"]), {"bos_token": "<s>", "eos_token": "<eos>"}),
    "none that is known": (bpe([]), {}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_text_is_the_same_sequence_of_vectors(name: str, tmp_path: Path) -> None:
    inner, names = VARIANTS[name]
    folder = folder_of(tmp_path / "hf", inner, **names)
    found = adapted(folder, SPECIALS)
    (tmp_path / "tokenizer.json").write_text(found.text)
    mine = Tokenizer.load(tmp_path / "tokenizer.json")
    state = read_parent(folder, model_of_file(folder), seed=0)
    moved = swap_rows(state, found.swaps)
    for text in TEXTS[:2]:
        ids, theirs = mine.encode(text), inner.encode(text, add_special_tokens=False).ids
        assert len(ids) == len(theirs)
        assert min(ids, default=8) >= len(SPECIALS)
        for weight in ("embed.weight", "text_head.weight"):
            assert torch.equal(moved[weight][ids], state[weight][theirs])
        assert mine.decode(ids) == inner.decode(theirs) == text
    assert sorted(map(tuple, moved["embed.weight"].tolist())) == sorted(map(tuple, state["embed.weight"].tolist()))
    back = swap_rows(moved, [(row, own) for own, row in found.swaps])
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("name", VARIANTS)
def test_specials_take_the_rows_of_their_meaning_or_rows_without_a_token(name: str, tmp_path: Path) -> None:
    inner, names = VARIANTS[name]
    found = adapted(folder_of(tmp_path, inner, **names), SPECIALS)
    row = dict(found.swaps)
    theirs = {special: row.get(i, i) for i, special in enumerate(SPECIALS)}
    eos = names.get("eos_token")
    eos = eos["content"] if isinstance(eos, dict) else eos
    if eos is not None:
        assert theirs["<eos>"] == inner.token_to_id(eos)
    for special, at in theirs.items():
        own = inner.token_to_id(special)
        assert own in (None, at)
        meant = own is not None or inner.id_to_token(at) in {*map(str, names.values()), eos}
        assert meant or inner.id_to_token(at) is None, (special, at)
    assert len(set(theirs.values())) == len(SPECIALS)


def test_words_of_ours_in_a_text_are_specials_as_before(tmp_path: Path) -> None:
    folder_of(tmp_path / "hf", bpe(["<|endoftext|>"]), eos_token="<|endoftext|>")
    (tmp_path / "tokenizer.json").write_text(adapted(tmp_path / "hf", SPECIALS).text)
    mine = Tokenizer.load(tmp_path / "tokenizer.json")
    assert IMAGE in mine.encode(TEXTS[2])
    assert mine.letters == tuple(mine.id(letter) for letter in "ABCD")
    assert (mine.id("<pad>"), mine.id("<eos>")) == (PAD, EOS)
    assert mine.inner.token_to_id("<|endoftext|>") is None


REFUSED = {
    "no file": (
        lambda f: (f / "tokenizer.json").unlink(),
        r"init\.folder=.*: no tokenizer\.json in it \(looked for at",
    ),
    "no json": (lambda f: (f / "tokenizer.json").write_text("{"), r"tokenizer\.json: not readable as JSON"),
    "unigram": (
        lambda f: (f / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": []}})),
        r"model\.type=Unigram: must be one of BPE, WordLevel, WordPiece",
    ),
    "no rows left": (
        lambda f: write(f, OLMOE | {"vocab_size": 2 + bpe(["<|endoftext|>"]).get_vocab_size()}, None),
        r"\d+ rows, 2 of them without a token, too few for .*; give the model more rows",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_ours_is_one_line(what: str, tmp_path: Path) -> None:
    change, line = REFUSED[what]
    change(folder_of(tmp_path, bpe(["<|endoftext|>"]), eos_token="<|endoftext|>"))
    with pytest.raises(ConfigError) as error:
        adapted(tmp_path, SPECIALS)
    assert re.search(line, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)

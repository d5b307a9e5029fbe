"""Words to ids and back; a file that is no tokenizer is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from symbiotic.data.errors import DataError
from symbiotic.data.tokenizer import EOS, SPECIALS, UNK, Tokenizer


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer.build(["what", "is", "it", "?", "red", "."])


def test_specials_have_fixed_ids_and_letters_and_digits_are_single_words(words: Tokenizer) -> None:
    assert [words.id(special) for special in SPECIALS] == list(range(8))
    assert words.encode("A B C D") == list(words.letters)
    assert len(words.encode("47")) == 2
    assert words.decode(words.encode("47")) == "4 7"


def test_text_survives_and_punctuation_is_split(words: Tokenizer) -> None:
    assert words.decode(words.encode("what is it?")) == "what is it ?"
    assert words.decode([*words.encode("red"), EOS]) == "red"
    assert words.encode("mauve") == [UNK]
    assert words.encode("Red") == [UNK]  # case matters: the letter A is not the word a


def test_a_stored_tokenizer_is_the_same(words: Tokenizer, tmp_path: Path) -> None:
    words.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.vocab_size == words.vocab_size
    assert again.encode("what is 47 ?") == words.encode("what is 47 ?")


def test_every_word_of_the_corpus_is_known(corpus: Path, tokenizer: Tokenizer) -> None:
    for shard in (corpus / "shards").glob("lm*.tar"):
        text = shard.read_bytes().decode(errors="ignore")
        prompts = [part.split('"')[0] for part in text.split('"prompt":"')[1:]]
        assert prompts
        assert all(UNK not in tokenizer.encode(prompt) for prompt in prompts)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: No such file"):
        Tokenizer.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad\.json: not a tokenizer file"):
        Tokenizer.load(tmp_path / "bad.json")
    with pytest.raises(DataError, match="'zebra' is not in the vocabulary"):
        Tokenizer.build([]).id("zebra")

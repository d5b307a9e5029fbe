"""Word-level tokenizer of the embedded corpus, stored as a `tokenizers` JSON file.

Words and punctuation marks are one token each; digits are always single ("47" is two tokens), and so are the
letters A to D. `decode` joins with spaces, so a digit string reads "4 7".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, models, pre_tokenizers

from symbiotic.convert.tokens import adapted
from symbiotic.data.errors import DataError, readable_errors
from symbiotic.images.tokenizer import ImageTokenizer
from symbiotic.schema import ConfigError

SPECIALS = ("<pad>", "<bos>", "<eos>", "<image>", "</image>", "<gen>", "<null>", "<unk>")
PAD, BOS, EOS, IMAGE, IMAGE_END, GEN, NULL, UNK = range(len(SPECIALS))
LETTERS = ("A", "B", "C", "D")
_REMEMBERED = 4096  # texts


def words_of(source: str | Path, key: str) -> str:
    """The content of a `tokenizer.json` of ours: of a file as it is; of the folder of a pretrained model, its own with
    the specials at ids 0 to 7 (`convert.tokens`). key: of the config, for messages.

    Raises:
        ConfigError: no such file or folder, or a tokenizer that cannot be one of ours.
    """
    if Path(source).is_dir():
        return adapted(source, SPECIALS, key).text
    if not Path(source).is_file():
        right = "must be a tokenizer.json of ours, or the folder of a pretrained model with its tokenizer.json"
        raise ConfigError(f"{key}={source}: no such file; {right}")
    return Path(source).read_text(encoding="utf-8", errors="replace")


class Tokenizer:
    """Text to token ids and back. Ids 0 to 7 are `SPECIALS`, in every tokenizer of this project.

    images: that of the generated images, where they are codes (objective autoregressive). autoencoder: the one whose
    latents they are (`symbiotic.images.kl`), where they are no patches of pixels; vision: the same of images that are
    read (`symbiotic.images.vision`).
    """

    images: ImageTokenizer | None = None
    autoencoder: Any = None
    vision: Any = None

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self.inner = inner
        self.vocab_size: int = inner.get_vocab_size()
        self._known: dict[str, list[int]] = {}  # questions and answers recur
        self.letters: tuple[int, ...] = tuple(self.id(letter) for letter in LETTERS)
        """Ids of the four answer letters, in order."""

    @classmethod
    def build(cls, words: Iterable[str]) -> Tokenizer:
        """A tokenizer that knows the specials, the four letters, the ten digits, and `words`."""
        known = [*SPECIALS, *LETTERS, *"0123456789"]
        known += sorted(set(words) - set(known))
        vocab = {word: number for number, word in enumerate(known)}
        inner = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        split = pre_tokenizers.Split(Regex(r"\d|[^\W\d]+|[^\w\s]"), behavior="removed", invert=True)
        inner.pre_tokenizer = split
        inner.add_special_tokens(list(SPECIALS))
        return cls(inner)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json`.

        Raises:
            DataError: missing or unreadable file, or the specials are not ids 0 to 7.
        """
        with readable_errors("read the tokenizer", Path(path)):
            text = Path(path).read_text(errors="replace")
        return cls.of_text(text, path)

    @classmethod
    def of_text(cls, text: str, path: str | Path) -> Tokenizer:
        """The content of a `tokenizer.json`; path: where it is from, for messages. Raises as `load` does."""
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{path}: not a tokenizer file ({str(error).splitlines()[0]})") from error
        if tuple(inner.id_to_token(i) for i in range(len(SPECIALS))) != SPECIALS:
            raise DataError(f"{path}: token ids 0 to {len(SPECIALS) - 1} must be {' '.join(SPECIALS)}")
        return cls(inner)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.inner.to_str(pretty=True) + "\n")

    def id(self, token: str) -> int:
        """Id of one token; raises `DataError` where the vocabulary lacks it."""
        number = self.inner.token_to_id(token)
        if number is None:
            raise DataError(f"token {token!r} is not in the vocabulary of {self.vocab_size} tokens")
        return int(number)

    def encode(self, text: str) -> list[int]:
        """Ids of the words of `text`; no special token is added, unknown words become `<unk>`."""
        if text not in self._known:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[text] = self.inner.encode(text, add_special_tokens=False).ids
        return list(self._known[text])

    def decode(self, ids: Sequence[int]) -> str:
        """The words joined by spaces, special tokens left out."""
        return str(self.inner.decode(list(ids), skip_special_tokens=True))

"""A pretrained model's `tokenizer.json` as a tokenizer of this project, whose ids 0 to 7 are always the same specials.

The tokens of a few rows change places (ours): each of our specials takes the row of the token that means the same in
the model (its end of text, say), or a row that no token uses; what stood at ids 0 to 7 moves there. The embedding and
the head have their rows swapped alike, so every text is the same sequence of vectors as before, and an export swaps
them back. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symbiotic.convert.families import CONFIG
from symbiotic.schema import ConfigError

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
FILES = (TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "vocab.json", "merges.txt", "generation_config.json")
"""What belongs to a model's tokens in its folder; each of them may be missing."""

MEANS = {"<eos>": "eos_token", "<bos>": "bos_token", "<unk>": "unk_token", "<pad>": "pad_token"}
"""Special of ours -> the key of `tokenizer_config.json` that names the token of the same meaning; first come first
served, as padding often is the end of text, too."""

WITH_VOCABULARY = ("BPE", "WordLevel", "WordPiece")
GET = "download it from where the weights are from; tokenizers without it: transformers' save_pretrained writes one"


@dataclass(frozen=True)
class Adapted:
    """text: the `tokenizer.json` of ours. swaps: rows (ours, the model's) that differ, each way round once."""

    text: str
    swaps: tuple[tuple[int, int], ...]


def adapted(folder: str | Path, specials: Sequence[str], key: str = "init.folder") -> Adapted:
    """
    Args:
        folder: holds `tokenizer.json` and `config.json`, whose `vocab_size` says how many rows there are; what the
            specials are is read from `tokenizer_config.json`, if there is one. specials: ours, by id. key: of the
            folder, for messages.

    Raises:
        ConfigError: no such file, one that cannot be read, a kind of tokenizer without a vocabulary by name, or too
            few rows without a token.
    """
    path = Path(folder) / TOKENIZER
    if not path.is_file():
        where = f"looked for at {path.resolve()}"
        raise ConfigError(f"{key}={folder}: no {TOKENIZER} in it ({where}); {GET}")
    given = _json(path)
    kind = (given.get("model") or {}).get("type")
    if kind not in WITH_VOCABULARY:
        raise ConfigError(f"{path}: model.type={kind}: must be one of {', '.join(WITH_VOCABULARY)}")
    rows = _json(Path(folder) / CONFIG).get("vocab_size")
    names = _json(Path(folder) / TOKENIZER_CONFIG) if (Path(folder) / TOKENIZER_CONFIG).is_file() else {}
    names = {"unk_token": given["model"].get("unk_token"), **names}
    ids = {**given["model"]["vocab"], **{token["content"]: token["id"] for token in given.get("added_tokens") or ()}}
    taken = _rows(ids, names, specials, int(rows or 0), path)
    theirs = _exchanged(taken)
    return Adapted(_renumbered(given, specials, taken, {row: own for own, row in theirs.items()}), _moved(theirs))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: must be a mapping")
    return found


def _rows(
    ids: Mapping[str, int], names: Mapping[str, Any], specials: Sequence[str], count: int, path: Path
) -> list[int]:
    """The row of each special: of the token of its name, of the one that means the same, or one without a token."""
    found: dict[str, int] = {name: ids[name] for name in specials if name in ids}
    for name, key in MEANS.items():
        token = names.get(key)
        token = token.get("content") if isinstance(token, Mapping) else token
        row = ids.get(token) if isinstance(token, str) else None
        if name in specials and name not in found and row is not None and row not in found.values():
            found[name] = row
    used = set(ids.values())
    spare: Iterator[int] = (row for row in range(count) if row not in used)
    for name in specials:
        row = found[name] if name in found else next(spare, None)
        if row is None:
            free = sum(row not in used for row in range(count))
            missing = [name for name in specials if name not in ids]
            what = f"{count} rows, {free} of them without a token, too few for {' '.join(missing)}"
            raise ConfigError(f"{path}: {what}; give the model more rows (vocab_size)")
        found[name] = row
    return [found[name] for name in specials]


def _exchanged(taken: Sequence[int]) -> dict[int, int]:
    """Id of ours -> row of the model, after special i and row `taken[i]` changed places; ids that stay left out."""
    theirs: dict[int, int] = {}
    for own, row in enumerate(taken):
        other = next((o for o, r in theirs.items() if r == row), row)
        theirs[other], theirs[own] = theirs.get(own, own), row
    return {own: row for own, row in theirs.items() if own != row}


def _moved(theirs: Mapping[int, int]) -> tuple[tuple[int, int], ...]:
    return tuple(sorted(theirs.items()))


def _renumbered(
    given: Mapping[str, Any], specials: Sequence[str], taken: Sequence[int], ours: Mapping[int, int]
) -> str:
    """The file with our ids and the names of our specials. All tokens stand in the vocabulary, as the library numbers
    those that do not by itself; templates, padding and truncation are left out, as we add specials ourselves."""
    named = dict(zip(taken, specials, strict=True))
    added = [dict(token) for token in given.get("added_tokens") or ()]
    vocab = {named.get(row, token): ours.get(row, row) for token, row in given["model"]["vocab"].items()}
    for token in added:
        row = token["id"]
        token |= {"id": ours.get(row, row), "content": named.get(row, token["content"])}
        vocab[token["content"]] = token["id"]
    known = {token["content"] for token in added}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added += [{"id": i, "content": name, **flags} for i, name in enumerate(specials) if name not in known]
    vocab |= {name: i for i, name in enumerate(specials)}
    model = {**given["model"], "vocab": dict(sorted(vocab.items(), key=lambda item: item[1]))}
    if model.get("unk_token") is not None:
        model["unk_token"] = "<unk>" if "<unk>" in specials else model["unk_token"]
    plain = {"added_tokens": sorted(added, key=lambda token: token["id"]), "model": model}
    return json.dumps({**given, **plain, "post_processor": None, "padding": None, "truncation": None}) + "\n"


def own_files(folder: Path) -> list[Path]:
    """The files of a model's tokens that are in its folder."""
    return [folder / name for name in FILES if (folder / name).is_file()]

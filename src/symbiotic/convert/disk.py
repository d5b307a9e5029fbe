"""Conversions from disk to disk: in memory are one parameter of ours and one tensor of theirs at a time.

A checkpoint as the parent of a run (one file, our names and layout, which `init_from` then reads in one go), and back;
a dense checkpoint as a mixture of experts. Types stay as they are on the disk.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from symbiotic.convert.families import CONFIG, model_of_file, pretrained
from symbiotic.convert.huggingface import (
    CONVERTED,
    FRESH_MODULES,
    Place,
    check_names,
    empty_parent,
    placed,
    places,
    write_config,
)
from symbiotic.convert.tensor_files import DTYPES, Shape, Stored, header, read, stored, write_file, write_shards
from symbiotic.convert.tokens import own_files
from symbiotic.convert.upcycle import recipe, shapes, tensors
from symbiotic.files import read_json
from symbiotic.schema import ConfigError, RunError

Made = dict[str, Any]
"""For `conversion.json`: files, their largest tensor in bytes, parameters before and after."""


def to_parent(folder: Path, out: Path) -> Made:
    """A Hugging Face checkpoint -> `out/parent.safetensors`, `config.json` and the files of its tokens.

    Raises:
        ConfigError, RunError: see `huggingface.read_parent`.
    """
    source, model, found = pretrained(folder), model_of_file(folder), stored(folder)
    at = placed(found, source.family, model)
    tied = check_names(found, at, source.family, model, folder)
    if tied and not all(_same(found[name], found["model.embed_tokens.weight"]) for name in tied):
        what = f"{tied[0]} is not the embedding, and tie_word_embeddings=true"
        raise RunError(f"{found[tied[0]].file}: {what}")
    pieces: dict[str, list[Place]] = {}
    for place in at.values():
        pieces.setdefault(place.ours, []).append(place)
    empty = empty_parent(model).state_dict()
    about = {
        name: (_widest(found[p.theirs].dtype for p in pieces[name]), tuple(value.shape))
        for name, value in empty.items()
        if not name.startswith(FRESH_MODULES)
    }
    filled = ((name, _filled(shape, pieces[name], found)) for name, shape in about.items())
    write_file(out / CONVERTED, about, filled, {"from": folder.name})
    shutil.copyfile(folder / CONFIG, out / CONFIG)
    copy_tokens(folder, out)
    return _made([out / CONVERTED], _numbers(found[name].shape for name in at), about)


def _filled(about: Shape, pieces: list[Place], found: Mapping[str, Stored]) -> Tensor:
    """One parameter of ours from its tensors."""
    dtype, shape = about
    whole = torch.empty(shape, dtype=DTYPES[dtype])
    by_name = {piece.theirs: piece for piece in pieces}
    for name, tensor in read((name, found[name]) for name in by_name):
        view = by_name[name].view(whole)
        view.copy_(tensor.view(view.shape))
    return whole


def _widest(types: Iterator[str]) -> str:
    """The type that holds them all: float32, where they differ."""
    given = set(types)
    return given.pop() if len(given) == 1 else "F32"


def _same(one: Stored, other: Stored, block: int = 2**24) -> bool:
    """Whether two tensors have the same bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.file.open("rb") as left, other.file.open("rb") as right:
        left.seek(one.start)
        right.seek(other.start)
        sizes = [min(block, one.end - at) for at in range(one.start, one.end, block)]
        return all(left.read(size) == right.read(size) for size in sizes)


def to_checkpoint(folder: Path, out: Path, limit: int) -> Made:
    """What `to_parent` wrote -> the checkpoint that it was made of, experts one by one, in shards of `limit` bytes.

    Raises:
        ConfigError: no such folder. RunError: no `parent.safetensors` in it.
    """
    source, model = pretrained(folder), model_of_file(folder)
    if not (folder / CONVERTED).is_file():
        raise RunError(f"{folder}: no {CONVERTED}; to=hf takes a folder that to=parent wrote")
    found, grouped = header(folder / CONVERTED), dict[str, list[Place]]()
    for place in places(source.family, model):
        if place.ours not in found:
            raise RunError(f"{folder / CONVERTED}: no parameter {place.ours!r}; convert the checkpoint again")
        grouped.setdefault(place.ours, []).append(place)
    listed = [place for group in grouped.values() for place in group]
    about = {place.theirs: (found[place.ours].dtype, place.shape) for place in listed}
    files = write_shards(out, about, _taken(listed, found), limit)
    shutil.copyfile(folder / CONFIG, out / CONFIG)
    copy_tokens(folder, out)
    return _made(files, _numbers(one.shape for one in found.values()), about)


def _taken(listed: list[Place], found: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """Their tensors out of ours, each of which is read once: `listed` has its tensors next to each other."""
    name, whole = "", torch.empty(0)
    for place in listed:
        if place.ours != name:
            whole = torch.empty(0)  # let go of the last one first
            name, whole = next(read([(place.ours, found[place.ours])]))
        yield place.theirs, place.view(whole).reshape(place.shape)


def to_experts(
    folder: Path, out: Path, experts: int, top_k: int, family: str | None, seed: int, limit: int
) -> tuple[Made, str]:
    """A dense checkpoint -> one of a mixture of experts that computes the same (see `upcycle`), and its architecture.

    Raises:
        ConfigError: see `upcycle.recipe`. RunError: files that cannot be read.
    """
    path = folder / CONFIG
    given = read_json(path)
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: no such file, or not JSON; must be the folder of a Hugging Face checkpoint")
    made, found = recipe(given, path, experts, top_k, family, seed), stored(folder)
    about = shapes(found, made)
    files = write_shards(out, about, tensors(found, made), limit)
    write_config(out, dict(made.config), next(iter(about.values()))[0])
    copy_tokens(folder, out)
    return _made(files, _numbers(one.shape for one in found.values()), about), made.family.architecture


def copy_tokens(folder: Path, out: Path) -> list[str]:
    """The files of a model's tokens; returns their names."""
    for file in own_files(folder):
        shutil.copyfile(file, out / file.name)
    return [file.name for file in own_files(folder)]


def _numbers(shapes: Iterator[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _made(files: list[Path], before: int, about: Mapping[str, Shape]) -> Made:
    sizes = [DTYPES[dtype].itemsize * math.prod(shape) for dtype, shape in about.values()]
    return {
        "files": {file.name: file.stat().st_size for file in files},
        "largest_tensor": max(sizes),
        "parameters": {"before": before, "after": _numbers(shape for _, shape in about.values())},
        "types": sorted({dtype for dtype, _ in about.values()}),
    }

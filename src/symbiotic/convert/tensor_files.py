"""Safetensors files as they are on the disk: where each tensor lies, read and written one at a time.

Nothing is mapped into memory: what was read and let go of is gone, so a conversion needs the memory of what it fills
and of the largest single tensor. Format: https://github.com/huggingface/safetensors (an 8-byte length, a JSON header
with type, shape and offsets of every tensor, then the bytes).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from symbiotic.files import commit, write_json
from symbiotic.schema import RunError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Shape = tuple[str, tuple[int, ...]]
"""Type (a key of `DTYPES`) and shape of a tensor."""


class Stored(NamedTuple):
    """One tensor in a file: its bytes lie from `start` to `end`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def stored(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint in one file or in shards.

    Raises:
        RunError: no such files, a shard that the index names and that is not there, or one that is cut off.
    """
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file():
            raise RunError(f"{folder}: neither {SINGLE} nor {INDEX}; only safetensors are read")
        return header(folder / SINGLE)
    try:
        placed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(placed.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{folder / INDEX}: not an index of shards ({error!r})") from None
    found: dict[str, Stored] = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise RunError(f"{folder / INDEX}: {shard}: must be a file beside it")
        if not (folder / shard).is_file():
            raise RunError(f"{folder}: no {shard}, which {INDEX} names")
        found |= header(folder / shard)
    for name, shard in placed.items():
        if name not in found or found[name].file.name != shard:
            raise RunError(f"{folder / shard}: no tensor {name!r}, which {INDEX} says is there")
    return found


def header(path: Path) -> dict[str, Stored]:
    """The tensors of one file. Raises RunError: it is none, or shorter than its header says."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        found = {
            name: Stored(path, e["dtype"], tuple(e["shape"]), *(8 + length + at for at in e["data_offsets"]))
            for name, e in entries.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: not a safetensors file ({error})") from None
    end = max((one.end for one in found.values()), default=0)
    if end > size:
        raise RunError(f"{path}: {size} bytes, its header says {end}: it is cut off")
    return found


def read(wanted: Iterable[tuple[str, Stored]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors one after the other, in the order of the disk; each is only good until the next one.

    Raises:
        RunError: a type that is not a plain float, or a file that ends too early.
    """
    for name, at in sorted(wanted, key=lambda one: (one[1].file, one[1].start)):
        if at.dtype not in DTYPES:
            right = f"must be one of {', '.join(DTYPES)} (quantised checkpoints are not read)"
            raise RunError(f"{at.file}: {name} is {at.dtype}: {right}")
        buffer = bytearray(at.end - at.start)
        with at.file.open("rb", buffering=0) as file:
            file.seek(at.start)
            view, got = memoryview(buffer), 0
            while got < len(buffer) and (more := file.readinto(view[got:])):
                got += more
        if got < len(buffer):
            raise RunError(f"{at.file}: {name}: the file ends too early")
        yield name, torch.frombuffer(buffer, dtype=DTYPES[at.dtype]).view(at.shape)


def shards_of(sizes: Iterable[tuple[str, int]], limit: int) -> list[list[str]]:
    """Names in order, cut so that no shard has more than `limit` bytes (but for a tensor that alone has more)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes:
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_file(
    path: Path, about: Mapping[str, Shape], tensors: Iterable[tuple[str, Tensor]], manifest: Mapping[str, Any] | None
) -> Path:
    """One file, its tensors written as they come: of them no second one is in memory.

    about: type and shape of each, in the order in which they come. manifest: see `files.commit`.

    Raises:
        RunError: other tensors come than were announced. OSError: see `files.commit`.
    """
    sizes = [DTYPES[dtype].itemsize * math.prod(shape) for dtype, shape in about.values()]
    ends = list(itertools.accumulate(sizes, initial=0))
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for (name, (dtype, shape)), start, end in zip(about.items(), ends, ends[1:], strict=False):
        head[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for (name, (dtype, shape)), (came, tensor) in zip(about.items(), tensors, strict=True):
                if (came, dtype, tuple(shape)) != (name, dtype_name(tensor), tuple(tensor.shape)):
                    what = f"{came} {dtype_name(tensor)} {list(tensor.shape)} in the place of {name} {dtype}"
                    raise RunError(f"{path}: {what} {list(shape)}")
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    return commit(path, write, need=ends[-1], manifest=manifest)


def dtype_name(tensor: Tensor) -> str:
    """Raises RunError: a type that is not a plain float."""
    for name, dtype in DTYPES.items():
        if tensor.dtype == dtype:
            return name
    raise RunError(f"a tensor of {tensor.dtype}: must be one of {', '.join(DTYPES)}")


def write_shards(
    folder: Path, about: Mapping[str, Shape], tensors: Iterable[tuple[str, Tensor]], limit: int
) -> list[Path]:
    """One file, or shards of at most `limit` bytes and their index, written as the tensors come.

    about: type and shape of each, in the order in which they come.

    Raises:
        RunError: see `write_file`.
    """
    sizes = {name: DTYPES[dtype].itemsize * math.prod(shape) for name, (dtype, shape) in about.items()}
    names, coming = shards_of(sizes.items(), limit), iter(tensors)
    count = len(names)
    files = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for file, shard in zip(files, names, strict=True):
        part = {name: about[name] for name in shard}
        write_file(folder / file, part, itertools.islice(coming, len(part)), None)
    if count > 1:
        placed = {name: file for file, shard in zip(files, names, strict=True) for name in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": placed})
    return [folder / file for file in files]

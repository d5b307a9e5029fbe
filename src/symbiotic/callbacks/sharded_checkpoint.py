"""Checkpoints of sharded parameters: a folder, of which every rank writes its part, whole or absent as files are.

torch's distributed checkpoint (DCP) with safetensors as its format: the parts name their places in the whole, so that
any number of ranks, or one process, reads them. DCP's own format has an index that is unpickled; nothing here is. What
is no sharded tensor (counters, states of callbacks, buffers) lies in `rest.pt`, written by rank 0.

In a checkpoint each sharded tensor belongs to a parameter, of whose shape and placement it is: the last part of its
key is the parameter's name.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from symbiotic.files import commit_folder, described, writing
from symbiotic.training.finite import lost_values

T = TypeVar("T")
REST = "rest.pt"
_MARK = "sharded tensor "
_NOISE = "torch.distributed is disabled, unavailable or uninitialized"  # one process reads alone


def take_out(value: Any, key: str = "") -> tuple[Any, dict[str, Tensor]]:
    """A nested container without its sharded tensors, marks in their places; and those by the keys in the marks."""
    if isinstance(value, DTensor):
        return f"{_MARK}{key}", {key: value}
    if not isinstance(value, Mapping | list | tuple):
        return value, {}
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
    parts = {name: take_out(child, f"{key}/{name}" if key else str(name)) for name, child in pairs}
    tensors = {name: tensor for _, found in parts.values() for name, tensor in found.items()}
    if isinstance(value, Mapping):
        return {name: rest for name, (rest, _) in parts.items()}, tensors
    return type(value)(rest for rest, _ in parts.values()), tensors


def put_back(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `take_out`."""
    if isinstance(value, str) and value.startswith(_MARK):
        return tensors[value.removeprefix(_MARK)]
    if isinstance(value, Mapping):
        return {name: put_back(child, tensors) for name, child in value.items()}
    return type(value)(put_back(child, tensors) for child in value) if isinstance(value, list | tuple) else value


def save(checkpoint: Mapping[str, Any], path: Path, about: Mapping[str, Any]) -> None:
    """Every rank writes its part into a folder beside `path`; rank 0 renames it, and writes the manifest last.
    Collective.

    Raises:
        OSError: some rank could not write, or holds a weight or a moment that is not finite; on all of them, and what
            there was before is as it was.
    """
    rest, tensors = take_out(checkpoint)
    first = dist.get_rank() == 0
    temporary = Path(_together(lambda: str(writing(path)))[0])
    part = f"shard-{dist.get_rank() + 1:05d}-"  # how DCP names what this rank writes

    def begin() -> None:
        if lost := lost_values(checkpoint):
            raise OSError(f"{lost} is not finite")
        path.parent.mkdir(parents=True, exist_ok=True)
        need = sum(tensor.to_local().nbytes for tensor in tensors.values() if isinstance(tensor, DTensor))
        have = shutil.disk_usage(path.parent).free
        if have < need:
            raise OSError(f"need {need / 2**20:.0f} MB, have {have / 2**20:.0f} MB")
        if first:
            temporary.mkdir()
            torch.save(rest, temporary / REST)

    def mine() -> dict[str, dict[str, Any]]:
        return described(f for f in temporary.iterdir() if f.name.startswith(part) or (first and f.name == REST))

    try:
        _together(begin)
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        _together(lambda: dcp.save(dict(tensors), storage_writer=writer) and None)
        files = {name: facts for found in _together(mine) for name, facts in found.items()}
        _together(lambda: commit_folder(temporary, path, {**about, "files": files}) if first else None)
    except OSError:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _together(act: Callable[[], T]) -> list[T]:
    """What `act` gives on every rank. Raises OSError on all of them where it fails on any."""
    made, reason = None, None
    try:
        made = act()
    except dcp.CheckpointException as error:
        reason = next((str(failure[0]) for failure in error.failures.values()), "") or str(error)
    except (OSError, RuntimeError) as error:
        reason = str(error)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (made, reason))
    reasons = [text for _, text in everyone if text is not None]
    if reasons:
        raise OSError((reasons[0].splitlines() or ["no reason given"])[0])
    return [value for value, _ in everyone]


def load(path: Path, like: Callable[[str], Tensor | None] | None = None) -> dict[str, Any]:
    """What `save` was given.

    like: parameter name -> the sharded parameter whose placement a tensor gets; collective. None: whole tensors, by one
    process alone.

    Raises:
        KeyError, RuntimeError: the tensors are not those of the parameters.
    """
    rest = torch.load(path / REST, map_location="cpu", weights_only=True)
    known: dict[str, Any] = dict(HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata)
    tensors = {key: _room(key, about, like) for key, about in known.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_NOISE)
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=like is None)
    return put_back(rest, tensors)


def _room(key: str, about: Any, like: Callable[[str], Tensor | None] | None) -> Tensor:
    if like is None:
        return torch.empty(about.size, dtype=about.properties.dtype)
    parameter = like(key.rpartition("/")[2])
    if parameter is None or parameter.shape != about.size:
        raise KeyError(f"{key} {list(about.size)}: no parameter of that name and shape")
    return torch.empty_like(parameter.detach(), dtype=about.properties.dtype)

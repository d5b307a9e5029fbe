"""Pretrained Hugging Face mixture-of-experts checkpoints as parents, and parents as such checkpoints.

`places` is the one table for both ways: each of their tensors is a view of one of our parameters, so reading copies
into the view, writing copies it out, and a round trip keeps every bit.
Suffixes: D width, F hidden units, E experts, H heads, h head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from symbiotic.convert.families import CONFIG, Family, config_of, pretrained
from symbiotic.convert.split import LATENT_MODULES
from symbiotic.convert.tensor_files import DTYPES, Stored, dtype_name, header, read, stored, write_shards
from symbiotic.files import write_json
from symbiotic.layout import parent_system
from symbiotic.models.transformer import initial
from symbiotic.models.unified import UnifiedModel, vision_tower
from symbiotic.schema import PARENT, Model, RunError, System

FRESH_MODULES = ("vit_in.", "vit_grid.", "vision.")
"""Name prefixes of what a parent has and a language model has not: they start fresh."""

CONVERTED = "parent.safetensors"
"""File of a folder that `src/convert_hf.py` wrote: our names and layout, in the place of theirs."""

SHARD_BYTES = 5 * 2**30
STACKED = "mlp.experts.gate_up_proj"


class Place(NamedTuple):
    """Where one of their tensors lies. view: our parameter -> that part of it, equal to theirs up to a reshape."""

    theirs: str
    ours: str
    shape: tuple[int, ...]
    view: Callable[[Tensor], Tensor]


def _whole(w: Tensor) -> Tensor:
    return w


def places(family: Family, model: Model, stacked: Collection[int] = ()) -> Iterator[Place]:
    """Every tensor of a family's checkpoint.

    stacked: layers whose experts are `mlp.experts.gate_up_proj` [E, 2F, D] and `down_proj` [E, D, F], as transformers 5
    holds them in memory, in the place of one `gate_proj`, `up_proj` [F, D] and `down_proj` [D, F] for each expert.
    """
    table = (model.vocab_size, model.width)
    yield Place("model.embed_tokens.weight", "embed.weight", table, _whole)
    for layer in range(model.num_layers):
        theirs, ours = f"model.layers.{layer}.", f"blocks.{layer}."
        yield from _attention(family, model, theirs, ours)
        norm = f"{ours}moe_norm.{PARENT}.weight"
        yield Place(f"{theirs}post_attention_layernorm.weight", norm, (model.width,), _whole)
        if layer in model.dense_layers:
            yield from _ffn(f"{theirs}mlp.", f"{ours}moe.shared.dense.", model.width, model.dense_hidden)
        else:
            yield from _experts(family, model, f"{theirs}mlp.", f"{ours}moe.", layer in stacked)
    yield Place("model.norm.weight", f"norm.{PARENT}.weight", (model.width,), _whole)
    if not model.tied_head:
        yield Place("lm_head.weight", "text_head.weight", table, _whole)


def _attention(family: Family, model: Model, theirs: str, ours: str) -> Iterator[Place]:
    cfg, width = model.attention, model.width
    head, ours = f"{theirs}self_attn.", f"{ours}attention.{PARENT}."
    yield Place(f"{theirs}input_layernorm.weight", f"{ours}norm.weight", (width,), _whole)
    for side, heads in (("q", cfg.num_heads), ("k", cfg.num_kv_heads), ("v", cfg.num_kv_heads)):
        view = _halves_to_pairs(heads) if family.interleaved and side != "v" else _whole
        size = heads * cfg.head_dim
        yield Place(f"{head}{side}_proj.weight", f"{ours}{side}.weight", (size, width), view)
        if cfg.qkv_bias:
            yield Place(f"{head}{side}_proj.bias", f"{ours}{side}.bias", (size,), view)
        if cfg.qk_norm != "none" and side != "v":
            normed = size if cfg.qk_norm == "full" else cfg.head_dim
            yield Place(f"{head}{side}_norm.weight", f"{ours}{side}_norm.weight", (normed,), _whole)
    yield Place(f"{head}o_proj.weight", f"{ours}o.weight", (width, cfg.num_heads * cfg.head_dim), _whole)


def _halves_to_pairs(heads: int) -> Callable[[Tensor], Tensor]:
    """[H * h, …] with rotary pairs (i, i + h/2) -> [H, h/2, 2, …], which flattened has the pairs (2i, 2i + 1).

    Queries and keys are reordered alike, so their products stay.
    """
    return lambda w: w.unflatten(0, (heads, 2, -1)).transpose(1, 2)


def _ffn(theirs: str, ours: str, width: int, hidden: int, expert: int | None = None) -> Iterator[Place]:
    """A SwiGLU FFN, or one expert of a stack."""

    def part(cut: slice) -> Callable[[Tensor], Tensor]:
        return lambda w: (w if expert is None else w[expert])[..., cut].mT

    yield Place(f"{theirs}gate_proj.weight", f"{ours}w_in", (hidden, width), part(slice(None, hidden)))
    yield Place(f"{theirs}up_proj.weight", f"{ours}w_in", (hidden, width), part(slice(hidden, None)))
    yield Place(f"{theirs}down_proj.weight", f"{ours}w_out", (width, hidden), part(slice(None)))


def _experts(family: Family, model: Model, theirs: str, ours: str, stacked: bool) -> Iterator[Place]:
    width, hidden, count = model.width, model.expert_hidden, model.num_experts
    pool = f"{ours}pools.{PARENT}."
    yield Place(f"{theirs}gate.weight", f"{ours}routers.{PARENT}", (count, width), lambda w: w.mT)
    if family.bias:
        shape = (1, count) if family.bias_rows else (count,)
        yield Place(f"{theirs}{family.bias}", f"{ours}bias", shape, _whole)
    if stacked:
        yield Place(f"{theirs}experts.gate_up_proj", f"{pool}w_in", (count, 2 * hidden, width), lambda w: w.mT)
        yield Place(f"{theirs}experts.down_proj", f"{pool}w_out", (count, width, hidden), lambda w: w.mT)
    for expert in () if stacked else range(count):
        yield from _ffn(f"{theirs}experts.{expert}.", pool, width, hidden, expert)
    if family.shared and model.shared_hidden:
        yield from _ffn(f"{theirs}{family.shared}.", f"{ours}shared.{PARENT}.", width, model.shared_hidden)
        if model.gated_shared:
            gate = f"{theirs}{family.shared}_gate.weight"
            yield Place(gate, f"{ours}shared.{PARENT}.gate", (1, width), lambda w: w.mT)


# --------------------------------------------------------------------------- in


def parent_layout(model: Model) -> System:
    """The system of a pretrained model: one pool, and a shared expert where it has one."""
    whole = System(name=PARENT, pools={PARENT: 1.0})
    return parent_system(whole, shared=bool(model.shared_hidden))


def empty_parent(model: Model) -> UnifiedModel:
    """A parent without memory: names and shapes only."""
    with torch.device("meta"):
        return UnifiedModel(model, parent_layout(model), latents=False)


def read_parent(folder: str | Path, model: Model, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The parent's state: filled from the files tensor by tensor, what a language model lacks fresh from (seed, name).

    Raises:
        ConfigError: see `families.pretrained`. RunError: a tensor that is missing, not known, or of another shape.
    """
    source = pretrained(folder)
    state: dict[str, Tensor] = {}
    for name, empty in empty_parent(model).state_dict().items():
        state[name] = torch.empty(empty.shape, dtype=dtype)
        if name.startswith(FRESH_MODULES) and not name.startswith("vision."):
            state[name] = initial(name, state[name], seed, model.init_std, model.num_layers)
    if (tower := vision_tower(model)) is not None:
        tower.load()
        state |= {f"vision.{name}": tensor for name, tensor in tower.state_dict().items()}
    if (source.folder / CONVERTED).is_file():
        return _read_converted(source.folder / CONVERTED, state)
    found = stored(source.folder)
    at = placed(found, source.family, model)
    tied = check_names(found, at, source.family, model, source.folder)
    for name, tensor in read((name, found[name]) for name in at):
        view = at[name].view(state[at[name].ours])
        view.copy_(tensor.view(view.shape))
    for name, tensor in read((name, found[name]) for name in tied):
        if not torch.equal(tensor.to(dtype), state["embed.weight"]):
            what = f"{name} is not the embedding, and tie_word_embeddings=true"
            raise RunError(f"{found[name].file}: {what}")
    return state


def _read_converted(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fills it from what `convert.disk.to_parent` wrote. Raises RunError: tensors of another model."""
    found = header(path)
    wanted = {name: value for name, value in state.items() if not name.startswith(FRESH_MODULES)}
    for name in [*wanted, *found]:
        if name not in wanted or name not in found or found[name].shape != wanted[name].shape:
            raise RunError(f"{path}: {name} is not that of {path.parent / CONFIG}; convert the checkpoint again")
    for name, tensor in read(found.items()):
        state[name].copy_(tensor)
    return state


def placed(found: Mapping[str, Stored], family: Family, model: Model) -> dict[str, Place]:
    """Their name -> place, of the tensors that it must have: experts one by one, or stacked, as it has them."""
    stacked = [i for i in range(model.num_layers) if f"model.layers.{i}.{STACKED}" in found]
    return {place.theirs: place for place in places(family, model, stacked)}


def swap_rows(state: dict[str, Tensor], swaps: Iterable[tuple[int, int]]) -> dict[str, Tensor]:
    """The state with the rows of embedding and head changed: row `ours` is the one that was at `theirs` before."""
    pairs = list(swaps)
    ours, theirs = [own for own, _ in pairs], [row for _, row in pairs]
    changed: dict[str, Tensor] = {}
    for name in ("embed.weight", "text_head.weight"):
        if name in state and pairs:
            changed[name] = state[name].clone()
            changed[name][ours] = state[name][theirs]
    return {**state, **changed}


def check_names(
    found: Mapping[str, Stored], at: Mapping[str, Place], family: Family, model: Model, folder: Path
) -> list[str]:
    """Raises RunError unless the tensors are those of `at`; returns copies of the embedding, which may be there too."""
    for name, place in at.items():
        if name not in found:
            raise RunError(f"{folder}: no tensor {name!r}; {family.architecture} has it")
        if found[name].shape != place.shape:
            sizes = f"{list(found[name].shape)}, config.json says {list(place.shape)}"
            raise RunError(f"{found[name].file}: {name} is {sizes}")
    tied = ["lm_head.weight"] if model.tied_head and "lm_head.weight" in found else []
    for name in found:
        if name not in at and name not in tied and not name.startswith(family.left_out):
            raise RunError(f"{found[name].file}: {name}: no tensor of {family.architecture} with this config.json")
    return tied


def origin(folder: str | Path) -> dict[str, Any]:
    """A plain dictionary for the run folder: the family, `config.json` as it is, the files and their sizes, tensors
    that the family's own class does not load either, and what starts fresh."""
    source = pretrained(folder)
    converted = source.folder / CONVERTED
    found = header(converted) if converted.is_file() else stored(source.folder)
    return {
        "folder": str(source.folder),
        "architecture": source.family.architecture,
        "config": dict(source.given),
        "files": {file.name: file.stat().st_size for file in sorted({one.file for one in found.values()})},
        "left_out": [name for name in found if name.startswith(source.family.left_out)],
        "fresh": [*FRESH_MODULES, *LATENT_MODULES],
    }


# --------------------------------------------------------------------------- out


def write_checkpoint(
    folder: Path,
    state: Mapping[str, Tensor],
    model: Model,
    family: Family,
    source: Mapping[str, Any] | None = None,
    limit: int = SHARD_BYTES,
) -> list[Path]:
    """`config.json` and safetensors of a parent's state, as the family's class loads them; returns the tensor files.

    source: the `config.json` that the model came with, whose other keys stay. limit: bytes of a shard.

    Raises:
        ConfigError: the family cannot be this model. OSError: see `files.commit`.
    """
    config = config_of(family, model, source)
    about = {p.theirs: (dtype_name(state[p.ours]), p.shape) for p in places(family, model)}
    theirs = ((p.theirs, p.view(state[p.ours]).reshape(p.shape)) for p in places(family, model))
    files = write_shards(folder, about, theirs, limit)
    write_config(folder, config, next(iter(about.values()))[0])
    return files


def write_config(folder: Path, config: dict[str, Any], dtype: str) -> None:
    """`config.json`, which says the type of the tensors, a key of `DTYPES`."""
    name = str(DTYPES[dtype]).removeprefix("torch.")
    write_json(folder / CONFIG, {**config, "torch_dtype" if "torch_dtype" in config else "dtype": name})

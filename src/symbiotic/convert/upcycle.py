"""Dense -> mixture of experts: every expert starts as a copy of the layer's FFN (sparse upcycling, arXiv 2212.05055).

The gates of the chosen k sum to one, so copies compute what the FFN did, whatever a fresh router chooses. Where the
family has a shared expert that is always on, it is a copy as well, and each side adds half: the down-projections are
halved (ours), but for a gated shared expert, whose gate of zero weights is sigmoid(0) = 1/2 already.
Dense families and their tensor names are those of transformers 5.23; the result is a checkpoint of a family of
`convert.families`, so `init_from` takes it. Suffixes: E experts, D width, F hidden units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from symbiotic.convert.families import COMMON, CONFIG, FAMILIES, HONOURED, SILENT, Family, fields
from symbiotic.convert.tensor_files import DTYPES, Shape, Stored, read
from symbiotic.models.transformer import initial
from symbiotic.schema import ConfigError, near_miss

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
INTO = {"qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "dots1": "Dots1ForCausalLM"}


@dataclass(frozen=True)
class Dense:
    """A dense family. into: the families that its models can become, the first by default. keys: what the written
    config has beside the common keys. silent: keys of its own without a part in the forward pass."""

    model_type: str
    into: tuple[str, ...]
    keys: Mapping[str, Any]
    silent: frozenset[str] = frozenset({"pretraining_tp"})


DENSE = {
    "LlamaForCausalLM": Dense("llama", ("qwen2_moe",), {"qkv_bias": False}),
    "MistralForCausalLM": Dense("mistral", ("qwen2_moe",), {"qkv_bias": False}),
    "Qwen2ForCausalLM": Dense("qwen2", ("qwen2_moe",), {"qkv_bias": True}),
    "Qwen3ForCausalLM": Dense("qwen3", ("qwen3_moe", "dots1"), {}),
}


@dataclass(frozen=True)
class Recipe:
    """experts: copies a layer. top_k: of which a token uses so many. seed: of the routers."""

    family: Family
    config: Mapping[str, Any]
    experts: int
    seed: int
    init_std: float

    @property
    def shared(self) -> bool:
        """Whether a shared expert is always on, so that each side adds half."""
        return self.family.shared is not None


def recipe(
    given: Mapping[str, Any], path: Path, experts: int, top_k: int, family: str | None = None, seed: int = 0
) -> Recipe:
    """
    Args:
        given: `config.json` of the dense model, of the file `path`. experts, top_k: see `Recipe`. family: what it
            becomes, by its model_type.

    Raises:
        ConfigError: a dense family that is not in `DENSE`, something that the backbone cannot do, or wrong numbers.
    """
    name = str((given.get("architectures") or [given.get("model_type")])[0])
    if name not in DENSE:
        raise ConfigError(f"{path}: architectures={name}: no dense family known here; {near_miss(name, DENSE)}")
    dense = DENSE[name]
    if family is not None and family not in dense.into:
        raise ConfigError(f"family={family}: {name} can become {' or '.join(dense.into)}")
    if not 1 <= top_k <= experts:
        raise ConfigError(f"top_k={top_k}: must lie between 1 and experts={experts}")
    target = FAMILIES[INTO[family or dense.into[0]]]
    config = _config(given, path, dense, target, experts, top_k)
    found = fields(config, target, Path(CONFIG))
    return Recipe(target, config, experts, seed, float(found["init_std"]))


def _config(
    given: Mapping[str, Any], path: Path, dense: Dense, target: Family, experts: int, top_k: int
) -> dict[str, Any]:
    """That of the upcycled model: the dense model's own keys, experts as wide as its FFN, gates that sum to one."""
    known = {*COMMON.values(), *HONOURED, *SILENT, *dense.silent, *dense.keys, "rope_parameters", "mlp_bias"}
    for key, value in given.items():
        if key not in known and value is not None:
            raise ConfigError(f"{path}: {key}={value}: no key of {dense.model_type} that is known here")
    if given.get("mlp_bias"):
        raise ConfigError(f"{path}: mlp_bias=true: this backbone cannot do that; must be false")
    hidden, layers = given.get("intermediate_size"), given.get("num_hidden_layers")
    if not isinstance(hidden, int) or not isinstance(layers, int):
        raise ConfigError(f"{path}: intermediate_size={hidden}, num_hidden_layers={layers}: both must be whole numbers")
    config = {k: v for k, v in given.items() if k not in dense.silent and k != "mlp_bias"} | dict(dense.keys)
    config |= {"architectures": [target.architecture], "model_type": target.model_type}
    config |= {"moe_intermediate_size": hidden, "num_experts_per_tok": top_k, "norm_topk_prob": True}
    config |= {"tie_word_embeddings": bool(given.get("tie_word_embeddings", False))}
    if target.shared_count:
        config |= {target.shared_count: 1, "n_routed_experts": experts, "first_k_dense_replace": 0}
        return config | {"routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1}
    shared = {"shared_expert_intermediate_size": hidden} if target.shared else {}
    return config | {"num_experts": experts, "decoder_sparse_step": 1, "mlp_only_layers": []} | shared


def shapes(found: Mapping[str, Stored], made: Recipe) -> dict[str, Shape]:
    """Every tensor of the upcycled model -> its type and shape, those that come from one tensor next to each other."""
    return {name: (dtype, shape) for _, name, dtype, shape, _ in _plan(found, made)}


def _plan(found: Mapping[str, Stored], made: Recipe) -> Iterator[tuple[str | None, str, str, tuple[int, ...], float]]:
    """(source or None, target, type, shape, factor) of every tensor, in the order in which they are written."""
    half = 0.5 if made.shared else 1.0
    for name in sorted(found, key=lambda n: (found[n].file, found[n].start)):
        at, (head, mlp, leaf) = found[name], name.partition(".mlp.")
        if not mlp or leaf.split(".")[0] not in PROJECTIONS:
            yield name, name, at.dtype, at.shape, 1.0
            continue
        factor = half if leaf.startswith("down_proj") else 1.0
        for expert in range(made.experts):
            yield name, f"{head}.mlp.experts.{expert}.{leaf}", at.dtype, at.shape, factor
        if made.shared:  # a gated one is halved by its gate
            whole = factor if made.family.shared_count else 1.0
            yield name, f"{head}.mlp.{made.family.shared}.{leaf}", at.dtype, at.shape, whole
        if leaf.startswith("gate_proj"):
            width = at.shape[1]
            yield None, f"{head}.mlp.gate.weight", at.dtype, (made.experts, width), 1.0
            if made.family.bias:
                yield None, f"{head}.mlp.{made.family.bias}", "F32", (made.experts,), 0.0
            if made.shared and not made.family.shared_count:
                yield None, f"{head}.mlp.{made.family.shared}_gate.weight", at.dtype, (1, width), 0.0


def tensors(found: Mapping[str, Stored], made: Recipe) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `shapes` in its order; one of the source is in memory at a time."""
    last: tuple[str, Tensor] | None = None
    for source, name, dtype, shape, factor in _plan(found, made):
        if source is None:
            yield name, _fresh(name, torch.empty(shape), made, factor).to(DTYPES[dtype])
            continue
        if last is None or last[0] != source:
            last = None  # let go of it before the next one is read
            last = next(read([(source, found[source])]))
        yield name, last[1] if factor == 1 else last[1] * factor


def _fresh(name: str, empty: Tensor, made: Recipe, factor: float) -> Tensor:
    """A router, drawn from (seed, name), or zeros."""
    return initial(name, empty, made.seed, made.init_std, 1) if factor else torch.zeros_like(empty)

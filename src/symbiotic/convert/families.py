"""Families of pretrained mixture-of-experts models that the backbone can be: names and dials as data.

Standard library only: `config.json` is read before torch is imported. A family is a row; what a row needs is which key
of its file a field of `Model` has, what the family always does, and what its files are called inside. The key names,
defaults and tensor names are those of transformers 5.23 (`models/<model_type>/configuration_*.py` and `modeling_*.py`);
tests marked `peer` hold them against the installed version.

A key of `config.json` is used, or has no part in the forward pass (`SILENT`), or is refused by name.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from symbiotic.schema import ConfigError, Model, near_miss, parse

CONFIG = "config.json"

COMMON = {
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "tied_head": "tie_word_embeddings",
    "init_std": "initializer_range",
    "attention.num_heads": "num_attention_heads",
    "attention.num_kv_heads": "num_key_value_heads",
    "attention.head_dim": "head_dim",
    "attention.rope_theta": "rope_theta",
}
"""Field of `Model` -> key of `config.json`, in every family."""

OURS = ("gen_fraction", "patch_dim", "vit_dim", "max_grid", "init_std")
"""Fields of `Model` that no file decides. (Its `init_std` is only the default for what starts fresh.)"""

HONOURED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "use_bias": (False,),
    "attention_dropout": (0, None),
    "clip_qkv": (None,),
    "rope_scaling": (None,),
    "rope_type": ("default",),
    "partial_rotary_factor": (1,),
    "use_sliding_window": (False,),
    "n_group": (1, None),
    "topk_group": (1, None),
    "quantization_config": (None,),
    "num_nextn_predict_layers": (0, None),
}
"""Key -> the values that the backbone can do."""

_SILENT = """
    architectures model_type transformers_version _name_or_path auto_map dtype torch_dtype use_cache
    bos_token_id eos_token_id pad_token_id max_position_embeddings output_router_logits router_aux_loss_coef
    sliding_window max_window_layers layer_types intermediate_size moe_norm_min
"""
SILENT = frozenset(_SILENT.split())
"""Keys without a part in the forward pass, or read by a rule of their own."""

LATENT_ATTENTION = ("kv_lora_rank", "q_lora_rank")
"""Keys of multi-head latent attention (DeepSeek-V2 and -V3, and what follows them)."""


@dataclass(frozen=True)
class Family:
    """One row.

    keys: field of `Model` -> key, beside `COMMON`. dials: fields that the family fixes. defaults: what its
    configuration class takes for keys that a file may leave out. aliases: other name of a key -> its name.
    shared_count: key of the number of shared experts, each as wide as a routed one. dense: key that says which layers
    have one FFN (of `intermediate_size`) in the place of experts. shared, bias: names below `mlp.`, of the shared
    expert and of the selection bias [E] (ERNIE: [1, E]). interleaved: rotary pairs are (2i, 2i + 1), ours (i, i + h/2).
    left_out: beginnings of names of tensors that the family's own class does not load either.
    """

    architecture: str
    model_type: str
    keys: Mapping[str, str]
    dials: Mapping[str, Any]
    defaults: Mapping[str, Any]
    aliases: Mapping[str, str] = field(default_factory=dict)
    shared_count: str | None = None
    dense: str | None = None
    shared: str | None = None
    bias: str | None = None
    bias_rows: bool = False
    interleaved: bool = False
    left_out: tuple[str, ...] = ()


_QWEN_KEYS = {
    "num_experts": "num_experts",
    "expert_hidden": "moe_intermediate_size",
    "router.top_k": "num_experts_per_tok",
    "router.normalize": "norm_topk_prob",
}
_QWEN_DEFAULTS = {"tie_word_embeddings": False, "norm_topk_prob": False, "decoder_sparse_step": 1}

FAMILIES = {
    row.architecture: row
    for row in (
        Family(
            architecture="OlmoeForCausalLM",
            model_type="olmoe",
            keys=_QWEN_KEYS | {"expert_hidden": "intermediate_size"},
            dials={"attention.qk_norm": "full"},
            defaults={"tie_word_embeddings": False, "norm_topk_prob": False},
            aliases={"num_local_experts": "num_experts"},
        ),
        Family(
            architecture="Qwen2MoeForCausalLM",
            model_type="qwen2_moe",
            keys=_QWEN_KEYS | {"shared_hidden": "shared_expert_intermediate_size", "attention.qkv_bias": "qkv_bias"},
            dials={"attention.qk_norm": "none", "gated_shared": True},
            defaults=_QWEN_DEFAULTS | {"qkv_bias": True},
            dense="mlp_only_layers",
            shared="shared_expert",
        ),
        Family(
            architecture="Qwen3MoeForCausalLM",
            model_type="qwen3_moe",
            keys=_QWEN_KEYS,
            dials={"attention.qk_norm": "head"},
            defaults=_QWEN_DEFAULTS,
            aliases={"num_local_experts": "num_experts"},
            dense="mlp_only_layers",
        ),
        Family(  # the routing of DeepSeek-V3 with plain attention: dots.llm1
            architecture="Dots1ForCausalLM",
            model_type="dots1",
            keys=_QWEN_KEYS | {"num_experts": "n_routed_experts", "router.scale": "routed_scaling_factor"},
            dials={"attention.qk_norm": "head", "router.score": "sigmoid", "router.bias": True},
            defaults={"tie_word_embeddings": False, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
            aliases={"num_local_experts": "n_routed_experts"},
            shared_count="n_shared_experts",
            dense="first_k_dense_replace",
            shared="shared_experts",
            bias="gate.e_score_correction_bias",
        ),
        Family(
            architecture="Ernie4_5_MoeForCausalLM",
            model_type="ernie4_5_moe",
            keys={
                "num_experts": "moe_num_experts",
                "expert_hidden": "moe_intermediate_size",
                "router.top_k": "moe_k",
            },
            dials={"attention.qk_norm": "none", "router.bias": True, "router.normalize": True},
            defaults={"tie_word_embeddings": True, "moe_layer_start_index": 1, "moe_num_shared_experts": 2},
            aliases={"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"},
            shared_count="moe_num_shared_experts",
            dense="moe_layer_start_index",
            shared="shared_experts",
            bias="moe_statics.e_score_correction_bias",
            bias_rows=True,
            interleaved=True,
            left_out=("model.mtp",),
        ),
    )
}

_DENSE_KEYS = ("mlp_only_layers", "decoder_sparse_step", "first_k_dense_replace")
_ERNIE_KEYS = ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval")


@dataclass(frozen=True)
class Pretrained:
    """A folder's `config.json`, understood. fields: dotted field of `Model` -> value; without `OURS`, but `init_std`.

    keys: the same fields -> the key of the file that says it, for messages.
    """

    folder: Path
    family: Family
    given: Mapping[str, Any]
    fields: Mapping[str, Any]

    def key(self, name: str) -> str:
        return {**COMMON, **self.family.keys}.get(name, name)


def pretrained(folder: str | Path) -> Pretrained:
    """What lies in a folder that transformers wrote, or that was downloaded from the hub; read once for each state.

    Raises:
        ConfigError: no such folder or file, a family that is not in `FAMILIES`, or a key that the backbone cannot do.
    """
    path = Path(folder) / CONFIG
    try:
        status = path.stat()
    except OSError:
        what = "no such folder" if not Path(folder).is_dir() else f"no {CONFIG} in it"
        raise ConfigError(f"init.folder={folder}: {what}; must be the folder of a Hugging Face checkpoint") from None
    return _pretrained(str(folder), status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=16)
def _pretrained(folder: str, *state: int) -> Pretrained:
    path = Path(folder) / CONFIG
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: must be a mapping")
    family = family_of(given, path)
    return Pretrained(Path(folder), family, MappingProxyType(given), MappingProxyType(fields(given, family, path)))


def family_of(given: Mapping[str, Any], path: Path) -> Family:
    """Raises ConfigError: none of `FAMILIES`."""
    name = str((given.get("architectures") or [given.get("model_type")])[0])
    latent = next((key for key in LATENT_ATTENTION if given.get(key)), None)
    if latent:
        why = "multi-head latent attention, which this backbone lacks"
        raise ConfigError(f"{path}: architectures={name}: {latent}={given[latent]} is {why}")
    for family in FAMILIES.values():
        if name in (family.architecture, family.model_type):
            return family
    raise ConfigError(f"{path}: architectures={name}: no such family here; {near_miss(name, FAMILIES)}")


def fields(given: Mapping[str, Any], family: Family, path: Path) -> dict[str, Any]:
    """Dotted field of `Model` -> its value in this file.

    Raises:
        ConfigError: a key that the backbone cannot do, one that is not known, or one that is missing.
    """
    config = _plain(given, family, path)
    _check_keys(config, family, path)
    _check_windows(config, family, path)
    found = {name: _value(config, key, path) for name, key in {**COMMON, **family.keys}.items()}
    found |= {"router.score": "softmax", "router.scale": found.get("router.scale", 1.0), "router.bias": False}
    found |= {"attention.qkv_bias": found.get("attention.qkv_bias", False), "gated_shared": False}
    found |= {"shared_hidden": found.get("shared_hidden", 0)} | dict(family.dials)
    if family.shared_count:
        found["shared_hidden"] = (config.get(family.shared_count) or 0) * found["expert_hidden"]
    dense = dense_layers(config)
    found |= {"dense_layers": dense, "dense_hidden": _value(config, "intermediate_size", path) if dense else 0}
    _check_shapes(found, path)
    return found


def _plain(given: Mapping[str, Any], family: Family, path: Path) -> dict[str, Any]:
    """The keys by one name each, those of the rotary embedding on the top level, defaults filled in."""
    rope = given.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"{path}: rope_parameters={rope}: must be a mapping")
    config = {**given, **rope}
    config.pop("rope_parameters", None)
    for alias, name in family.aliases.items():
        if alias in config:
            config[name] = config.pop(alias)
    config = {**family.defaults, **config}
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = heads
    if config.get("head_dim") is None and isinstance(heads, int) and isinstance(width, int) and heads:
        config["head_dim"] = width // heads
    return config


def _check_keys(config: Mapping[str, Any], family: Family, path: Path) -> None:
    used = {*COMMON.values(), *family.keys.values(), family.shared_count, family.dense, *family.defaults}
    known = used | SILENT | set(HONOURED) | set(_DENSE_KEYS if family.dense == "mlp_only_layers" else ())
    known |= set(_ERNIE_KEYS if family.dense in _ERNIE_KEYS else ())
    for key, value in config.items():
        if key in HONOURED and value not in HONOURED[key]:
            right = f"this backbone cannot do that; must be {json.dumps(HONOURED[key][0])}"
            raise ConfigError(f"{path}: {key}={json.dumps(value)}: {right}")
        if key not in known and value is not None:
            raise ConfigError(f"{path}: {key}={json.dumps(value)}: no key of {family.architecture} that is known here")


def _check_windows(config: Mapping[str, Any], family: Family, path: Path) -> None:
    """Raises ConfigError where a layer attends to a window only."""
    kinds = config.get("layer_types")
    if kinds is not None and set(kinds) != {"full_attention"}:
        raise ConfigError(f"{path}: layer_types: sliding_attention: this backbone attends to all that is before")
    by_depth = kinds is None and family.model_type == "dots1" and config.get("sliding_window") is not None
    if by_depth and config.get("max_window_layers", 0) < config.get("num_hidden_layers", 0):
        what = f"sliding_window={config['sliding_window']}"
        raise ConfigError(f"{path}: {what}: this backbone attends to all that is before; must be null")


def _value(config: Mapping[str, Any], key: str, path: Path) -> Any:
    if config.get(key) is None:
        raise ConfigError(f"{path}: {key}: missing; it has no default")
    return config[key]


def dense_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers with one FFN: those named, those between the sparse steps, those before the first and after the last."""
    count = config["num_hidden_layers"]
    step = config.get("decoder_sparse_step") or config.get("moe_layer_interval") or 1
    first = config.get("first_k_dense_replace") or config.get("moe_layer_start_index") or 0
    last = config.get("moe_layer_end_index", -1)
    named, last = config.get("mlp_only_layers") or (), count - 1 if last == -1 else last
    return tuple(i for i in range(count) if i in named or (i + 1) % step or not first <= i <= last)


def _check_shapes(found: Mapping[str, Any], path: Path) -> None:
    """OLMoE's norm of all heads is as wide as the model: other heads would not fit it."""
    heads, size = found["attention.num_heads"], found["attention.head_dim"]
    if found["attention.qk_norm"] == "full" and heads * size != found["width"]:
        right = f"must be hidden_size / num_attention_heads = {found['width'] // heads}"
        raise ConfigError(f"{path}: head_dim={size}: {right}")


def nested(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1}` -> `{"a": {"b": 1}}`."""
    tree: dict[str, Any] = {}
    for name, value in dotted.items():
        *groups, leaf = name.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value
    return tree


def flat(model: Model) -> dict[str, Any]:
    """`Model` -> dotted field -> value."""
    plain = asdict(model)
    return {
        f"{name}.{leaf}" if leaf else name: v
        for name, value in plain.items()
        for leaf, v in (value.items() if isinstance(value, dict) else [("", value)])
    }


def model_of_file(folder: str | Path, **ours: Any) -> Model:
    """The backbone of a pretrained model. ours: values of `OURS`.

    Raises:
        ConfigError: see `pretrained`.
    """
    return parse(Model, nested({**pretrained(folder).fields, **ours}), "model")


def config_of(family: Family, model: Model, source: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`config.json` of a model. source: that of the checkpoint it came from, which is kept as it is.

    Raises:
        ConfigError: something of the model that the family, or the source, has otherwise.
    """
    config = dict(source) if source is not None else _written(family, model)
    values = flat(model)
    for name, value in fields(config, family, Path(CONFIG)).items():
        if name not in OURS and value != values[name]:
            other = f"{family.architecture} has {value}; it cannot be this model"
            raise ConfigError(f"model.{name}={values[name]}: {other}")
    return config


def _written(family: Family, model: Model) -> dict[str, Any]:
    values = flat(model)
    config = {key: values[name] for name, key in {**COMMON, **family.keys}.items()}
    rope = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    config |= {"architectures": [family.architecture], "model_type": family.model_type, "rope_parameters": rope}
    if family.shared_count:
        config[family.shared_count] = model.shared_hidden // model.expert_hidden
    if model.dense_layers:
        config["intermediate_size"] = model.dense_hidden
    if family.dense:
        listed: Any = list(model.dense_layers) if family.dense == "mlp_only_layers" else len(model.dense_layers)
        config[family.dense] = listed
    return config

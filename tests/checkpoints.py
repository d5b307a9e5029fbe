"""Hugging Face checkpoints written without transformers: configs by hand, random tensors by the families' names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "max_position_embeddings": 64,
}
OLMOE = SIZES | {"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "intermediate_size": 16}
OLMOE |= {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": False,
    "clip_qkv": None,
    "attention_bias": False,
}
QWEN2 = SIZES | {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "intermediate_size": 40}
QWEN2 |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "num_experts": 8}
QWEN2 |= {"num_experts_per_tok": 2, "norm_topk_prob": False, "use_sliding_window": False, "sliding_window": 32}
QWEN2 |= {"decoder_sparse_step": 1, "mlp_only_layers": [0]}
QWEN3 = SIZES | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "intermediate_size": 40}
QWEN3 |= {
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "head_dim": 16,
}
DOTS = SIZES | {"architectures": ["Dots1ForCausalLM"], "model_type": "dots1", "intermediate_size": 40}
DOTS |= {"moe_intermediate_size": 16, "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 2}
DOTS |= {"first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "sliding_window": None}
ERNIE = SIZES | {"architectures": ["Ernie4_5_MoeForCausalLM"], "model_type": "ernie4_5_moe", "intermediate_size": 40}
ERNIE |= {"moe_intermediate_size": 16, "moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1, "use_bias": False}
CONFIGS = {"olmoe": OLMOE, "qwen2": QWEN2, "qwen3": QWEN3, "dots1": DOTS, "ernie": ERNIE}


def tensors(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What a checkpoint of the first two families holds, spelled out by hand; random."""
    d, heads, kv = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    h, v, qwen = d // heads, config["vocab_size"], config["model_type"] == "qwen2_moe"
    f = config["moe_intermediate_size"] if qwen else config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d), "lm_head.weight": (v, d)}
    shapes["model.norm.weight"] = (d,)

    def ffn(prefix: str, hidden: int) -> None:
        shapes[f"{prefix}.gate_proj.weight"] = shapes[f"{prefix}.up_proj.weight"] = (hidden, d)
        shapes[f"{prefix}.down_proj.weight"] = (d, hidden)

    for i in range(config["num_hidden_layers"]):
        head = f"model.layers.{i}."
        for name, size in (("q", heads * h), ("k", kv * h), ("v", kv * h)):
            shapes[f"{head}self_attn.{name}_proj.weight"] = (size, d)
            if qwen:
                shapes[f"{head}self_attn.{name}_proj.bias"] = (size,)
            elif name != "v":
                shapes[f"{head}self_attn.{name}_norm.weight"] = (size,)
        shapes[f"{head}self_attn.o_proj.weight"] = (d, heads * h)
        shapes[f"{head}input_layernorm.weight"] = shapes[f"{head}post_attention_layernorm.weight"] = (d,)
        if i in config.get("mlp_only_layers", ()):
            ffn(f"{head}mlp", config["intermediate_size"])
            continue
        shapes[f"{head}mlp.gate.weight"] = (config["num_experts"], d)
        for expert in range(config["num_experts"]):
            ffn(f"{head}mlp.experts.{expert}", f)
        if qwen:
            ffn(f"{head}mlp.shared_expert", config["shared_expert_intermediate_size"])
            shapes[f"{head}mlp.shared_expert_gate.weight"] = (1, d)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write(folder: Path, config: dict[str, Any], state: dict[str, Tensor] | None, shards: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if state is None:
        return folder
    names = sorted(state)
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)] if shards > 1 else []
    for i, file in enumerate(files or ["model.safetensors"]):
        save_file({name: state[name] for name in names[i::shards]}, folder / file)
    if files:
        placed = {name: files[i % shards] for i, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder

"""Tiny random CLIPs and SigLIPs of open_clip in folders as they are published."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

from symbiotic.models.towers import CONFIG

TOWER = {"image_size": 32, "layers": 3, "width": 48, "head_width": 12, "patch_size": 8}
SIGLIP = {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False}
SIGLIP |= {"timm_pool": "map", "timm_proj": "none"}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}


def clip_folder(folder: Path, vision: dict, seed: int = 0) -> open_clip.CLIP:
    """A folder as on the hub, and the model that it holds."""
    folder.mkdir(parents=True)
    model_cfg = {"embed_dim": 192 if "timm_model_name" in vision else 24, "vision_cfg": vision, "text_cfg": TEXT}
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / CONFIG).write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess}))
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return model

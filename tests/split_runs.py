"""Folders of runs that started from a Hugging Face checkpoint, without their training: split, shaken, saved."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from symbiotic.arc import parent_config
from symbiotic.config import compose, save_config
from symbiotic.convert.huggingface import origin, read_parent
from symbiotic.convert.profile import expert_counts
from symbiotic.convert.receipt import receipt
from symbiotic.convert.split import assign, split_state
from symbiotic.data.packing import Text, build_sample, collate
from symbiotic.layout import opened
from symbiotic.models.batch import Batch
from symbiotic.models.unified import UnifiedModel, model_of
from symbiotic.runs import provenance, save_state, write_json
from symbiotic.schema import Config
from symbiotic.trained import PRETRAINED


def text_batch(tokens: Tensor) -> Batch:
    """[B, T] tokens, one sample a row."""
    rows = [build_sample(str(i), "lm", [Text(row, True)]) for i, row in enumerate(tokens.tolist())]
    return collate(rows, tokens.shape[1])


def random_tokens(vocabulary: int = 96, count: int = 4, length: int = 20) -> Tensor:
    return torch.randint(8, vocabulary, (count, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: UnifiedModel, tokens: Tensor) -> Tensor:
    """[B, T, V]."""
    batch = text_batch(tokens)
    assert batch.tokens.shape == tokens.shape
    flat = model(batch, logits_at=torch.ones_like(batch.tokens, dtype=torch.bool)).logits
    order = [batch.tokens.tolist().index(row) for row in tokens.tolist()]
    return flat.view(*tokens.shape, -1)[order]


def shaken(state: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """As a training leaves it: every number a little different."""
    generator = torch.Generator().manual_seed(seed)
    return {name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in state.items()}


def split_run(folder: Path, checkpoint: Path, *overrides: str) -> tuple[Config, UnifiedModel]:
    """The folder of a run with the files that `src/export_hf.py` reads; its config, and its model."""
    config = compose(["experiment=smoke", f"init_from={checkpoint}", *overrides])
    parent_state = read_parent(checkpoint, config.model, config.seed)
    settings = parent_config(config, parent_state)
    parent, child = model_of(settings, latents=False), model_of(config)
    parent.load_state_dict(parent_state)
    batch = text_batch(random_tokens(config.model.vocab_size))
    assignment = assign(expert_counts(parent, [batch]), config.model, config.system, "profiled", config.seed)
    child.load_state_dict(split_state(parent_state, child, assignment, config.seed))
    found = receipt(parent, child, assignment, batch) | {"parent": "one", "provenance": provenance()}
    folder.mkdir(parents=True)
    write_json(folder / "receipt.json", found)
    write_json(folder / PRETRAINED, origin(checkpoint))
    save_config(config, folder / "config.yaml")
    child.load_state_dict(shaken(child.state_dict()))
    save_state(folder / "model.safetensors", child.state_dict())
    return config, child


def masks_off(child: UnifiedModel) -> UnifiedModel:
    """The same parameters in a model whose every token chooses among all experts."""
    system = opened(child.system)
    assert system is not None
    whole = UnifiedModel(child.cfg, system, child.latents)
    whole.load_state_dict(child.state_dict())
    return whole

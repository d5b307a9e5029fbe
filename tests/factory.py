"""Small models of every shipped system, and random packed batches, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from symbiotic.data.packing import GenImage, ReadImage, Sample, Text, build_sample, collate, with_codes
from symbiotic.models.batch import Batch
from symbiotic.models.unified import UnifiedModel
from symbiotic.schema import KINDS, Attention, Model, Router, System, parse

CONF = Path(__file__).resolve().parents[1] / "conf"
SYSTEMS = tuple(sorted(path.stem for path in (CONF / "system").glob("*.yaml")))
VOCABULARY = 64


def tiny_model(**changes: Any) -> Model:
    sizes: dict[str, Any] = {
        "width": 32,
        "num_layers": 3,
        "vocab_size": VOCABULARY,
        "num_experts": 8,
        "expert_hidden": 16,
        "shared_hidden": 24,
        "attention": Attention(num_heads=4, num_kv_heads=2, head_dim=8),
        "router": Router(top_k=2),
        "gen_fraction": 0.5,
        "init_std": 0.1,
    }
    return Model(**(sizes | changes))


def load_system(name: str, model: Model, **changes: Any) -> System:
    """A shipped system on a model; `changes` replace keys of its YAML."""
    text = OmegaConf.load(CONF / "system" / f"{name}.yaml")
    fraction = {"model": {"gen_fraction": model.gen_fraction}}
    composed = OmegaConf.merge(OmegaConf.create(fraction), {"system": text})
    plain: Any = OmegaConf.to_container(composed.system, resolve=True)
    return parse(System, plain | changes, "system")


def standard(model: Model) -> System:
    return load_system("standard_moe", model)


def build(name: str, seed: int = 0, latents: bool = True, codebook: int = 0, **changes: Any) -> UnifiedModel:
    model = tiny_model(**changes)
    return UnifiedModel(model, load_system(name, model), latents, codebook).initialise(seed)


def samples(count: int, tasks: tuple[str, ...] = ("lm", "mmu", "t2i"), seed: int = 0) -> list[Sample]:
    """Random samples of the tasks in turn: about 12, 18 and 16 tokens."""
    rng, made = np.random.default_rng(seed), []

    def words(n: int, loss: bool = False) -> Text:
        return Text([int(i) for i in rng.integers(8, VOCABULARY, n)], loss)

    for i in range(count):
        task = tasks[i % len(tasks)]
        image = rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)
        parts = {
            "lm": [words(6), words(6, True)],
            "mmu": [words(2), ReadImage(image), words(6), words(4, True)],
            "t2i": [words(1), words(9, True), GenImage(image)],
            "latents": [GenImage(image)],
        }[task]
        made.append(build_sample(f"{task}-{i}", "t2i" if task == "latents" else task, parts))
    return made


def random_batch(
    count: int = 9, tasks: tuple[str, ...] = ("lm", "mmu", "t2i"), seed: int = 0, row_tokens: int = 48
) -> Batch:
    chosen = samples(count, tasks, seed)
    rng = np.random.default_rng(seed + 1)
    times = list(rng.uniform(0.1, 0.9, count))
    noises = [rng.standard_normal(s.latents.shape, dtype=np.float32) for s in chosen]
    return collate(chosen, row_tokens, times=times, noises=noises)


def code_batch(
    codebook: int = 11, count: int = 9, tasks: tuple[str, ...] = ("lm", "mmu", "t2i"), seed: int = 0
) -> Batch:
    """As `random_batch`, its generated images random codes."""
    rng = np.random.default_rng(seed + 2)
    chosen = [with_codes(s, rng.integers(0, codebook, len(s.latents))) for s in samples(count, tasks, seed)]
    return collate(chosen, 48)


def level(value: float) -> torch.Tensor:
    return torch.tensor(value)


__all__ = [
    "KINDS",
    "SYSTEMS",
    "build",
    "code_batch",
    "level",
    "load_system",
    "random_batch",
    "samples",
    "standard",
    "tiny_model",
]

"""Operations counted by hand, and as torch counts those of a real forward."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from factory import load_system, random_batch, tiny_model
from symbiotic.config import compose
from symbiotic.models.batch import IGNORE
from symbiotic.models.unified import UnifiedModel
from symbiotic.schema import Config
from symbiotic.studies.budget import FAMILIES, budget, overhead, parts, token_ranges, trained_roles
from symbiotic.studies.flops import count_flops, training_flops


def config_of(name: str, row_tokens: int, **changes: object) -> Config:
    model = tiny_model(**changes)
    made = compose(["experiment=smoke"])
    data = dataclasses.replace(made.data, row_tokens=row_tokens)
    return dataclasses.replace(made, model=model, system=load_system(name, model), data=data)


def shapes_of(config: Config) -> dict[str, tuple[int, ...]]:
    model = UnifiedModel(config.model, config.system)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_a_dense_model_by_hand() -> None:
    """Width 32, 3 layers, 4 query and 2 key heads of 8, FFN of 24 + 2 x 16 hidden, 64 words, rows of 48."""
    config = config_of("dense", 48)
    layer = 32 * (4 + 2 * 2) * 8 + 32 * 32 + 32 * 2 * 56 + 56 * 32
    found = count_flops(shapes_of(config), config)
    assert found.attention == 3 * 4 * 48 * 4 * 8
    assert found.products["text"] == found.products["prompt"] == 2 * (3 * layer + 32 * 64)
    assert found.products["vit"] == 2 * (3 * layer + 48 * 32)
    assert found.products["vae"] == 2 * (3 * layer + 48 * 32 + (128 * 32 + 32 * 32) + 32 * 48)
    assert found.forward["text"] == found.products["text"] + found.attention
    assert found.training["text"] == 3 * found.forward["text"]
    again = dataclasses.replace(config, recompute=True)
    assert count_flops(shapes_of(again), again).training["text"] == 4 * found.forward["text"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_real_forward_of_a_dense_model_takes_as_many(tied: bool) -> None:
    batch = random_batch(9, row_tokens=48)
    config = config_of("dense", 48, tied_head=tied)
    model = UnifiedModel(config.model, config.system).initialise(0)
    words = (batch.kind < 2) & (batch.target != IGNORE)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(batch, logits_at=words)
    found = count_flops(shapes_of(config), config)
    kinds = {"text": int((batch.kind == 0).sum()), "prompt": int((batch.kind == 1).sum())}  # padding is computed too
    kinds |= {"vit": len(batch.vit_patches), "vae": len(batch.latents)}
    assert sum(kinds.values()) == batch.kind.numel()
    head = 2 * 32 * 64
    without_targets = kinds["text"] + kinds["prompt"] - int(words.sum())
    expected = sum(count * found.forward[kind] for kind, count in kinds.items()) - head * without_targets
    assert counter.get_total_flops() == expected


def test_what_is_computed_again_does_not_count_as_work() -> None:
    plain, again = (compose(["experiment=smoke", f"recompute={flag}"]) for flag in ("false", "true"))
    assert training_flops(plain) == training_flops(again) == count_flops(shapes_of(plain), plain).training
    assert count_flops(shapes_of(again), again).training["text"] > training_flops(again)["text"]


def test_experts_count_by_how_many_a_token_uses() -> None:
    dense, moe = (config_of(name, 48) for name in ("dense", "standard_moe"))
    one, other = (count_flops(shapes_of(config), config).products for config in (dense, moe))
    assert other["text"] - one["text"] == 2 * 3 * 32 * 8  # the same hidden width, and a router of 8 columns a layer
    split = config_of("symbiotic", 48)
    assert one["text"] < count_flops(shapes_of(split), split).products["text"] < other["text"]  # it sees 4 columns


def test_symbiotic_has_no_parameter_more_than_standard_and_bagel_has() -> None:
    made = {name: budget(config_of(name, 48), []) for name in ("symbiotic", "standard_moe", "bagel")}
    assert set(overhead(made["symbiotic"], made["standard_moe"]).values()) == {0}
    more = overhead(made["bagel"], made["standard_moe"])
    assert {name for name, count in more.items() if count} == {"attention and norms", "shared expert"}
    assert more["shared expert"] == 3 * (32 * 2 * 24 + 24 * 32)
    assert sum(more.values()) == made["bagel"].total - made["standard_moe"].total


@pytest.mark.parametrize("name", ["dense", "mot", "tripartite", "multi_gate"])
def test_every_parameter_is_in_one_family(name: str) -> None:
    config = config_of(name, 48)
    found = parts(shapes_of(config), config)
    assert all(sum(part.name.startswith(family) for family in FAMILIES) == 1 for part in found)
    whole = UnifiedModel(config.model, config.system)
    assert sum(part.total for part in found) == sum(p.numel() for p in whole.parameters())


def test_what_is_frozen_throughout_is_not_trainable() -> None:
    config = config_of("symbiotic", 48)
    made = budget(config, [])
    assert made.trainable == made.total
    frozen = [dataclasses.replace(phase, frozen=("shared",)) for phase in config.phases.list]
    half = dataclasses.replace(
        config, phases=dataclasses.replace(config.phases, list=(frozen[0], config.phases.list[1]))
    )
    whole = dataclasses.replace(config, phases=dataclasses.replace(config.phases, list=tuple(frozen)))
    assert "shared" in trained_roles(half)
    shared = next(part for part in budget(whole, []).parts if part.name.startswith("shared"))
    assert (shared.trainable, shared.total > 0) == (0, True)


def test_tokens_are_a_range_over_seeds_or_unknown() -> None:
    assert token_ranges([{"lm": 3}, {"lm": 5, "mmu": 1}]) == {"lm": (3, 5), "mmu": (0, 1)}
    assert token_ranges([{"lm": 3}, None]) == {}
    assert token_ranges([]) == {}

"""Merged experts are the mean of their parts, paired by use; nothing but what is new is drawn."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from factory import load_system, random_batch, tiny_model
from symbiotic.convert.merge import merged
from symbiotic.convert.profile import expert_counts
from symbiotic.convert.split import assign, assign_layer, split_state
from symbiotic.layout import parent_system
from symbiotic.models.moe import Experts
from symbiotic.models.unified import UnifiedModel
from symbiotic.schema import KINDS

SEEN = {"und": ("text", "vit"), "gen": ("prompt", "vae")}


def ffn(x: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ w_in).chunk(2, -1)
    return (F.silu(gate) * up) @ w_out


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_a_merged_expert_is_the_mean_of_its_parts(merge: int) -> None:
    generator = torch.Generator().manual_seed(0)
    w_in, w_out = torch.randn(6, 5, 8, generator=generator), torch.randn(6, 4, 5, generator=generator)
    router, bias = torch.randn(5, 6, generator=generator), torch.randn(6, generator=generator)
    x = torch.randn(7, 5, generator=generator)
    made = Experts(6 // merge, 5, 4 * merge)
    made.load_state_dict({"w_in": merged("a.w_in", w_in, merge), "w_out": merged("a.w_out", w_out, merge)})
    columns, biases = merged("blocks.0.moe.routers.und", router, merge), merged("blocks.0.moe.bias", bias, merge)
    for e in range(6 // merge):
        parts = range(e * merge, (e + 1) * merge)
        expected = torch.stack([ffn(x, w_in[p], w_out[p]) for p in parts]).mean(0)
        torch.testing.assert_close(ffn(x, made.w_in[e], made.w_out[e]), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(columns[:, e], torch.stack([router[:, p] for p in parts]).mean(0))
        torch.testing.assert_close(biases[e], torch.stack([bias[p] for p in parts]).mean())


def test_experts_are_paired_in_the_order_of_their_use() -> None:
    counts = torch.zeros(4, 8)
    counts[KINDS.index("text")] = torch.tensor([1.0, 9, 2, 8, 0, 7, 0, 6])
    chosen = assign_layer(counts, {"und": 4, "gen": 4}, SEEN, merge=2)
    assert chosen == {"und": [1, 3, 5, 7], "gen": [2, 0, 4, 6]}


def test_the_split_into_task_groups() -> None:
    model = tiny_model()
    system = load_system("utamoe", model)
    parent = UnifiedModel(model, parent_system(system), latents=False).initialise(0)
    child = UnifiedModel(model, system)
    assert parent_system(system) == parent_system(load_system("symbiotic", model))
    counts = expert_counts(parent, [random_batch(6, ("lm", "mmu"))])
    assignment = assign(counts, model, system, "profiled", seed=0)
    state = split_state(parent.state_dict(), child, assignment, seed=0)
    child.load_state_dict(state)
    first, second = assignment[1]["gen"][2:4]
    old = parent.state_dict()
    whole = [old[f"blocks.1.moe.pools.all.{leaf}"] for leaf in ("w_in", "w_out")]
    x = torch.randn(3, 32)
    expected = (ffn(x, *(w[first] for w in whole)) + ffn(x, *(w[second] for w in whole))) / 2
    new = [state[f"blocks.1.moe.pools.gen.{leaf}"][1] for leaf in ("w_in", "w_out")]
    torch.testing.assert_close(ffn(x, *new), expected, rtol=1e-4, atol=1e-6)
    assert all(float(value) == 0 for name, value in state.items() if name.endswith(".mix"))
    task = "blocks.0.moe.task_router."
    assert float(state[f"{task}weight"].std()) == pytest.approx(model.init_std, rel=0.3)
    assert not state[f"{task}bias"].any()
    other = split_state(parent.state_dict(), child, assignment, seed=1)
    assert not torch.equal(other[f"{task}weight"], state[f"{task}weight"])
    routed = {n: p.numel() for n, p in child.named_parameters() if ".pools." in n}
    assert sum(routed.values()) == sum(p.numel() for n, p in parent.named_parameters() if ".pools." in n)

"""The split: no parameter added, weights and gates kept, the profile obeyed."""

from __future__ import annotations

import pytest
import torch

from factory import SYSTEMS, build, load_system, random_batch, tiny_model
from symbiotic.convert.profile import expert_counts
from symbiotic.convert.receipt import count_parameters, receipt
from symbiotic.convert.split import assign, assign_layer, split_state
from symbiotic.layout import parent_system, pool_sizes
from symbiotic.models.unified import UnifiedModel
from symbiotic.objectives.flow import noised
from symbiotic.schema import KINDS, Init, Router

BOTH_KINDS_OF_POOLS = {"und": ("text", "prompt", "vit"), "gen": ("vae",)}


def parent_of(name: str, **changes: object) -> UnifiedModel:
    model = tiny_model(**changes)
    return UnifiedModel(model, parent_system(load_system(name, model)), latents=False).initialise(0)


def split(name: str, method: str = "profiled", **changes: object):  # type: ignore[no-untyped-def]
    parent = parent_of(name, **changes)
    child = UnifiedModel(parent.cfg, load_system(name, parent.cfg))
    batch = random_batch(6, ("lm", "mmu"))
    assignment = assign(expert_counts(parent, [batch]), parent.cfg, child.system, method, seed=0)
    child.load_state_dict(split_state(parent.state_dict(), child, assignment, seed=0))
    return parent, child, assignment, batch


def test_standard_and_symbiotic_have_exactly_the_same_number_of_parameters() -> None:
    """(a): the split adds none, over every shared module."""
    standard, partitioned = count_parameters(split("standard_moe")[1]), count_parameters(split("symbiotic")[1])
    assert standard == partitioned


@pytest.mark.parametrize("name", SYSTEMS)
def test_receipt_counts_and_gate_identity(name: str) -> None:
    """(a) and (b) for every system: only copies of shared experts and streams add parameters."""
    parent, child, assignment, batch = split(name)
    found = receipt(parent, child, assignment, batch)
    assert found["parameters"]["before"] == count_parameters(parent)["total"]
    adds = name in ("mot", "bagel", "multi_gate")
    assert (found["parameters"]["added"] > 0) == adds
    for row in found["gate_identity"]:
        assert row["max_gate_change"] < 2e-7 or name == "utamoe"  # whose experts are chosen two by two
        assert row["factor"] == pytest.approx([1.0, 1.0], abs=1e-6)
        assert 0 < row["tokens_inside"] <= 1
    for layer in assignment:
        assert sorted(e for experts in layer.values() for e in experts) == list(range(8))


def test_without_renormalisation_gates_change_by_one_factor_per_token() -> None:
    from symbiotic.schema import Router

    parent, child, assignment, batch = split("symbiotic", router=Router(top_k=2, normalize=False))
    for row in receipt(parent, child, assignment, batch)["gate_identity"]:
        assert row["max_gate_change"] < 2e-7
        assert row["factor"][0] >= 1 - 1e-6
        assert row["factor"][1] > 1.01  # masked columns left the softmax


@pytest.mark.parametrize("name", ["standard_moe", "standard_separable", "multi_gate", "dense"])
def test_systems_that_hide_no_expert_compute_what_the_parent_computes(name: str) -> None:
    parent, child, _, batch = split(name)
    with torch.no_grad():
        torch.testing.assert_close(child(batch).logits, parent(batch).logits, rtol=1e-4, atol=1e-6)


def test_an_expert_keeps_its_weights_wherever_it_lands() -> None:
    parent, child, assignment, _ = split("symbiotic")
    old, new = parent.state_dict(), child.state_dict()
    for layer, pools in enumerate(assignment):
        for pool, experts in pools.items():
            for weight in ("w_in", "w_out"):
                stored = new[f"blocks.{layer}.moe.pools.{pool}.{weight}"]
                assert torch.equal(stored, old[f"blocks.{layer}.moe.pools.all.{weight}"][experts])
            columns = new[f"blocks.{layer}.moe.routers.{pool}"]
            assert torch.equal(columns, old[f"blocks.{layer}.moe.routers.all"][:, experts])


def test_least_used_experts_generate() -> None:
    counts = torch.zeros(4, 8)
    counts[KINDS.index("text")] = torch.tensor([9.0, 1, 8, 0, 7, 0, 6, 0])
    counts[KINDS.index("vit")] = torch.tensor([0.0, 9, 0, 0, 1, 0, 1, 0])
    chosen = assign_layer(counts, {"und": 4, "gen": 4}, BOTH_KINDS_OF_POOLS)
    assert chosen == {"und": [0, 1, 4, 6], "gen": [2, 3, 5, 7]}  # expert 2: 8/31, expert 6: 6/31 + 1/11


def test_tripartite_gives_each_kind_the_experts_it_used_more() -> None:
    counts = torch.zeros(4, 8)
    counts[KINDS.index("text")] = torch.tensor([9.0, 8, 1, 1, 0, 0, 0, 0])
    counts[KINDS.index("vit")] = torch.tensor([1.0, 1, 9, 8, 0, 0, 0, 0])
    seen = {"text": ("text", "prompt"), "vit": ("vit",), "vae": ("vae",)}
    chosen = assign_layer(counts, {"text": 2, "vit": 2, "vae": 4}, seen)
    assert chosen == {"text": [0, 1], "vit": [2, 3], "vae": [4, 5, 6, 7]}


def test_random_assignment_is_seeded_and_differs_by_layer() -> None:
    model = tiny_model()
    system, counts = load_system("symbiotic", model), torch.zeros(3, 4, 8)
    first, again, other = (assign(counts, model, system, "random", seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert len({tuple(layer["gen"]) for layer in first}) > 1
    assert assign(counts, model, system, "contiguous", 0)[0] == {"und": [0, 1, 2, 3], "gen": [4, 5, 6, 7]}


def test_split_ratios() -> None:
    for fraction, want in ((0.25, (6, 2)), (0.75, (2, 6))):
        model = tiny_model(gen_fraction=fraction)
        sizes = pool_sizes(model, load_system("symbiotic", model))
        assert (sizes["und"], sizes["gen"]) == want
        _, child, _, _ = split("symbiotic", gen_fraction=fraction)
        assert child.visible_experts.sum(1).tolist() == [want[0]] * 3 + [want[1]]


def test_arms_start_from_the_same_latent_modules() -> None:
    one, other = split("symbiotic")[1].state_dict(), split("bagel")[1].state_dict()
    for name in ("latent_in.weight", "time_in.w_in.weight", "latent_head.weight"):
        assert torch.equal(one[name], other[name])
    assert not torch.equal(one["latent_in.weight"], build("symbiotic", seed=1).state_dict()["latent_in.weight"])


def test_a_dense_layer_stays_dense() -> None:
    parent, child, assignment, batch = split("symbiotic", dense_layers=(0,), dense_hidden=40)
    assert len(assignment) == 2
    assert child(noised(batch)).routing.counts.shape[0] == 2
    assert receipt(parent, child, assignment, batch)["parameters"]["added"] == 0


def test_a_fresh_router_and_random_generation_experts_are_drawn_and_nothing_else_is() -> None:
    parent, child, assignment, _ = split("symbiotic")
    plain = split_state(parent.state_dict(), child, assignment, seed=0)
    for init, changed in ((Init(router="fresh"), ".moe.routers."), (Init(gen_experts="random"), ".moe.pools.gen.")):
        state = split_state(parent.state_dict(), child, assignment, seed=0, init=init)
        different = {name for name in state if not torch.equal(state[name], plain[name])}
        assert different == {name for name in state if changed in name}
        other = split_state(parent.state_dict(), child, assignment, seed=1, init=init)
        assert not torch.equal(other[next(iter(different))], state[next(iter(different))])


def test_a_fresh_router_is_not_the_one_that_the_parent_started_from() -> None:
    """The parent's and the child's router have one name in standard_moe."""
    parent, child, assignment, _ = split("standard_moe")
    state = split_state(parent.state_dict(), child, assignment, seed=0, init=Init(router="fresh"))
    assert not torch.equal(state["blocks.0.moe.routers.all"], parent.blocks[0].moe.routers["all"])  # as initialised


def test_shared_experts_that_the_system_lacks_are_removed_from_the_parent() -> None:
    model = tiny_model()
    system = load_system("symbiotic", model, shared={"all": None}, shield={"mode": "none"})
    assert parent_system(system).shared == {}
    parent = UnifiedModel(model, parent_system(system, shared=True), latents=False).initialise(0)
    child = UnifiedModel(model, system)
    assignment = assign(expert_counts(parent, [random_batch(6, ("lm",))]), model, system, "profiled", seed=0)
    state = split_state(parent.state_dict(), child, assignment, seed=0)
    assert any(".moe.shared." in name for name in parent.state_dict())
    assert not any(".moe.shared." in name for name in state)
    child.load_state_dict(state)


def test_biases_go_where_their_experts_go_and_start_at_zero_without_any() -> None:
    model = tiny_model(router=Router(top_k=2, bias=True))
    parent = UnifiedModel(model, parent_system(load_system("symbiotic", model)), latents=False).initialise(0)
    child = UnifiedModel(model, load_system("symbiotic", model))
    assignment = assign(torch.rand(3, 4, 8), model, child.system, "random", seed=0)
    for layer in range(3):
        parent.state_dict()[f"blocks.{layer}.moe.bias"].copy_(torch.arange(8.0))
    state = split_state(parent.state_dict(), child, assignment, seed=0)
    assert state["blocks.1.moe.bias"].tolist() == [*assignment[1]["und"], *assignment[1]["gen"]]
    without = {name: value for name, value in parent.state_dict().items() if not name.endswith("bias")}
    assert (
        split_state(without | {"vit_in.bias": parent.vit_in.bias}, child, assignment, 0)["blocks.1.moe.bias"].tolist()
        == [0.0] * 8
    )

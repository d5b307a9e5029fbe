"""Norms, cosines and leaks against vectors computed by hand, and leaks of every shield mode on a real model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from factory import SYSTEMS, build, level, load_system, random_batch, tiny_model
from symbiotic.layout import parameter_names, shield_kinds
from symbiotic.models.unified import UnifiedModel
from symbiotic.objectives.total import training_terms
from symbiotic.schema import Objective
from symbiotic.training.conflict import (
    leaks,
    products,
    role_conflicts,
    shielded_layers,
    squares,
    task_gradients,
)

# --------------------------------------------------------------------------- conflicts


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_conflicts_of_hand_computed_gradients() -> None:
    und = {"a": vector(3, 0), "b": vector(0, 4), "c": vector(1), "d": vector(0), "e": vector(2)}
    gen = {"a": vector(-1, 2), "b": vector(2, 0), "c": vector(0), "d": vector(5), "e": vector(0)}
    found = role_conflicts(products(und, gen).tolist(), ["one", "one", "one", "one", "two"])
    assert found == pytest.approx(
        {
            "conflict/one/und": 26**0.5,  # 9 + 16 + 1
            "conflict/one/gen": 34**0.5,  # 5 + 4 + 25
            "conflict/one/ratio": (34 / 26) ** 0.5,
            "conflict/one/cosine": -3 / (26 * 34) ** 0.5,
            "conflict/one/opposed": 0.5,  # a of a and b
            "conflict/two/und": 2.0,
            "conflict/two/gen": 0.0,
        }
    )


def test_small_gradients_do_not_vanish_in_the_products() -> None:
    first, second = {"a": vector(1e-30, 0)}, {"a": vector(-2e-30, 0)}
    found = role_conflicts(products(first, second).tolist(), ["one"])
    assert found["conflict/one/cosine"] == pytest.approx(-1.0)
    assert found["conflict/one/ratio"] == pytest.approx(2.0)


def test_task_gradients_leave_the_parameters_alone() -> None:
    x, y = nn.Parameter(vector(1, 2)), nn.Parameter(vector(3))
    z = x.square().sum()
    found = task_gradients({"understanding": 2 * z, "generation": z * y.sum()}, {"x": x, "y": y})
    assert {task: {n: g.tolist() for n, g in part.items()} for task, part in found.items()} == {
        "understanding": {"x": [4, 8], "y": [0]},
        "generation": {"x": [6, 12], "y": [5]},
    }
    assert x.grad is None
    assert y.grad is None
    with pytest.raises(RuntimeError, match="second time"):  # the last pass freed the graph
        z.backward()


# --------------------------------------------------------------------------- leaks


def test_leaks_of_hand_computed_norms() -> None:
    found = leaks([9.0, 0.0, 0.0, 0.0], [16.0, 9.0, 0.0, 144.0], [0, 0, 1, 2])
    assert found == pytest.approx({"leak/all": 3 / 13, "leak/layer0": 0.6, "leak/layer2": 0.0})


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_shielded_parameters_are_those_of_the_targets(system: str) -> None:
    model = tiny_model(dense_layers=(0,), dense_hidden=16, gated_shared=True)
    layout = load_system(system, model)
    names = parameter_names(model, layout)
    bridge = ".moe.pools.bridge." if system == "symbiotic_bridge" else ".moe.shared.all."
    shared = [n for n in names if bridge in n] if shield_kinds(layout) else []
    assert shielded_layers(names, model, layout) == {n: int(n.split(".")[1]) - 1 for n in shared}
    assert bool(shared) == (system in ("symbiotic", "symbiotic_bridge", "standard_separable", "tripartite"))


def test_a_shielded_pool_is_found_by_its_name() -> None:
    model = tiny_model()
    system = load_system("standard_separable", model, shield={"mode": "output", "targets": {"pools.und": ["vae"]}})
    found = shielded_layers(parameter_names(model, system), model, system)
    assert set(found) == {f"blocks.{i}.moe.pools.und.{leaf}" for i in range(3) for leaf in ("w_in", "w_out")}


def leak(mode: str, shield: float, batch: Any = None, **changes: Any) -> dict[str, float]:
    model = tiny_model(**changes)
    system = load_system("symbiotic", model, shield={"mode": mode, "targets": {"shared": ["vae"]}})
    built = UnifiedModel(model, system).initialise(0)
    parameters = dict(built.named_parameters())
    layers = shielded_layers(parameters, model, system)
    batch = random_batch() if batch is None else batch

    def arrives(shield: Tensor | None) -> list[float]:
        flow = training_terms(built, batch, Objective(), shield)[1]["flow"]
        wanted = {name: parameters[name] for name in layers}
        return squares(task_gradients({"generation": flow}, wanted)["generation"], layers).tolist()

    return leaks(arrives(level(shield)), arrives(None), list(layers.values()))


def test_what_leaks_past_a_full_shield() -> None:
    """`output` and `weights` stop what latents send to the last layer. Below, other tokens pass it on through attention
    (here a large part: nothing is trained), through `weights` a little more; through `strict` nothing."""
    output, weights, strict = (leak(mode, 1.0) for mode in ("output", "weights", "strict"))
    assert list(output) == ["leak/all", "leak/layer0", "leak/layer1", "leak/layer2"]
    assert output["leak/layer2"] == weights["leak/layer2"] == 0.0
    assert 0.0 < output["leak/layer1"] < output["leak/layer0"] < 1.0
    assert output["leak/layer1"] < weights["leak/layer1"] < 1.0
    assert set(strict.values()) == {0.0}


@pytest.mark.parametrize("mode", ["output", "weights", "strict"])
def test_without_text_nothing_leaks(mode: str) -> None:
    assert set(leak(mode, 1.0, random_batch(4, ("latents",))).values()) == {0.0}


@pytest.mark.parametrize("mode", ["output", "weights", "strict"])
def test_a_partial_shield_leaks_its_rest_in_the_last_layer(mode: str) -> None:
    assert leak(mode, 0.9)["leak/layer2"] == pytest.approx(0.1, rel=1e-4)
    assert leak(mode, 0.0) == pytest.approx(dict.fromkeys(leak(mode, 0.0), 1.0), rel=1e-4)


def test_understanding_does_not_reach_the_generation_pool() -> None:
    """No text of these batches reads a latent: exact zeros, so that such a role has no cosine."""
    model = build("symbiotic")
    _, terms = training_terms(model, random_batch(), Objective())
    parameters = dict(model.named_parameters())
    grads = task_gradients({"ce": terms["ce"], "flow": terms["flow"]}, parameters)
    pools = [name for name in parameters if ".pools.gen." in name]
    assert float(squares(grads["ce"], pools).sum()) == 0.0
    assert bool((squares(grads["flow"], pools) > 0).all())

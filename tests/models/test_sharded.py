"""The shield under DDP, FSDP2 and expert parallelism: two gloo processes give the gradients and the zeros of one."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from factory import SYSTEMS, random_batch
from ranks import Ranks
from shields import (
    GENERATION,
    WHOLE,
    Gradients,
    by_layer,
    close,
    collected,
    forward,
    gradients,
    same_bits,
    shielded,
    weighed,
    with_norms,
)
from symbiotic.callbacks.sharded_checkpoint import load, save
from symbiotic.files import uncommitted
from symbiotic.models.batch import Batch
from symbiotic.models.sharding import shard
from symbiotic.schema import Lora, Router

WORLD = 2
MIXED = (("t2i", "mmu", "lm"), ("t2i",))  # tasks of each rank's micro-batches
LATENTS = (("latents",), ("latents",))
LOPSIDED = (("lm",), ("latents",))
PHASES = ((1.0, GENERATION), (0.9, GENERATION), (0.9, WHOLE))  # level and weights of each optimiser step
strategies = pytest.mark.parametrize("strategy", ["ddp", "fsdp"])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    group = Ranks(__file__, tmp_path_factory.mktemp("ranks"), WORLD)
    yield group
    group.close()


def micro_batches(rank: int, tasks: Sequence[Sequence[str]], count: int) -> list[Batch]:
    """Of one step; no two ranks have the same."""
    return [with_norms(random_batch(6, tuple(tasks[rank]), seed=WORLD * i + rank)) for i in range(count)]


def expected(arguments: Mapping[str, Any], tasks: Sequence[Sequence[str]], count: int = 1) -> list[Gradients]:
    """What one process gets for each of the `PHASES`: summed over a rank's micro-batches, the mean over the ranks."""
    model, steps = shielded(**arguments), []
    batches = [batch for rank in range(WORLD) for batch in micro_batches(rank, tasks, count)]
    for value, weights in PHASES:
        parts = [gradients(model, batch, value, weights) for batch in batches]
        steps.append({name: torch.stack([part[name] for part in parts]).sum(0) / WORLD for name in parts[0]})
    return steps


# ------------------------------------------------------------------ called on the ranks


def train(
    strategy: str, arguments: Mapping[str, Any], tasks: Sequence[Sequence[str]], options: Sequence[str], count: int
) -> list[Gradients]:
    """The gradients of each of the `PHASES`. The model is wrapped once; the level is filled into one tensor."""
    model, value = shielded(**arguments), torch.zeros(())
    model.recompute = "recompute" in options
    if "compile" in options:
        torch._dynamo.reset()
        counters.clear()
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # dynamo hides it
        for block in model.blocks:
            block.compile(backend="aot_eager")
    parallel = DistributedDataParallel(model) if strategy == "ddp" else shard(model, mesh(strategy))
    steps = []
    for level, weights in PHASES:
        model.zero_grad()
        value.fill_(level)
        batches = micro_batches(dist.get_rank(), tasks, count)
        for number, batch in enumerate(batches):
            with synchronised(parallel, last=number == len(batches) - 1):
                weighed(model, forward(parallel, batch, value), batch, weights).backward()
        found = collected(model)
        steps.append({name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()})
    assert "compile" not in options or counters["stats"]["unique_graphs"] > 0
    return steps


def spread_parts(arguments: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """As `parts`, with low-rank updates, and one step that must reach all of them."""
    model = shard(shielded(**arguments).adapt(Lora(rank=4, targets=("pools",)), 0), mesh("ep"))
    batch = micro_batches(dist.get_rank(), MIXED, 1)[0]
    weighed(model, forward(model, batch, torch.zeros(())), batch, WHOLE).backward()
    assert all(p.grad is not None and p.grad.placements == p.placements for p in model.parameters())  # type: ignore[attr-defined]
    return {name: tuple(p.to_local().shape) for name, p in model.named_parameters()}  # type: ignore[attr-defined]


def mesh(strategy: str) -> DeviceMesh:
    """`ep`: the experts of every pool shared out, and everything else sharded."""
    if strategy == "fsdp":
        return init_device_mesh("cpu", (WORLD,))
    return init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("data", "experts"))


@contextlib.contextmanager
def synchronised(parallel: Any, last: bool) -> Iterator[None]:
    """Inside, gradients go between the ranks only with the last micro-batch of a step."""
    if isinstance(parallel, DistributedDataParallel):
        with contextlib.nullcontext() if last else parallel.no_sync():
            yield
    else:
        parallel.set_requires_gradient_sync(last)
        yield


def parts(arguments: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of this rank's part of every parameter; a parameter that is not sharded is missing."""
    model = shard(shielded(**arguments), init_device_mesh("cpu", (WORLD,)))
    return {name: tuple(p.to_local().shape) for name, p in model.named_parameters() if isinstance(p, DTensor)}


# ------------------------------------------------------------------ the tests


def check(
    ranks: Ranks, strategy: str, arguments: Mapping[str, Any], tasks: Any, options: Any = (), count: int = 1
) -> Any:
    """Both ranks hold the gradients of one process; returns them, by phase."""
    first, second = ranks(train, strategy, arguments, tasks, options, count)
    for one, other, reference in zip(first, second, expected(arguments, tasks, count), strict=True):
        same_bits(one, other)
        close(reference, one, rtol=1e-5)
    return first


@strategies
@pytest.mark.parametrize(
    ("system", "target"),
    [("symbiotic", "shared"), ("standard_separable", "shared"), ("standard_separable", "pools.und")],
)
@pytest.mark.parametrize("mode", ["output", "weights", "strict"])
def test_two_ranks_give_the_gradients_and_zeros_of_one(
    ranks: Ranks, mode: str, system: str, target: str, strategy: str
) -> None:
    """From level 1 to 0.9 between two steps, with nothing built anew."""
    arguments = {"name": system, "mode": mode, "target": target, "num_experts": 6}
    shield, released, _ = check(ranks, strategy, arguments, MIXED)
    reached = by_layer(shield, target)
    assert reached[-1] == 0.0
    assert all(value == 0.0 for value in reached) if mode == "strict" else all(value > 0.0 for value in reached[:-1])
    assert min(by_layer(released, target)) > 0.0
    assert by_layer(check(ranks, strategy, arguments, LATENTS)[0], target) == [0.0, 0.0, 0.0]


@strategies
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_rank_without_latents_and_one_without_words(ranks: Ranks, system: str, strategy: str) -> None:
    """Pools, streams and heads without a token still have a gradient: no parameter is unused, no rank waits."""
    check(ranks, strategy, {"name": system, "mode": "none", "num_layers": 2}, LOPSIDED)


@strategies
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("recompute",), id="recompute"),
        pytest.param(("compile",), id="compile", marks=pytest.mark.slow),
        pytest.param(("recompute", "compile"), id="recompute+compile"),
    ],
)
def test_recomputed_and_compiled_blocks_on_two_ranks(ranks: Ranks, options: tuple[str, ...], strategy: str) -> None:
    shield, _, _ = check(ranks, strategy, {"mode": "output", "num_layers": 2}, MIXED, options)
    assert by_layer(shield)[-1] == 0.0


@strategies
@pytest.mark.parametrize("mode", ["output", "strict"])
def test_accumulation_on_two_ranks(ranks: Ranks, mode: str, strategy: str) -> None:
    shield, _, _ = check(ranks, strategy, {"mode": mode}, MIXED, count=2)
    assert by_layer(shield)[-1] == 0.0


@pytest.mark.parametrize(
    "changes",
    [
        {"tied_head": True},
        {"gated_shared": True, "dense_layers": (0,), "dense_hidden": 24},
        {"num_experts": 9, "gen_fraction": 1 / 9, "router": Router(top_k=1)},
    ],
    ids=["tied head", "gate and dense layer", "one expert for two ranks"],
)
def test_other_layouts_sharded(ranks: Ranks, changes: dict[str, Any]) -> None:
    check(ranks, "fsdp", {"mode": "output", **changes}, MIXED)


def test_every_parameter_is_sharded_along_its_first_dimension(ranks: Ranks) -> None:
    """Three experts on two ranks: two and one."""
    arguments = {"name": "symbiotic", "num_experts": 6}
    found, whole = ranks(parts, arguments), shielded(**arguments)
    for name, parameter in whole.named_parameters():
        shapes = [part[name] for part in found]
        assert sum(shape[0] for shape in shapes) == parameter.shape[0]
        assert all(shape[1:] == parameter.shape[1:] for shape in shapes)
    assert [part["blocks.0.moe.pools.gen.w_in"][0] for part in found] == [2, 1]


@pytest.mark.parametrize(
    ("mode", "target", "options", "count"),
    [
        ("output", "shared", (), 2),
        ("weights", "pools.und", ("recompute",), 1),
        pytest.param("strict", "shared", (), 1, marks=pytest.mark.slow),
        pytest.param("output", "shared", ("recompute", "compile"), 1, marks=pytest.mark.slow),
    ],
)
def test_experts_that_are_shared_out_have_the_gradients_of_one_process(
    ranks: Ranks, mode: str, target: str, options: tuple[str, ...], count: int
) -> None:
    arguments = {"name": "standard_separable", "mode": mode, "target": target, "num_layers": 2}
    check(ranks, "ep", arguments, MIXED, options, count)


@pytest.mark.parametrize(
    "system", [pytest.param(s, marks=() if s in ("tripartite", "utamoe") else pytest.mark.slow) for s in SYSTEMS]
)
def test_experts_of_every_system_that_are_shared_out(ranks: Ranks, system: str) -> None:
    """A rank without latents, and one without words: to some ranks no token comes."""
    check(ranks, "ep", {"name": system, "mode": "none", "num_layers": 2, "num_experts": 16}, LOPSIDED)


def test_shared_out_experts_with_low_rank_updates(ranks: Ranks) -> None:
    found = ranks(spread_parts, {"name": "symbiotic", "num_layers": 1})
    assert [part["blocks.0.moe.pools.und.w_in"] for part in found] == [(2, 32, 32)] * 2  # of four experts
    assert [part["blocks.0.moe.pools.und.lora.w_in.a"] for part in found] == [(2, 32, 4)] * 2
    assert [part["embed.weight"] for part in found] == [(32, 32)] * 2  # of 64 words


def looked_at(arguments: Mapping[str, Any]) -> torch.Tensor:
    model = shard(shielded(**arguments), mesh("ep"))
    with torch.no_grad():
        return forward(model, micro_batches(0, MIXED, 1)[0], 0.0).logits


def test_all_ranks_see_the_same_bits_of_the_same_batch(ranks: Ranks) -> None:
    """As evaluation needs, which goes on as long as what it reads says so."""
    arguments = {"name": "symbiotic", "num_layers": 2}
    first, second = ranks(looked_at, arguments)
    assert torch.equal(first, second)
    with torch.no_grad():
        alone = forward(shielded(**arguments), micro_batches(0, MIXED, 1)[0], 0.0).logits
    torch.testing.assert_close(first, alone, rtol=1e-5, atol=1e-6)


def kept(path: Path, lost: int | None = None) -> str:
    """Why a checkpoint could not be written there; empty when it could, and came back. lost: a rank with a NaN."""
    model = shard(shielded(name="symbiotic", num_layers=1), mesh("ep"))
    state = dict(model.named_parameters())
    if lost == dist.get_rank():
        state["embed.weight"].data.to_local()[0, 0] = math.nan  # type: ignore[attr-defined]
    try:
        save({"step": 3, "state_dict": {name: value.detach() for name, value in state.items()}}, path, {})
    except OSError as error:
        return str(error)
    found = load(path, state.get)
    assert found["step"] == 3
    assert all(torch.equal(found["state_dict"][name].to_local(), value.to_local()) for name, value in state.items())  # type: ignore[attr-defined]
    return ""


def test_what_one_rank_cannot_write_no_rank_has_written(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(kept, tmp_path / "whole") == ["", ""]
    assert uncommitted(tmp_path / "whole") is None
    whole = load(tmp_path / "whole")["state_dict"]
    for name, value in shielded(name="symbiotic", num_layers=1).named_parameters():
        torch.testing.assert_close(whole[name], value.detach(), rtol=0, atol=0)
    (tmp_path / "file").write_text("")
    assert all("Not a directory" in said or "File exists" in said for said in ranks(kept, tmp_path / "file" / "x"))
    assert ranks(kept, tmp_path / "lost", 1) == ["embed.weight is not finite"] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "whole", "whole.json"]


def test_a_step_that_fails_is_reported_and_the_ranks_start_anew(ranks: Ranks) -> None:
    with pytest.raises(AssertionError, match=r"rank 1:(.|\n)*no gradient"):
        ranks(fail, 1)
    assert ranks(fail, 2) == [0, 1]


def fail(rank: int) -> int:
    """Raises on one rank, while the other waits for it."""
    if dist.get_rank() == rank:
        raise RuntimeError("no gradient of this step")
    dist.barrier()
    return dist.get_rank()

"""MAOP and torchjd's combinations against cases computed by hand, and which configs refuse them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hydra import initialize_config_dir
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim.adamw import AdamW

from symbiotic.checks.surgery import NEEDS, refusal
from symbiotic.config import CONF, Composer
from symbiotic.schema import ConfigError, Surgery
from symbiotic.training.surgery import (
    TaskGradients,
    products,
    project_on_momentum,
    task_weighting,
    task_weights,
    without_opposition,
)

METHODS = ("pcgrad", "cagrad", "upgrad")
needs_torchjd = pytest.mark.skipif(find_spec("torchjd") is None, reason="needs symbiotic[surgery]")


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


# --------------------------------------------------------------------------- MAOP


@pytest.mark.parametrize(
    ("gradient", "momentum", "expected"),
    [
        (vector(1, -1), vector(0, 2), vector(1, 0)),  # g.m = -2, |m|^2 = 4
        (vector(1, 2, -3), vector(1, 0, 1), vector(2, 2, -2)),  # g.m = -2, |m|^2 = 2
        (vector(-3, -4), vector(3, 4), vector(0, 0)),
        (vector(1, 1), vector(0, 2), vector(1, 1)),  # not opposed
        (vector(1, 0), vector(0, 2), vector(1, 0)),
        (vector(0, -1), vector(0, 9e-7), vector(0, -1)),  # |m|^2 = 8.1e-13: no direction
        (vector(0, -1), vector(0, 2e-6), vector(0, 0)),  # |m|^2 = 4e-12
    ],
)
def test_maop_takes_out_what_opposes_the_momentum(gradient: Tensor, momentum: Tensor, expected: Tensor) -> None:
    found = without_opposition(gradient, momentum)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert float(found @ momentum) >= -1e-6


def test_maop_goes_tensor_by_tensor_through_the_named_roles() -> None:
    weights = [nn.Parameter(torch.zeros(2)) for _ in range(4)]
    optimizer = AdamW([{"params": weights[:2], "role": "shared"}, {"params": weights[2:], "role": "gen"}])
    for weight in weights[:3]:
        optimizer.state[weight]["exp_avg"] = vector(0, 1)
    gradients = [vector(1, -1), vector(1, 9), vector(1, -1), vector(1, -1)]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.clone()
    project_on_momentum(optimizer, ["shared"])
    assert [w.grad.tolist() for w in weights] == [[1, 0], [1, 9], [1, -1], [1, -1]]  # together g.m = 8 > 0
    weights[0].grad = None
    project_on_momentum(optimizer, [])
    assert weights[0].grad is None
    assert [w.grad.tolist() for w in weights[1:]] == [[1, 9], [1, 0], [1, -1]]  # the last has no momentum yet
    assert list(optimizer.state) == weights[:3]


def test_maop_keeps_the_dtype() -> None:
    found = without_opposition(vector(1, -1).bfloat16(), vector(0, 2).bfloat16())
    torch.testing.assert_close(found, vector(1, 0).bfloat16())


def sharded_maop(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    gradient, momentum = vector(3, -1, -2, 1), vector(1, 1, 1, 1)  # opposed on the second shard alone: g.m = 1
    for sign in (1.0, -1.0):
        shards = [distribute_tensor(t, mesh, [Shard(0)]) for t in (sign * gradient, momentum)]
        found = without_opposition(*shards).full_tensor()
        torch.testing.assert_close(found, without_opposition(sign * gradient, momentum))
    torch.testing.assert_close(found, vector(-2.75, 1.25, 2.25, -0.75))
    dist.destroy_process_group()


def test_maop_multiplies_over_all_shards(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(sharded_maop, (str(tmp_path / "store"),), nprocs=2, start_method="fork")


# --------------------------------------------------------------------------- the aggregators


def combined(surgery: Surgery, *gradients: Tensor) -> Tensor:
    weights = task_weights(products([[g] for g in gradients]), task_weighting(surgery))
    return sum((w * g for w, g in zip(weights, gradients, strict=True)), torch.zeros_like(gradients[0]))


HAND = [  # method, c, gradients, what comes out
    ("pcgrad", 0.5, vector(1, 0), vector(-1, 1), vector(0.5, 1.5)),  # (1, 0) + (-1, 1) / 2, and (-1, 1) + (1, 0)
    ("pcgrad", 0.5, vector(1, 0, 0), vector(-1, 1, 1), vector(2 / 3, 4 / 3, 4 / 3)),
    ("pcgrad", 0.5, vector(1, 0), vector(3, 1), vector(4, 1)),
    ("upgrad", 0.5, vector(1, 0), vector(-1, 1), vector(0.5, 1.5)),  # two tasks: projected as by PCGrad
    ("upgrad", 0.5, vector(1, 0, 0), vector(-1, 1, 1), vector(2 / 3, 4 / 3, 4 / 3)),
    ("upgrad", 0.5, vector(1, 0), vector(3, 1), vector(4, 1)),
    # mean (1, 1/2); the worse-off task is the second: (1, 1/2) + c |(1, 1/2)| (0, 1), times 2 / (1 + c)
    ("cagrad", 0.1, vector(2, 0), vector(0, 1), vector(2, 1 + 0.1 * 5**0.5) / 1.1),
    ("cagrad", 0.0, vector(2, 0), vector(-3, 1), vector(-1, 1)),  # the sum
]


@needs_torchjd
@pytest.mark.parametrize(("method", "c", "first", "second", "expected"), HAND)
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_against_hand_computed_cases(
    method: Any, c: float, first: Tensor, second: Tensor, expected: Tensor, scale: float
) -> None:
    """At every scale: torchjd itself takes gradients below 0.01 for zero."""
    found = combined(Surgery(method, cagrad_c=c), scale * first, scale * second)
    torch.testing.assert_close(found / scale, expected, atol=1e-3, rtol=0)


@needs_torchjd
@pytest.mark.parametrize("method", METHODS)
def test_equal_gradients_give_their_sum(method: Any) -> None:
    torch.testing.assert_close(combined(Surgery(method), vector(1, 2), vector(1, 2)), vector(2, 4), atol=1e-5, rtol=0)


@needs_torchjd
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("second", [vector(0, 0), vector(float("nan"), 0), vector(float("inf"), 1)])
def test_a_gradient_that_is_zero_or_not_finite_leaves_the_sum(method: Any, second: Tensor) -> None:
    weighting = task_weighting(Surgery(method))
    assert task_weights(products([[vector(1, 2)], [second]]), weighting) == [1.0, 1.0]


@needs_torchjd
@pytest.mark.parametrize("method", METHODS)
def test_the_generator_is_left_as_it_was(method: Any) -> None:
    before = torch.get_rng_state()
    combined(Surgery(method), vector(1, 0), vector(-1, 1))
    assert torch.equal(torch.get_rng_state(), before)


@needs_torchjd
def test_task_gradients_replace_their_sum_and_nothing_else() -> None:
    """Two micro-batches; a third term of the loss comes on top; a frozen parameter neither counts nor moves."""
    x, y, frozen = (nn.Parameter(torch.zeros(n)) for n in (2, 1, 2))
    tasks = TaskGradients(Surgery("pcgrad"), [x, y, frozen])

    def micro_batch(und: Tensor, gen: Tensor) -> None:
        both = x @ und[:2] + und[2] * y.sum() + 50 * frozen.sum(), x @ gen[:2] + gen[2] * y.sum() - 50 * frozen.sum()
        tasks.losses = dict(zip(("understanding", "generation"), both, strict=True))
        tasks.add(2)
        ((both[0] + both[1] + 10 * y.sum()) / 2).backward()

    for _ in range(2):  # the second time on a gradient that was zeroed
        x.grad = y.grad = frozen.grad = None
        tasks.clear()
        micro_batch(vector(2, 0, 0), vector(-2, 0, 2))
        micro_batch(vector(0, 0, 0), vector(0, 2, 0))  # means (1, 0, 0) and (-1, 1, 1)
        frozen.grad = None
        tasks.combine()
        torch.testing.assert_close(torch.cat([x.grad, y.grad]), vector(2 / 3, 4 / 3, 10 + 4 / 3))
        assert frozen.grad is None
    assert tasks.losses == {}


# --------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def composer() -> Iterator[Composer]:
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="train"):
        yield Composer()


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("runs", "data", "cache"):
        monkeypatch.setenv(f"SYMBIOTIC_{name.upper()}", str(tmp_path / name))


SGD = "rates.optimizer._target_=torch.optim.SGD ~rates.optimizer.betas ~rates.optimizer.eps"
REFUSED = {
    "surgery=maop surgery.roles=[shard]": r"^surgery\.roles=shard: no such role; did you mean 'shared'\?",
    "surgery=cagrad surgery.cagrad_c=-1": r"^surgery\.cagrad_c=-1\.0: must be at least 0",
    "surgery=maop system=mot": r"^surgery\.method=maop: system=mot has no parameter of surgery\.roles=\[shared\]",
    f"surgery=maop {SGD}": r"_target_=torch\.optim\.SGD keeps no first moment",
    "surgery=maop mix=und_only": r"method=maop: the mix trains no generation samples",
    "surgery=pcgrad mix=und_only": r"method=pcgrad: the mix trains no generation samples",
    "surgery=pcgrad objective.flow_weight=0": r"method=pcgrad: objective\.flow_weight is 0",
    "surgery=pcgrad trainer=ddp data.micro_batches=2": r"method=pcgrad: trainer\.devices=2: .* must be 1",
    "surgery=pcgrad trainer.num_nodes=2": r"method=pcgrad: trainer\.num_nodes=2: ",
    "surgery=upgrad trainer.precision=16-mixed": r"method=upgrad: trainer\.precision=16-mixed scales the loss",
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_method_that_cannot_apply_is_refused_with_a_reason(composer: Composer, line: str) -> None:
    with pytest.raises(ConfigError, match=REFUSED[line]):
        composer.config(["experiment=smoke", *line.split()])


@needs_torchjd
@pytest.mark.parametrize(
    "line",
    [
        "surgery=maop",
        "surgery=maop trainer=ddp data.micro_batches=2",
        "surgery=maop trainer.precision=16-mixed",
        "surgery=maop system=dense",
        "surgery=pcgrad system=mot",
        "surgery=cagrad surgery.roles=[shared,attention]",
        f"surgery=upgrad trainer.precision=bf16-mixed {SGD}",
    ],
)
def test_a_method_that_can_apply_is_not(composer: Composer, line: str) -> None:
    config = composer.config(["experiment=smoke", *line.split()])
    assert config.surgery.method in line
    assert refusal(config) is None


@pytest.mark.parametrize("method", METHODS)
def test_a_missing_library_is_one_line(method: Any, composer: Composer, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[str] = []

    def absent(name: str) -> None:
        wanted.append(name)

    monkeypatch.setattr("symbiotic.checks.surgery.find_spec", absent)
    says = rf"method={method}: needs torchjd.*: pip install 'symbiotic\[surgery\]'$"
    with pytest.raises(ConfigError, match=says):
        composer.config(["experiment=smoke", f"surgery={method}"])
    assert set(NEEDS[method]) <= set(wanted)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchjd"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(ConfigError, match=rf"surgery\.method={method}: needs torchjd: pip install"):
        task_weighting(Surgery(method))

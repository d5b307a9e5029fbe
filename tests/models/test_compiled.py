"""Blocks under `torch.compile`: the same gradients and zeros, and nothing compiled again when level or rows change."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo import config as dynamo
from torch._dynamo import lookup_backend
from torch._dynamo.utils import counters

from factory import build, level, random_batch
from shields import GENERATION, WHOLE, by_layer, close, forward, gradients, latents_only, same_bits, shielded
from symbiotic.models.batch import Batch
from symbiotic.models.unified import UnifiedModel
from symbiotic.objectives.flow import noised

GRAPHS = 6  # of a block: the host cuts the sorted tokens into pools, four calls deep in `Block.forward`
CASES = [
    ("symbiotic", "output", "shared"),
    ("symbiotic", "weights", "shared"),
    ("symbiotic", "strict", "shared"),
    ("standard_separable", "weights", "pools.und"),
    ("standard_separable", "output", "pools.und"),
]


class Counted:
    """The backend `aot_eager`; counts the graphs that it compiled, and the runs of their forwards."""

    def __init__(self, name: str = "aot_eager") -> None:
        self.name, self.graphs, self.runs = name, 0, 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compiled = lookup_backend(self.name)(graph, inputs)  # type: ignore[operator]
        self.graphs += 1

        def run(*arguments: Any) -> Any:
            self.runs += 1
            return compiled(*arguments)

        return run


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing compiled before or left behind; a block that is compiled too often fails instead of running eagerly."""
    torch._dynamo.reset()
    counters.clear()
    with dynamo.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def compiled(model: UnifiedModel, backend: Counted | None = None) -> UnifiedModel:
    """The model with every block compiled, as the module does it."""
    for block in model.blocks:
        block.compile(backend=backend or "aot_eager")
    return model


def rows(count: int) -> Batch:
    """A mixed batch of exactly so many rows: two and a half samples fit into one."""
    batch = random_batch(3 * count)
    assert batch.kind.shape[0] >= count
    return batch


@pytest.mark.parametrize(("system", "mode", "target"), CASES)
def test_compiled_blocks_give_the_same_gradients(system: str, mode: str, target: str) -> None:
    backend, batches = Counted(), (random_batch(9), random_batch(12, seed=3), latents_only())
    eager = shielded(system, mode, target, num_layers=2)
    net = compiled(shielded(system, mode, target, num_layers=2), backend)
    for batch in batches:
        for value, weights in ((1.0, GENERATION), (0.9, WHOLE)):
            expected, found = (gradients(model, batch, value, weights) for model in (eager, net))
            close(expected, found)
            assert by_layer(expected, target)[-1] == (0.0 if weights is GENERATION else pytest.approx(by_layer(found, target)[-1]))

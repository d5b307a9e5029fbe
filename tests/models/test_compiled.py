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

from factory import build, random_batch
from shields import GENERATION, WHOLE, by_layer, close, forward, gradients, latents_only, same_bits, shielded
from symbiotic.models.unified import UnifiedModel
from symbiotic.objectives.flow import noised

# dynamo looks at the `.grad` of every input, and hides the warning that this gives from all but an `error` filter
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

GRAPHS = 6  # of a block: the host cuts the sorted tokens into pools, four calls deep in `Block.forward`
ROUNDING = 5e-6  # only eager blocks rotate queries and keys by a product of complex numbers
CASES = [  # `output` is in the test of levels and rows
    pytest.param("symbiotic", "output", "shared", marks=pytest.mark.slow),
    pytest.param("symbiotic", "weights", "shared", marks=pytest.mark.slow),
    ("symbiotic", "strict", "shared"),
    pytest.param("standard_separable", "weights", "pools.und", marks=pytest.mark.slow),
]


class Counted:
    """A backend of `torch.compile`; counts the graphs that it compiled, and the runs of their forwards."""

    def __init__(self, name: str) -> None:
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


def compiled(model: UnifiedModel, backend: str = "aot_eager") -> Counted:
    """Compiles every block, as the module does."""
    counted = Counted(backend)
    for block in model.blocks:
        block.compile(backend=counted)
    return counted


@pytest.mark.parametrize(("system", "mode", "target"), CASES)
def test_compiled_blocks_give_the_same_gradients(system: str, mode: str, target: str) -> None:
    eager, net = (shielded(system, mode, target, num_layers=2) for _ in range(2))
    backend = compiled(net)
    for batch in (random_batch(9), latents_only(8)):
        for value, weights in ((1.0, GENERATION), (0.9, WHOLE)):
            expected, found = (gradients(model, batch, value, weights) for model in (eager, net))
            close(expected, found, ROUNDING)
            assert weights is WHOLE or by_layer(found, target)[-1] == 0.0
    assert backend.graphs >= GRAPHS


def test_a_change_of_the_level_or_of_the_rows_compiles_nothing() -> None:
    """Four blocks share their code. The second number of rows makes the shapes dynamic; all others are served then.

    The level is one tensor that is filled in place, as the callback of the phases does it.
    """
    eager, net = (shielded("symbiotic", "output", num_layers=4) for _ in range(2))
    backend, tensor, steps = compiled(net), torch.tensor(1.0), [random_batch(n) for n in (10, 13, 16, 20, 23)]
    assert [batch.kind.shape[0] for batch in steps] == [4, 5, 6, 7, 8]
    gradients(net, steps[0], tensor)
    assert (backend.graphs, backend.runs) == (GRAPHS, 4 * GRAPHS)
    gradients(net, steps[1], tensor)
    before = backend.runs
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch, value in zip(steps, (0.9, 0.0, 1.0, 0.9, 0.5), strict=True):
            found = gradients(net, batch, tensor.fill_(value))
            close(gradients(eager, batch, value), found, ROUNDING)
            assert (by_layer(found)[-1] == 0.0) == (value == 1.0)
        with pytest.raises(RuntimeError, match="recompil"):  # the instrument sees what would compile
            net(noised(steps[0]), shield=tensor, trace=True)
    assert backend.runs - before >= 5 * 4 * GRAPHS
    assert backend.graphs == 2 * GRAPHS
    assert all("run_pools" in reason for reason in counters["graph_break"])


def test_a_phase_that_routes_by_the_truth_compiles_nothing() -> None:
    eager, net = (build("utamoe", num_layers=2) for _ in range(2))
    backend, by_truth, batch = compiled(net, "eager"), torch.tensor(False), noised(random_batch(9))
    expected = [eager(batch, by_truth=torch.tensor(value)) for value in (False, True)]
    assert not torch.equal(*(out.routing.sent for out in expected))
    net(batch, by_truth=by_truth)
    graphs = backend.graphs
    with torch.compiler.set_stance("fail_on_recompile"):
        for value, other in ((True, 1), (False, 0)):
            found = net(batch, by_truth=by_truth.fill_(value))
            torch.testing.assert_close(found.prediction, expected[other].prediction)
            assert torch.equal(found.routing.sent, expected[other].routing.sent)
    assert backend.graphs == graphs > 0


@pytest.mark.parametrize("system", ["bagel", *(pytest.param(s, marks=pytest.mark.slow) for s in ("mot", "utamoe"))])
def test_streams_and_pools_without_a_token_run_compiled_too(system: str) -> None:
    eager, net = (build(system, num_layers=2) for _ in range(2))
    backend = compiled(net)
    for tasks in (("lm", "mmu", "t2i"), ("lm",), ("latents",)):
        batch, before = random_batch(9, tasks), backend.runs
        close(gradients(eager, batch, 1.0, WHOLE), gradients(net, batch, 1.0, WHOLE), ROUNDING)
        assert backend.runs - before == 2 * GRAPHS


def test_recomputation_of_compiled_blocks() -> None:
    net, batch = shielded("symbiotic", "strict", num_layers=2), random_batch(9)
    compiled(net)
    kept, counts = gradients(net, batch, 0.9, WHOLE), forward(net, batch).routing.counts
    net.recompute = True
    same_bits(kept, gradients(net, batch, 0.9, WHOLE))
    assert by_layer(gradients(net, batch)) == [0.0, 0.0]
    assert torch.equal(forward(net, batch).routing.counts, counts)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("mode", ["output", "weights", "strict"])
def test_inductor_gives_the_same_gradients(mode: str) -> None:
    eager, net = (shielded("symbiotic", mode, num_layers=2) for _ in range(2))
    backend = compiled(net, "inductor")
    for batch in (random_batch(9), random_batch(12)):
        close(gradients(eager, batch, 0.9, WHOLE), gradients(net, batch, 0.9, WHOLE), rtol=1e-5)
        assert by_layer(gradients(net, batch))[-1] == 0.0
        assert mode != "strict" or by_layer(gradients(net, batch)) == [0.0, 0.0]
    assert backend.graphs >= GRAPHS

"""(h) What Lightning, callbacks and logging cost: `python benchmarks/overhead.py [--steps 60] [--quick]`.

The same steps of the embedded model in a plain loop (loader, loss, clip, AdamW), in a bare Trainer with what training
needs and its log, and with every default monitor on top; in turn, by the clock. Checkpoints and the finite check are in
`reliability.py`, monitors alone also in `monitors.py`. It needs the embedded corpus.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness import Contender, chosen, compared, parser, report
from monitors import MONITORS, NEEDED, SETTLED, seconds

from symbiotic.arc import Arc
from symbiotic.config import compose
from symbiotic.fit import make_loader, make_module
from symbiotic.objectives.total import term_weights, training_terms


def plain_loop(arc: Arc, dataset: Any) -> float:
    """Seconds from the end of step `SETTLED` to the end of the last one, as `monitors.seconds`."""
    config = arc.config
    module = make_module(config, dataset, None, latents=True)
    module.configure_model()
    optimizer, shield, begun = module.configure_optimizers(), torch.ones(()), 0.0
    weights, parameters = term_weights(config.objective), list(module.model.parameters())
    for number, batch in enumerate(make_loader(config, dataset, 0, 1, 0)):
        _, terms = training_terms(module.model, batch, config.objective, shield)
        optimizer.zero_grad()
        sum((weights[name] * term for name, term in terms.items()), torch.zeros(())).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.rates.clip)
        optimizer.step()
        if number + 1 == SETTLED:
            begun = time.perf_counter()
    return time.perf_counter() - begun


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, ("tiny",))
    made.add_argument("--steps", type=int, default=60)
    made.add_argument("--experiment", default="symbiotic")
    asked = chosen(made, arguments)
    found = [Contender(name, None) for name in ("plain loop", "Lightning, what training needs", "with all monitors")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = [
            f"phases.steps={asked.steps}",
            f"phases.shield_steps={asked.steps // 2}",
            f"phases.shield_steps={asked.steps // 2}",
            f"paths.runs={folder}",
            f"threads={asked.threads}",
        ]
        arc = Arc(compose([f"experiment={asked.experiment}", *given]))
        arc.prepare_data()
        if arc.scorers is not None:
            arc.scorers.wait()
        dataset = arc.dataset(arc.config, True)
        for number in range(asked.rounds):
            for place in (0, 1, 2) if number % 2 == 0 else (2, 1, 0):
                names = NEEDED if place == 1 else NEEDED + MONITORS
                one = Path(tempfile.mkdtemp(dir=folder))
                took = seconds(arc, dataset, names, one) if place else plain_loop(arc, dataset)
                found[place].seconds.append(took / (asked.steps - SETTLED))
    rows = compared(found, "plain loop")
    report("overhead: of Lightning and monitors, a step", {"embedded model": rows}, asked.out,
           {c.name: c.seconds for c in found})  # fmt: skip


if __name__ == "__main__":
    main()

"""What a run says before it starts and after it ends: tables on the terminal, `summary.json` and `summary.txt`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from symbiotic.callbacks.checkpoint import newest_valid
from symbiotic.callbacks.csv_log import last_values
from symbiotic.callbacks.events import read_events
from symbiotic.callbacks.in_loop_evaluation import SCORES, read_scores
from symbiotic.evaluation.embedded import Scores
from symbiotic.evaluation.names import EMBEDDED
from symbiotic.models.unified import model_of
from symbiotic.resume import changes
from symbiotic.runs import read_json, write_json, write_text
from symbiotic.schema import Config, ConfigError, RunError
from symbiotic.studies import console
from symbiotic.studies.curves import draw_instruments
from symbiotic.studies.inventory import inventory
from symbiotic.studies.timeline import draw_timeline
from symbiotic.training.roles import assign_roles

if TYPE_CHECKING:
    from symbiotic.arc import Arc

REPORTED = ("und", "text", "vit", "vae")
"""Groups of kinds whose routing the summary shows."""


JUDGES = ("classifier", "classifier_augmented", "clip_retrieval")
"""Which of the scorers' own figures are accuracies."""


def show_plan(config: Config) -> None:
    """The phase table and the parameter table, before anything is trained."""
    model = model_of(config).adapt(config.lora, config.seed)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    roles = assign_roles((name for name, p in model.named_parameters() if p.requires_grad), config.rates.roles).values()
    components = inventory(shapes, config.model, config.system)
    parameters = console.parameter_table(components, f"Parameters: {config.system.name}")
    listed = [role for role in config.rates.roles if role in roles]
    console.show(console.phase_table(config, listed), parameters)
    if not config.dry_run:
        path = Path(config.run_dir) / "phases.png"
        try:
            console.show(f"timeline: {draw_timeline(config, listed, path)}")
        except OSError as error:
            raise RunError(f"{path}: cannot be written: {error.strerror}") from error


def show_tokens(tokens: Mapping[str, int], steps: int) -> None:
    tasks = {name: count for name, count in tokens.items() if name not in ("latents", "places")}
    console.show(console.token_table(tasks, tokens["latents"], steps))


def finished(folder: Path, config: Config) -> float | None:
    """The metric of a run that is complete; None when there is something left to do."""
    found = read_json(folder / "summary.json")
    return None if found is None else metric_of(found["scores"], config)


def metric_of(scores: Mapping[str, float], config: Config) -> float:
    """NaN where none is asked for, and where an embedded one is that the corpus does not come with.

    Raises:
        ConfigError: the run has no such score.
    """
    if config.metric is None or (config.metric in EMBEDDED and not set(scores) & set(EMBEDDED)):
        return math.nan
    if config.metric not in scores:
        raise ConfigError(f"metric={config.metric}: no such score; known: {', '.join(sorted(scores))}")
    return float(scores[config.metric])


def routing_table(logged: Mapping[str, float]) -> Any:
    """Routing of the last log by kinds of tokens, mean over layers; None for a model without routed experts."""
    columns = {"capacity at 1": "capacity@1", "at 1.25": "capacity@1.25"}
    columns |= {"utilisation": "utilisation", "MaxVio": "maxvio"}
    rows = []
    for group in REPORTED:
        values = {title: logged.get(f"routing/{metric}/{group}") for title, metric in columns.items()}
        random = logged.get(f"routing/capacity@1/{group}/random")
        if values["capacity at 1"] is not None:
            cells = [console.NONE if v is None else f"{v:.3f}" for v in values.values()]
            rows.append([group, *cells, console.NONE if random is None else f"{random:.3f}"])
    titles = ["tokens", *columns, "random at 1"]
    return console.make_table("Routing, last log", titles, rows) if rows else None


def routing_of(logged: Mapping[str, float]) -> dict[str, float]:
    """The pooled-over-layers routing metrics of the last log, those of task routers among them."""
    return {n: value for n, value in logged.items() if n.startswith(("routing/", "task/")) and "/layer" not in n}


def ema_table(scores: Scores, averaged: Scores | None, steps: int) -> Any:
    """The averaged weights beside the last ones; None for a run without an average."""
    if averaged is None:
        return None
    stages = {
        name: {score: (value, found.n[score]) for score, value in found.items()}
        for name, found in ((f"step {steps}", scores), ("ema", averaged))
    }
    return console.summary_table(stages, "Averaged weights")


def write(arc: Arc, scores: Scores) -> float:
    """Print and store the final table with its anchors; returns the metric of the run."""
    config, folder, steps = arc.config, arc.folder, arc.config.phases.steps
    stages: dict[str, Mapping[str, Any]] = {
        "stage 0": arc.stage0_scores,
        "iteration 0": read_scores(folder / SCORES)[0],
        f"step {steps}": {name: (value, scores.n[name]) for name, value in scores.items()},
    }
    judged = ", ".join(f"{name} {scores.judges[name]:.3f}" for name in JUDGES if name in scores.judges)
    table = console.summary_table(
        stages,
        f"{config.system.name}, seed {config.seed}",
        f"The judges' own accuracy: {judged}." if judged else None,
    )
    averaged = ema_table(scores, arc.ema_scores, steps)
    logged = last_values(folder / "metrics.csv")
    routing = routing_table(logged)
    grids = sorted((folder / "samples").glob("*.png"))
    heatmaps = sorted((folder / "routing").glob("*.png"))
    instruments = draw_instruments(folder, folder / "instruments.png")
    events, changed = read_events(folder), changes(folder)
    paths = {
        "grid": grids[-1] if grids else console.NONE,
        "routing": heatmaps[-1] if heatmaps else console.NONE,
        "instruments": instruments or console.NONE,
        "checkpoint": newest_valid(folder / "checkpoints") or console.NONE,
        "model": folder / "model.safetensors",
        "metrics": folder / "metrics.csv" if (folder / "metrics.csv").exists() else console.NONE,
        "scores": folder / SCORES,
        "receipt": folder / "receipt.json",
    }
    seconds = "  ".join(f"{name} {value:.0f} s" for name, value in arc.journal.seconds.items())
    parts = [part for part in (table, averaged, routing) if part is not None]
    lines = [f"step {c['step']}: {c['key']} was changed from {c['old']} to {c['new']}" for c in changed]
    lines += [f"step {event['step']}: {event['text']}" for event in events]
    record = "\n".join(lines) or "no event"
    shown = (*parts, f"record: {record}", console.path_list(paths), f"time: {seconds}")
    console.show(*shown)
    write_text(folder / "summary.txt", console.render(*shown))
    value = metric_of(scores, config)
    write_json(
        folder / "summary.json",
        {
            "name": config.name,
            "system": config.system.name,
            "seed": config.seed,
            "steps": steps,
            "parent": arc.parent_name,
            "data": arc.fingerprint,
            "image_size": list(arc.evaluation.size),
            "tokens": arc.tokens,
            "scores": dict(scores),
            "n": dict(scores.n),
            **({"ema": dict(arc.ema_scores)} if arc.ema_scores is not None else {}),
            "judges": dict(scores.judges),
            "anchors": {"stage 0": arc.stage0_scores, "iteration 0": stages["iteration 0"]},
            "routing": routing_of(logged),
            "changes": changed,
            "events": dict(Counter(event["kind"] for event in events)),
            "seconds": {name: round(s, 1) for name, s in arc.journal.seconds.items()},
            "provenance": arc.provenance,
        },
    )
    return value

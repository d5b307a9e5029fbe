"""Run folders as training and evaluation leave them, made of plain files with made-up numbers: for tests of reports."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from symbiotic.callbacks.csv_log import CSVLog
from symbiotic.config import compose, save_config
from symbiotic.evaluation.images import save_image
from symbiotic.schema import KINDS

STEPS = (0, 10, 20)
N = {
    "knowledge_unreplayed": 40,
    "reading": 50,
    "embedded_acc": 30,
    "flow_error": 30,
    "embedded_fd": 30,
    "ocrbench": 1000,
    "ocrbench/text recognition": 300,
}
MADE = {
    "code": "c0de",
    "commit": "abc123",
    "python": "3.11",
    "torch": "2",
    "lightning": "2",
    "hydra-core": "1",
    "numpy": "2",
}
CAPTIONS = ("red 1 on blue", "green 2 | <b>on</b> gray")


def write_run(
    root: Path,
    arm: str,
    seed: int,
    overrides: Sequence[str] = (),
    better: float = 0.0,
    evaluated: bool = True,
    **changes: Any,
) -> Path:
    """One finished run. better: added to its understanding scores. changes: of its summary."""
    folder = root / f"{arm}-0a1b2c3d-seed{seed}"
    folder.mkdir(parents=True)
    config = yaml.safe_load(config_text(tuple(overrides)))
    config |= {"seed": seed, "run_dir": str(folder)}
    (folder / "config.yaml").write_text(yaml.dump(config, Dumper=yaml.CSafeDumper, sort_keys=False))
    generates = not config["mix"]["drop"]
    scores = {step: scores_at(step, seed, better, generates) for step in STEPS}
    lines = [json.dumps({"step": step, "scores": found}) for step, found in scores.items()]
    (folder / "scores.jsonl").write_text("\n".join(lines) + "\n")
    write_logs(folder, config, generates)
    summary = {
        "name": root.name, "system": config["system"]["name"], "seed": seed, "steps": STEPS[-1],
        "parent": "stage 0 1234", "data": "da7a",
        "tokens": {"lm": 1000 + seed, "mmu": 2000, "latents": 500, "places": 4000},
        "scores": scores[STEPS[-1]], "n": N, "judges": {"classifier": 0.98, "clip_retrieval": 0.9},
        "anchors": {"stage 0": {"knowledge_unreplayed": 0.95, "reading": 0.9 + seed / 100}, "iteration 0": scores[0]},
        "routing": {f"routing/capacity@1/{kind}": 0.8 for kind in KINDS},
        "events": {}, "seconds": {"joint": 60.0}, "provenance": MADE, **changes,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    if evaluated:
        write_evaluation(folder, seed, scores[STEPS[-1]], generates)
    return folder


@functools.lru_cache
def config_text(overrides: tuple[str, ...]) -> str:
    """The composed smoke config as YAML."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        save_config(compose(["experiment=smoke", *overrides]), path)
        return path.read_text()


def scores_at(step: int, seed: int, better: float, generates: bool) -> dict[str, float]:
    share, better = step / STEPS[-1], better * (1 + seed / 10)
    scores = {
        "knowledge_unreplayed": 0.9 - 0.2 * share + better + seed / 50,
        "reading": 0.8 + 0.05 * share + better + seed / 90,
    }
    made = {
        "embedded_acc": 0.9 * share + seed / 100,
        "flow_error": 1.5 - 1.4 * share + seed / 30,
        "embedded_fd": 900 - 850 * share + seed,
    }
    return scores | (made if generates else {})


def write_logs(folder: Path, config: Mapping[str, Any], generates: bool) -> None:
    """metrics.csv, and the counts of a heat map."""
    log, kinds = CSVLog(str(folder)), KINDS if generates else ("text", "vit")
    for step in (10, 20):
        metrics = {
            f"routing/{metric}/{kind}": 0.5 + step / 100 for metric in ("capacity@1", "utilisation") for kind in kinds
        }
        metrics |= {f"routing/capacity@1/{kind}/random": 0.95 for kind in kinds}
        log.log_metrics(metrics | {"leak/all": 0.3, "conflict/shared/cosine": -0.1, "train/loss": 1.0}, step)
    layers, experts = config["model"]["num_layers"], config["model"]["num_experts"]
    counts = np.ones((layers, len(KINDS), experts))
    (folder / "routing").mkdir()
    tokens = np.array([100.0 * (kind in kinds) for kind in KINDS])
    np.savez(
        folder / "routing" / "step=000020.npz",
        counts=counts,
        tokens=tokens,
        kinds=np.array(KINDS),
        steps=np.array([11, 20]),
    )


def write_evaluation(folder: Path, seed: int, scores: Mapping[str, float], generates: bool, **changes: Any) -> Path:
    """results.json, records and images, as `studies/evaluate.py` leaves them."""
    evaluation = folder / "evaluation" / "step=000020-0f0f0f0f"
    evaluation.mkdir(parents=True)
    scores = {**scores, "ocrbench": 400.0 + seed, "ocrbench/text recognition": 100.0 + seed}
    values = {
        name: {"value": v, "n": N[name], "low": None, "high": None, "benchmark": BENCHMARK[name]}
        for name, v in scores.items()
    }
    if generates:
        values["embedded_fd"] |= {"low": values["embedded_fd"]["value"] - 9, "high": values["embedded_fd"]["value"] + 9}
    results = {
        "run": folder.name, "weights": "step=000020", "step": 20, "ema": False, "as_trained": True,
        "weights_hash": f"w{seed}", "seed": seed,
        "sampler": {"steps": 2, "guidance": 2.0, "time_shift": 1.0}, "size": [20, 20], "data": "da7a",
        "evaluation_code": "e0a1", "versions": {"torch": "2"},
        "protocol": {name: {"samples": 30} for name in dict.fromkeys(BENCHMARK[s] for s in scores)},
        "scores": values, "judges": {"classifier": 0.98, "clip_retrieval": 0.9},
        "missing": {"fid": "coco/captions_val2014.json: no such file; looked for $SYMBIOTIC_ASSETS/coco"},
        "failed": {"mmlu": "anatomy_test.csv: line 3: the answer must be A, B, C or D, not E"},
        "problems": ["reading: image 7: not a readable image"],
        "provenance": {"config": "c0nf", "parent": "stage 0 1234", "training": MADE, "evaluation": MADE}, **changes,
    }  # fmt: skip
    (evaluation / "results.json").write_text(json.dumps(results))
    for name in results["protocol"]:
        score = next(score for score in scores if BENCHMARK[score] == name)
        right = round(scores[score] * N[score]) if score in ("knowledge_unreplayed", "reading", "embedded_acc") else 0
        rows = [{"benchmark": score, "id": i, "correct": i < right} for i in range(N[score])]
        (evaluation / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i, caption in enumerate(CAPTIONS if generates else ()):
        pixels = np.full((4, 4, 3), 40 * i + seed, np.uint8)
        save_image(evaluation / "images" / "embedded" / f"{i:05d}.png", pixels, {"prompt": caption})
    return evaluation


BENCHMARK = {
    "knowledge_unreplayed": "knowledge", "reading": "reading", "embedded_acc": "generation", "flow_error": "flow_error",
    "embedded_fd": "generation", "ocrbench": "ocrbench", "ocrbench/text recognition": "ocrbench",
}  # fmt: skip


def write_study(root: Path, seeds: Sequence[int] = (0, 1), **changes: Any) -> Path:
    """Three arms: symbiotic, standard_moe, and symbiotic's control without generation."""
    arms = {
        "symbiotic": ((), 0.0),
        "standard_moe": (("system=standard_moe", "phases=none"), -0.05),
        "und_only": (("mix=und_only",), 0.04),
    }
    for arm, (overrides, better) in arms.items():
        for seed in seeds:
            write_run(root, arm, seed, overrides, better, **changes)
    return root


def copied(root: Path, to: Path) -> Path:
    return Path(shutil.copytree(root, to))

"""The report of a study: `report.md`, `report.html` (one file), `results.csv` and `figures/*.png` from finished runs.

The same runs give the same bytes. Its date is that of the newest run, or SOURCE_DATE_EPOCH.
"""

from __future__ import annotations

import datetime
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from symbiotic.evaluation.images import load_image
from symbiotic.evaluation.names import metric
from symbiotic.runs import replace_with
from symbiotic.studies import report_html
from symbiotic.studies.report_data import ArmData, RunData, StudyData
from symbiotic.studies.report_document import Document, Figure, Gallery
from symbiotic.studies.report_figures import gallery_pixels
from symbiotic.studies.report_sections import config_hash, protocol_hash
from symbiotic.studies.report_style import Look, montage, png

COLUMNS = (
    "arm", "seed", "step", "source", "score", "value", "n", "low", "high", "chance", "better", "protocol", "code",
    "commit", "data", "config",
)  # fmt: skip
"""Of results.csv. source: `anchor`, `training` (measured while it ran) or `evaluation`."""


def write_files(study: StudyData, made: Document, folder: Path) -> list[Path]:
    """Every file of the report; each appears whole or not at all."""
    looks = {arm.name: arm.look for arm in study.arms}
    files: dict[str, bytes] = {f"figures/{name}.png": png(picture) for name, picture in drawings(made, looks).items()}
    files["results.csv"] = results_csv(study).encode()
    files["report.md"] = report_html.markdown(made).encode()
    files["report.html"] = report_html.html(made).encode()
    return [replace_with(folder / name, lambda path, data=data: path.write_bytes(data)) for name, data in files.items()]


def drawings(made: Document, looks: Mapping[str, Look]) -> dict[str, np.ndarray]:
    """File name -> picture of each figure and gallery."""
    found = {}
    for block in made.blocks():
        if isinstance(block, Figure):
            found[block.file] = montage([p.light for p in block.pictures], looks if block.legend else {})
        elif isinstance(block, Gallery):
            images = {arm: [load_image(image) for image in row] for arm, row in block.images.items()}
            found[block.file] = gallery_pixels(block.captions, images)
    return found


def date_of(study: StudyData) -> str:
    """Of SOURCE_DATE_EPOCH, else of the newest run; UTC."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH")
    newest = max((run.folder / "summary.json").stat().st_mtime for run in study.runs)
    return datetime.datetime.fromtimestamp(float(fixed or newest), datetime.UTC).strftime("%Y-%m-%d")


def command_of(runs: Path, study: str, factors: Sequence[str] | None, folder: Path) -> str:
    words = [f"runs={runs}", f"study={study}"]
    words += [f"factors=[{','.join(factors)}]"] if factors is not None else []
    words += [f"report={folder}"] if folder != runs / "report" else []
    return shlex.join(["python", "src/eval.py", *words])


# --------------------------------------------------------------------------- results.csv


def results_csv(study: StudyData) -> str:
    """One row a run, step and score, with all that a number needs beside it."""
    import pandas as pd

    rows = [row for arm in study.arms for run in arm.runs for row in rows_of(arm, run)]
    return str(pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(index=False, lineterminator="\n"))


def rows_of(arm: ArmData, run: RunData) -> list[dict[str, Any]]:
    summary, made = run.summary, run.summary["provenance"]
    facts = {"arm": arm.name, "seed": run.seed, "code": made["code"], "commit": made["commit"]}
    facts |= {"data": summary["data"], "config": config_hash(run)}
    rows = []
    for anchor, scores in summary["anchors"].items():
        rows += [{"step": anchor, "source": "anchor", "score": name, "value": v} for name, v in scores.items()]
    evaluated = run.results.get("scores", {})
    for step, name, value in run.in_loop:
        rows.append({"step": step, "source": "training", "score": name, "value": value, "n": None})
        if step == summary["steps"]:
            rows[-1]["n"] = summary["n"].get(name)
    for name, score in evaluated.items():
        numbers = {key: score.get(key) for key in ("value", "n", "low", "high")}
        rows.append(
            {
                "step": run.results["step"],
                "source": "evaluation",
                "score": name,
                **numbers,
                "protocol": protocol_hash(run),
            }
        )
    return [
        facts | row | {"chance": metric(row["score"]).chance, "better": metric(row["score"]).better} for row in rows
    ]

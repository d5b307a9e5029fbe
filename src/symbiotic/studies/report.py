"""The report of a study: `report.md`, `report.html` (one file), `results.csv` and `figures/*.png` from finished runs.

The same runs give the same bytes. Its date is that of the newest run, or SOURCE_DATE_EPOCH.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from symbiotic.evaluation.images import load_image
from symbiotic.evaluation.names import metric
from symbiotic.runs import read_json, write_bytes
from symbiotic.schema import EvalConfig, RunError
from symbiotic.studies import report_html
from symbiotic.studies.audit import audit_runs
from symbiotic.studies.evaluate import RESULTS, evaluation_folder, read_results
from symbiotic.studies.report_audit import audit_blocks
from symbiotic.studies.report_data import ArmData, StudyData
from symbiotic.studies.report_document import Document, Figure, Gallery
from symbiotic.studies.report_figures import gallery_pixels
from symbiotic.studies.report_origin import config_hash, protocol_hash
from symbiotic.studies.report_sections import document
from symbiotic.studies.report_style import Look, montage, png
from symbiotic.studies.results_file import FILE
from symbiotic.studies.runs_of import Run
from symbiotic.studies.study import Study, read_study

COLUMNS = (
    "arm", "seed", "step", "source", "score", "value", "n", "low", "high", "chance", "better", "protocol", "code",
    "commit", "data", "config",
)  # fmt: skip
"""Of results.csv. source: `anchor`, `training` (measured while it ran) or `evaluation`."""


def write_report(
    runs: Path,
    study: str,
    factors: Sequence[str] | None,
    folder: Path,
    evaluation: EvalConfig | None = None,
    command: str = "",
) -> list[Path]:
    """Audit, compare, write; returns the files.

    Args:
        runs: every finished run below it. study: an option of `conf/study`. factors: instead of the study's.
        evaluation: what the runs were evaluated with. None, or one with `evaluate=false`: whatever was evaluated.
        command: that makes this report, for the reader to repeat.

    Raises:
        ConfigError, AuditError, RunError: a study or runs that cannot be compared; nothing is written then.
    """
    return report_of(read_study(study), runs, folder, factors, evaluation, command)


def report_of(
    study: Study,
    runs: Path,
    folder: Path,
    factors: Sequence[str] | None = None,
    evaluation: EvalConfig | None = None,
    command: str = "",
    trained: bool = False,
) -> list[Path]:
    """`write_report` of a study that was read. trained: of the scores of the training, whatever was evaluated."""
    return write_files(*document_of(study, runs, factors, evaluation, command, trained), folder)


def document_of(
    study: Study,
    runs: Path,
    factors: Sequence[str] | None = None,
    evaluation: EvalConfig | None = None,
    command: str = "",
    trained: bool = False,
) -> tuple[StudyData, Document]:
    """What the report holds, before any figure is drawn; arguments as those of `report_of`."""
    audit = audit_runs(runs, study, factors, None if trained else lambda run: evaluation_of(run, evaluation))
    data = StudyData.of(audit)
    return data, document(data, audit_blocks(audit), command, date_of(data))


def evaluation_of(run: Path, evaluation: EvalConfig | None) -> Path | None:
    """The folder of a run's evaluation: that of this config; without one, the only one of the weights it ended with.

    Raises:
        RunError: several, and nothing says which.
    """
    if evaluation is not None and evaluation.evaluate:
        folder = evaluation_folder(evaluation, run)
        return folder if (folder / RESULTS).is_file() else None
    last = (read_json(run / "summary.json") or {}).get("steps")
    found = [path.parent for path in sorted((run / "evaluation").glob(f"*/{RESULTS}"))]
    found = [path for path in found if ((r := read_results(path)).get("step"), r.get("ema")) == (last, False)]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise RunError(f"{run / 'evaluation'}: several evaluations of its last step ({names}); keep one of them")
    return found[0] if found else None


def write_files(study: StudyData, made: Document, folder: Path) -> list[Path]:
    """Every file of the report; each appears whole or not at all."""
    looks = {arm.shown: arm.look for arm in study.arms}
    files: dict[str, bytes] = {f"figures/{name}.png": png(picture) for name, picture in drawings(made, looks).items()}
    files["results.csv"] = results_csv(study).encode()
    files["report.md"] = report_html.markdown(made).encode()
    files["report.html"] = report_html.html(made).encode()
    return [write_bytes(folder / name, data) for name, data in files.items()]


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
    files = [run.folder / "summary.json" for run in study.runs]
    newest = max((path if path.is_file() else path.parent.parent / FILE).stat().st_mtime for path in files)
    return datetime.datetime.fromtimestamp(float(fixed or newest), datetime.UTC).strftime("%Y-%m-%d")


# --------------------------------------------------------------------------- results.csv


def results_csv(study: StudyData) -> str:
    """One row a run, step and score, with all that a number needs beside it."""
    import pandas as pd

    rows = [row for arm in study.arms for run in arm.runs for row in rows_of(arm, run, study.step)]
    return str(pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(index=False, lineterminator="\n"))


def rows_of(arm: ArmData, run: Run, at: int | None) -> list[dict[str, Any]]:
    summary, made = run.summary, run.summary["provenance"]
    facts = {"arm": arm.name, "seed": run.seed, "code": made["code"], "commit": made["commit"]}
    facts |= {"data": summary["data"], "config": config_hash(run)}
    rows: list[dict[str, Any]] = []
    for anchor, known in run.anchors(at).items():
        rows += [{"step": anchor, "source": "anchor", "score": name, **found} for name, found in known.items()]
    evaluated = run.results.get("scores", {})
    for step, scores in sorted(run.scores.items()):
        n = summary["n"] if step == run.last else {}
        rows += [
            {"step": step, "source": "training", "score": name, "value": value, "n": n.get(name)}
            for name, value in scores.items()
        ]
    of = {"step": run.last, "source": "evaluation", "protocol": protocol_hash(run)}
    rows += [{**of, "score": name, **found} for name, found in evaluated.items()]
    return [
        facts | row | {"chance": metric(row["score"]).chance, "better": metric(row["score"]).better} for row in rows
    ]

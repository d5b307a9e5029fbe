"""Where a report comes from and what its words mean: provenance of every run, the glossary of scores."""

from __future__ import annotations

import re

from symbiotic.evaluation.names import metric
from symbiotic.runs import digest
from symbiotic.studies import report_tables as tables
from symbiotic.studies.report_data import StudyData
from symbiotic.studies.report_document import Block, Cell, Code, Column, Folded, Row, Table, Terms, Text
from symbiotic.studies.report_tables import SIDES, counted
from symbiotic.studies.runs_of import Run

NOT_OFFICIAL = (
    "The embedded scores are measured on the embedded corpus, some by small judges that were trained on it: none of "
    "them is MMLU, OCRBench, CLIP score or FID, and none can be compared with a published number."
)

MEANINGS = {
    "knowledge_replayed": "four-choice questions on invented facts that joint training repeats; argmax over letters",
    "knowledge_unreplayed": "the same on facts that joint training never repeats: what can be forgotten",
    "reading": "questions about rendered and handwritten digits; right when the answer stands in the greedy output",
    "embedded_acc": "generated images with all four attributes of their caption right, by the embedded classifier",
    "embedded_acc_held_out": "the same for combinations of attributes that training never showed",
    "embedded_clip": "mean cosine of image and caption in a small open_clip model trained on the embedded corpus",
    "embedded_fd": "Frechet distance between features of generated and reference images in the embedded classifier",
    "flow_error": "mean squared error of the clean latents that the model predicts from noisy ones",
    "image_ce": "cross-entropy of the codes of reference images, each given those before it, in nats a code",
    "fid": "Frechet Inception distance, by torch-fidelity",
    "kid": "kernel Inception distance, by torch-fidelity",
    "inception_score": "inception score, by torch-fidelity",
    "precision": "share of generated images inside the manifold of real ones, by torch-fidelity",
    "recall": "share of real images inside the manifold of generated ones, by torch-fidelity",
    "clip_score": "100 times the mean cosine of image and caption, by open_clip",
    "clip_cosine": "mean cosine of image and caption, by open_clip",
    "hps_v2": "human preference score v2, by open_clip with its weights",
    "hps_v2.1": "human preference score v2.1, by open_clip with its weights",
    "mmlu": "MMLU, 5-shot, mean over all questions; argmax over the letters",
    "mmlu_macro": "MMLU, 5-shot, mean over the subjects",
    "ocrbench": "OCRBench v1: answers that contain a right one",
}
OTHER_TERMS = {
    "stage 0": "the understanding-only parent that joint training starts from.",
    "iteration 0": "the model after its experts were split, before the first joint step.",
    "control": "the same training with the same understanding samples and without generation (understanding only).",
    "forgetting": "the end against stage 0.",
    "interference, synergy": "the arm against its control: for the worse, for the better, its interval excluding 0.",
    "capacity rate": "share of assignments that experts of limited capacity would keep; compare with random routing.",
    "utilisation": "exp(entropy of the load) / number of experts; 1 is even use.",
}


def provenance(study: StudyData, command: str) -> list[Block]:
    rows = []
    for arm in study.arms:
        for run in arm.runs:
            made, evaluated = run.summary["provenance"], run.results
            cells = [arm.name, str(run.seed), str(run.summary["steps"]), config_hash(run), made["code"], made["commit"]]
            cells += [run.summary["data"], run.summary["parent"], evaluated.get("weights", "as trained")]
            cells += [protocol_hash(run), evaluated.get("evaluation_code", tables.NONE)]
            rows.append(Row(run.folder.name, [*map(Cell, cells)]))
    titles = ["run", "arm", "seed", "steps", "config", "code", "commit", "data", "parent", "weights", "protocol"]
    columns = [*map(Column, [*titles, "evaluation code"])]
    versions = study.runs[0].summary["provenance"]
    listed = {name: text for name, text in versions.items() if name not in ("code", "commit")}
    text = f"Versions of the training: {', '.join(f'{name} {version}' for name, version in listed.items())}."
    caption = "Every run behind this report. Hashes: of config, computing sources, corpus, protocols."
    made_by: list[Block] = [Text(["This report was made by:"]), Code(command)] if command else []
    return [
        Text([text]),
        *made_by,
        Folded(f"{counted(len(rows), 'run')}, one by one", [Table(caption, columns, rows, words=True)]),
    ]


def protocol_hash(run: Run) -> str:
    """Of everything that decided the scores beside the model, – where only the training measured."""
    return digest(run.results["protocol"]) if run.results else tables.NONE


def config_hash(run: Run) -> str:
    """Of what decides the training: as the evaluation says, else as the folder's name does."""
    named = re.search(r"-([0-9a-f]{8})-seed", run.folder.name)
    return str(run.results.get("provenance", {}).get("config") or (named[1] if named else tables.NONE))


def glossary(study: StudyData) -> list[Block]:
    """Every score of the report: what it is, which direction is better, chance, and on how many samples."""
    terms = {}
    for side in SIDES:
        for name in tables.scores_of(study.arms, side):
            facts, counts = metric(name), sorted({n for arm in study.arms for n in arm.samples(name, study.step)})
            what = [MEANINGS.get(name, "as its benchmark defines it")]
            what += [f"{facts.better} is better"]
            what += [f"chance {facts.chance:g}"] if facts.chance is not None else []
            what += [f"n {' or '.join(map(str, counts))}"] if counts else []
            terms[facts.title if facts.title == name else f"{facts.title} ({name})"] = "; ".join(what) + "."
    terms |= OTHER_TERMS
    return [Terms(terms), Text([NOT_OFFICIAL])]

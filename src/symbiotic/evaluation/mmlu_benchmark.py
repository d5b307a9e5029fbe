"""MMLU (Hendrycks et al., arXiv 2009.03300), run by lm-eval on a local folder in either official layout."""

from __future__ import annotations

import functools
import hashlib
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from symbiotic.evaluation.assets import asset, at_least
from symbiotic.evaluation.benchmark import Benchmark, Record, Value, mean
from symbiotic.evaluation.caption_lists import files_hash
from symbiotic.evaluation.context import Context
from symbiotic.evaluation.lm_eval_adapter import Answering, Document, run_task, task_facts
from symbiotic.evaluation.mmlu import LETTERS, Question, mmlu_files, read_mmlu
from symbiotic.evaluation.prompts import MAX_TOKENS

KEY = "evaluation.benchmarks.mmlu"
MMLU_FROM = "the authors' archive of CSV files, or the parquet files of cais/mmlu"

_STEM = """abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science
    college_mathematics college_physics computer_security conceptual_physics electrical_engineering
    elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
    high_school_mathematics high_school_physics high_school_statistics machine_learning"""
_HUMANITIES = """formal_logic high_school_european_history high_school_us_history high_school_world_history
    international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory
    professional_law world_religions"""
_SOCIAL_SCIENCES = """econometrics high_school_geography high_school_government_and_politics
    high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
    professional_psychology public_relations security_studies sociology us_foreign_policy"""
_OTHER = """business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing
    medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology"""
CATEGORIES = {
    "stem": _STEM.split(),
    "humanities": _HUMANITIES.split(),
    "social_sciences": _SOCIAL_SCIENCES.split(),
    "other": _OTHER.split(),
}
OFFICIAL_COUNTS = {"stem": 3153, "humanities": 4705, "social_sciences": 3077, "other": 3107}
"""Questions of each category: 14,042."""
OFFICIAL_SHOTS = 5


class MMLU(Benchmark):
    """`mmlu` (mean over all 14,042 questions), `mmlu_macro` (mean over the 57 subjects), `mmlu/stem` and the other
    categories, `mmlu/{subject}`; of any other set of questions, or not behind five shots, `mmlu_share`,
    `mmlu_share_macro`, `mmlu_share/stem` and so on, which nobody takes for them.

    Categories are those of lm-eval's mmlu (the authors' own script counts anatomy under other, not under STEM).
    A prompt has the first `shots` items of its subject's dev file; the answer is the letter of highest log-probability
    among " A" to " D". A prompt that is too long loses shots, the last first, as in the authors' script, and stays
    official.

    Args:
        folder: in one of the layouts of `read_mmlu`; null: `mmlu/` of the assets.
        max_tokens: of a prompt with its answer. null: no limit, however far beyond the lengths of the training that is.
    """

    name = "mmlu"

    def __init__(self, folder: str | None = None, shots: int = 5, max_tokens: int | None = MAX_TOKENS) -> None:
        at_least(KEY, 0, shots=shots)
        if max_tokens is not None:
            at_least(KEY, 1, max_tokens=max_tokens)
        self.folder, self.shots, self.max_tokens = folder, shots, max_tokens

    def found(self) -> Path:
        """Raises MissingAsset."""
        return asset(self.folder, "mmlu", key=f"{KEY}.folder", how=MMLU_FROM)

    def protocol(self) -> Mapping[str, Any]:
        folder = self.found()
        splits = ("test", "dev") if self.shots else ("test",)
        return {
            "files": files_hash([path for split in splits for path in mmlu_files(folder, split)]),
            "shots": self.shots,
            "max_tokens": self.max_tokens,
            "score": "argmax of the log-probabilities of ' A' to ' D'",
            **task_facts("mmlu"),
        }

    def run(self, model: nn.Module, context: Context) -> Iterator[tuple[str, Value]]:
        documents = self.documents(context)
        answering = Answering(
            model,
            context.tokenizer,
            functools.partial(context.measured, self.name),
            described,
            batch_size=context.batch_size,
        )
        run_task("mmlu", self.fitted(documents, answering, context.problems), answering)
        yield from scores(answering.records)

    def documents(self, context: Context) -> list[Document]:
        """One for each usable question that is to be asked."""
        questions, problems = read_mmlu(self.found(), "test")
        dev, more = read_mmlu(self.found(), "dev") if self.shots else ([], [])
        context.problems += problems + more
        shots: dict[str, list[Question]] = {}
        for question in dev:
            shots.setdefault(question.subject, []).append(question)
        chosen = context.chosen(questions)
        for subject in dict.fromkeys(question.subject for question in chosen):
            count = len(shots.get(subject, []))
            if count < self.shots:
                context.problems.append(f"mmlu: {subject}: {count} usable rows in its dev file, of {self.shots} shots")
        return [document(question, shots.get(question.subject, [])[: self.shots]) for question in chosen]

    def fitted(self, documents: list[Document], answering: Answering, problems: list[str]) -> list[Document]:
        """The documents with as many shots as fit; those that do not fit without any are named and left out."""
        if self.max_tokens is None:
            return documents
        kept: list[Document] = []
        lost: Counter[int] = Counter()
        for whole in documents:
            for shorter in fewer_shots(whole):
                tokens = sum(map(len, answering.pair(prompt(shorter), " A")))
                if tokens <= self.max_tokens:
                    kept.append(shorter)
                    lost[len(shorter["shots"])] += shorter["lost"] > 0
                    break
            else:
                problems.append(f"mmlu: {whole['id']}: {tokens} tokens without shots; max_tokens={self.max_tokens}")
        if lost.total():
            left = ", ".join(f"{number} with {count}" for count, number in sorted(lost.items()) if number)
            of = f"{lost.total()} of {len(kept)} prompts"
            problems.append(f"mmlu: {of} lost shots to max_tokens={self.max_tokens}: {left}")
        return kept


def fewer_shots(whole: Document) -> Iterator[Document]:
    """The document, then with one shot less, down to none."""
    yield whole
    for count in range(len(whole["shots"]) - 1, -1, -1):
        yield {**whole, "shots": whole["shots"][:count], "lost": len(whole["shots"]) - count}


def document(question: Question, shots: Sequence[Question]) -> Document:
    return {
        "id": f"{question.subject}/{question.row}",
        "subject": question.subject,
        **asked(question),
        "shots": [asked(shot) for shot in shots],
        "lost": 0,
    }


def asked(question: Question) -> dict[str, Any]:
    return {"question": question.question, "choices": question.choices, "answer": question.answer}


def prompt(document: Document) -> str:
    """The `doc_to_text` of the task: the stock description, the shots with their answers, the question without."""
    subject = document["subject"].replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    shots = "".join(f"{rendered(shot)} {LETTERS[shot['answer']]}\n\n" for shot in document["shots"])
    return head + shots + rendered(document)


def rendered(item: Mapping[str, Any]) -> str:
    choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, item["choices"], strict=True))
    return f"{item['question'].strip()}\n{choices}Answer:"


def described(document: Document, prompt: str, log_probs: Sequence[float]) -> Record:
    chosen = int(np.argmax(log_probs))
    return {
        "id": document["id"],
        "subject": document["subject"],
        "shots": len(document["shots"]),
        "lost": document["lost"],
        "prompt": hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16],
        "answer": LETTERS[document["answer"]],
        "prediction": LETTERS[chosen],
        "correct": chosen == document["answer"],
    }


def scores(records: Sequence[Record]) -> Iterator[tuple[str, Value]]:
    """All scores, from the records alone."""
    subjects: dict[str, list[bool]] = {}
    for record in records:
        subjects.setdefault(record["subject"], []).append(record["correct"])
    categories = {
        key: [right for name in names for right in subjects.get(name, [])] for key, names in CATEGORIES.items()
    }
    counts = {category: len(right) for category, right in categories.items()}
    five = all(record["shots"] + record["lost"] == OFFICIAL_SHOTS for record in records)
    official = counts == OFFICIAL_COUNTS and sum(counts.values()) == len(records) and five
    name = "mmlu" if official else "mmlu_share"
    yield name, mean([record["correct"] for record in records])
    means = [statistics.fmean(right) for right in subjects.values()]
    yield f"{name}_macro", Value(mean(means).value, len(records))
    for part, right in {**categories, **subjects}.items():
        if right:
            yield f"{name}/{part}", mean(right)

"""Understanding on the embedded corpus: four-choice questions, and reading of digits and colours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import nn

from symbiotic.data.errors import DataError
from symbiotic.data.formats import question_parts, reading_parts, render_knowledge_prompt
from symbiotic.data.packing import Sample, build_sample
from symbiotic.data.tokenizer import Tokenizer
from symbiotic.evaluation.benchmark import Benchmark, Record, Value, mean
from symbiotic.evaluation.context import Context
from symbiotic.evaluation.mmlu import LETTERS, Question, read_mmlu
from symbiotic.evaluation.ocrbench import Entry, correct, read_ocrbench
from symbiotic.evaluation.prompts import answers, letter_log_probs

MAX_ANSWER_TOKENS = 4


class Knowledge(Benchmark):
    """Four-choice questions of both halves of the facts. One prompt a question, no shots (the model is trained so)."""

    name = "knowledge"

    def __init__(self, folder: Path, questions: int) -> None:
        self.folder, self.per_half = folder, questions // 2

    def protocol(self) -> dict[str, object]:
        return {"questions": self.per_half, "shots": 0, "score": "argmax over the letters"}

    def run(self, model: nn.Module, context: Context) -> Iterator[tuple[str, Value]]:
        for half in ("replayed", "unreplayed"):
            questions, problems = read_mmlu(self.folder, "test", (half,))
            context.problems += problems
            chosen = context.chosen(questions, self.per_half)
            measure = lambda some: answered(model, some, context.tokenizer)  # noqa: E731
            records = context.measured(f"knowledge_{half}", chosen, measure)
            yield f"knowledge_{half}", mean([record["correct"] for record in records])


def answered(model: nn.Module, questions: Sequence[Question], tokenizer: Tokenizer) -> list[Record]:
    """The letter of highest probability behind each question, and the log-probabilities of all four."""
    scores = letter_log_probs(model, [question_sample(question, tokenizer) for question in questions], tokenizer)
    choices = scores.argmax(-1).tolist()
    return [
        {
            "id": question.row,
            "question": question.question,
            "choices": question.choices,
            "answer": LETTERS[question.answer],
            "prediction": LETTERS[choice],
            "log_probs": [round(score, 4) for score in row],
            "correct": choice == question.answer,
        }
        for question, choice, row in zip(questions, choices, scores.tolist(), strict=True)
    ]


def question_sample(question: Question, tokenizer: Tokenizer) -> Sample:
    prompt = render_knowledge_prompt(question.question, question.choices)
    return build_sample(f"{question.subject}/{question.row}", "lm", question_parts(prompt, tokenizer))


class Reading(Benchmark):
    """Questions about images of digit strings, half of them handwritten; greedy answers, OCRBench's rule."""

    name = "reading"

    def __init__(self, folder: Path, readings: int) -> None:
        self.path, self.readings = folder / "reading.json", readings

    def protocol(self) -> dict[str, object]:
        return {"readings": self.readings, "max_new_tokens": MAX_ANSWER_TOKENS, "score": "OCRBench's rule"}

    def run(self, model: nn.Module, context: Context) -> Iterator[tuple[str, Value]]:
        entries, problems = read_ocrbench(self.path)
        context.problems += problems
        limit = getattr(getattr(model, "cfg", None), "max_grid", None)
        chosen = context.chosen(entries, self.readings)
        usable, samples = context.kept(chosen, lambda entry: reading_sample(entry, context.tokenizer, limit))

        def measure(some: Sequence[tuple[Entry, Sample]]) -> list[Record]:
            made = answers(model, [sample for _, sample in some], context.tokenizer, MAX_ANSWER_TOKENS, len(some))
            return [judged(entry, prediction) for (entry, _), prediction in zip(some, made, strict=True)]

        records = context.measured(self.name, list(zip(usable, samples, strict=True)), measure)
        yield self.name, mean([record["correct"] for record in records])


def judged(entry: Entry, prediction: str) -> Record:
    given = {"id": entry.id, "type": entry.type, "question": entry.question, "answers": entry.answers}
    ok = correct(prediction, entry.answers, entry.dataset_name)
    return {**given, "prediction": prediction, "correct": ok}


def reading_sample(entry: Entry, tokenizer: Tokenizer, max_grid: int | None) -> Sample:
    """Raises DataError: an image that cannot be read, or is larger than the model takes."""
    sample = build_sample(entry.id, "mmu", reading_parts(entry.pixels(), entry.question, tokenizer))
    if max_grid is not None and int(sample.vit_grid.max()) >= max_grid:
        raise DataError(f"{entry.where}: larger than {max_grid} patches a side (model.max_grid)")
    return sample

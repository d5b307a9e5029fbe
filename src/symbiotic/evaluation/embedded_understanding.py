"""Understanding on the embedded corpus: four-choice questions, and reading of digits and colours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from symbiotic.data.errors import DataError
from symbiotic.data.formats import question_parts, reading_parts, render_knowledge_prompt
from symbiotic.data.packing import Sample, build_sample
from symbiotic.data.tokenizer import Tokenizer
from symbiotic.evaluation.benchmark import Benchmark, Context, Record, Value, batches, device_of, kept, mean
from symbiotic.evaluation.mmlu import LETTERS, Question, read_mmlu
from symbiotic.evaluation.ocrbench import Entry, correct, load_image, read_ocrbench
from symbiotic.evaluation.prompts import answers, one_a_row
from symbiotic.generation.text import last_logits

MAX_ANSWER_TOKENS = 4


class Knowledge(Benchmark):
    """Four-choice questions of both halves of the facts. One prompt a question, no shots (the model is trained so)."""

    name = "knowledge"

    def __init__(self, folder: Path, tokenizer: Tokenizer, questions: int) -> None:
        self.folder, self.tokenizer, self.per_half = folder, tokenizer, questions // 2

    def run(self, model: nn.Module, context: Context) -> Iterator[tuple[str, Value]]:
        for half in ("replayed", "unreplayed"):
            questions, problems = read_mmlu(self.folder, "test", (half,))
            context.problems += problems
            yield f"knowledge_{half}", self.accuracy(model, questions[: self.per_half], context)

    def accuracy(self, model: nn.Module, questions: Sequence[Question], context: Context) -> Value:
        right: list[bool] = []
        letters = torch.tensor(self.tokenizer.letters)
        for some in batches(questions, context.batch_size):
            batch = one_a_row([self.sample(question) for question in some]).to(device_of(model))
            scores = last_logits(model, batch)[:, letters.to(batch.tokens.device)].log_softmax(-1).cpu()
            for question, row in zip(some, scores, strict=True):
                choice = int(row.argmax())
                right.append(choice == question.answer)
                context.records.append(self.record(question, choice, row.tolist()))
        return mean(right)

    def sample(self, question: Question) -> Sample:
        prompt = render_knowledge_prompt(question.question, question.choices)
        return build_sample(f"{question.subject}/{question.row}", "lm", question_parts(prompt, self.tokenizer))

    def record(self, question: Question, choice: int, scores: list[float]) -> Record:
        return {
            "benchmark": f"knowledge_{question.subject}",
            "id": question.row,
            "question": question.question,
            "choices": question.choices,
            "answer": LETTERS[question.answer],
            "prediction": LETTERS[choice],
            "log_probs": [round(score, 4) for score in scores],
            "correct": choice == question.answer,
        }


class Reading(Benchmark):
    """Questions about images of digit strings, half of them handwritten; greedy answers, OCRBench's rule."""

    name = "reading"

    def __init__(self, folder: Path, tokenizer: Tokenizer, readings: int) -> None:
        self.path, self.tokenizer, self.readings = folder / "reading.json", tokenizer, readings

    def run(self, model: nn.Module, context: Context) -> Iterator[tuple[str, Value]]:
        entries, problems = read_ocrbench(self.path)
        context.problems += problems
        limit = getattr(getattr(model, "cfg", None), "max_grid", None)
        usable, samples = kept(entries[: self.readings], lambda entry: self.sample(entry, limit), context)
        made = answers(model, samples, self.tokenizer, MAX_ANSWER_TOKENS, context.batch_size)
        right = [correct(m, entry.answers, entry.dataset_name) for m, entry in zip(made, usable, strict=True)]
        for entry, prediction, ok in zip(usable, made, right, strict=True):
            given = {"id": entry.id, "type": entry.type, "question": entry.question, "answers": entry.answers}
            context.records.append({"benchmark": self.name, **given, "prediction": prediction, "correct": ok})
        yield self.name, mean(right)

    def sample(self, entry: Entry, max_grid: int | None) -> Sample:
        pixels = load_image(entry.image)
        sample = build_sample(entry.id, "mmu", reading_parts(pixels, entry.question, self.tokenizer))
        if max_grid is not None and int(sample.vit_grid.max()) >= max_grid:
            raise DataError(f"{entry.image}: larger than {max_grid} patches a side (model.max_grid)")
        return sample

"""What `src/ask.py` does: questions in front of a run's model, in the sequences of training and evaluation."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symbiotic.data.errors import DataError, readable_errors
from symbiotic.data.formats import question_parts, reading_parts, render_knowledge_prompt
from symbiotic.data.packing import Sample, build_sample
from symbiotic.data.tokenizer import LETTERS, Tokenizer
from symbiotic.evaluation.benchmark import batches, measuring, write_jsonl
from symbiotic.evaluation.prompts import answers, letter_log_probs
from symbiotic.runs import digest
from symbiotic.studies.ask import Question, Request
from symbiotic.studies.inputs import fitting, unknown_line
from symbiotic.trained import Trained, open_run


@dataclass(frozen=True)
class Answer:
    """answer: the words, or the letter of a choice. probabilities: of the four letters."""

    question: Question
    answer: str
    probabilities: list[float] | None = None


def answer(request: Request, questions: Sequence[Question]) -> tuple[list[Answer], list[str]]:
    """The answers to what can be asked, in order, and a line for each question whose image cannot be used.

    Raises:
        ConfigError, RunError: what is missing or wrong, in one line. DataError: no question is left.
    """
    trained = open_run(
        request.run,
        checkpoint=request.checkpoint,
        step=request.step,
        ema=request.ema,
        data=request.data,
        device=request.device,
    )
    usable, samples, problems = prepared(questions, trained)
    if not usable:
        raise DataError(problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))
    texts = [text for asked in usable for text in (asked.question, *(asked.choices or ()))]
    warning = unknown_line(texts, trained.tokenizer)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    return answered(trained, usable, samples, request), problems


def prepared(questions: Sequence[Question], trained: Trained) -> tuple[list[Question], list[Sample], list[str]]:
    """The questions that the model can take, their samples, and what is wrong with the others."""
    usable: list[Question] = []
    samples: list[Sample] = []
    problems: list[str] = []
    for asked in questions:
        try:
            samples.append(sample_of(asked, trained.tokenizer, trained.config.model.max_grid))
            usable.append(asked)
        except DataError as error:
            problems.append(str(error))
    return usable, samples, problems


def sample_of(asked: Question, tokenizer: Tokenizer, max_grid: int) -> Sample:
    """Raises DataError: an image that cannot be read, or that the model cannot take."""
    prompt = asked.question if asked.choices is None else render_knowledge_prompt(asked.question, asked.choices)
    if asked.image is None:
        return build_sample("question", "lm", question_parts(prompt, tokenizer))
    return build_sample("question", "mmu", reading_parts(fitting(asked.image, max_grid), prompt, tokenizer))


def answered(
    trained: Trained, questions: Sequence[Question], samples: Sequence[Sample], request: Request
) -> list[Answer]:
    """In the order of the questions; those with choices by letter, the others decoded."""
    model, tokenizer = trained.model, trained.tokenizer
    chosen = [i for i, asked in enumerate(questions) if asked.choices is not None]
    free = [i for i, asked in enumerate(questions) if asked.choices is None]
    found: dict[int, Answer] = {}
    with measuring(model):
        texts = answers(model, [samples[i] for i in free], tokenizer, request.max_new_tokens, request.batch_size)
        found |= {i: Answer(questions[i], text) for i, text in zip(free, texts, strict=True)}
        for some in batches(chosen, request.batch_size):
            shares = letter_log_probs(model, [samples[i] for i in some], tokenizer).exp().tolist()
            for i, share in zip(some, shares, strict=True):
                best = LETTERS[share.index(max(share))]
                found[i] = Answer(questions[i], best, [round(value, 6) for value in share])
    return [found[i] for i in range(len(questions))]


def write_answers(request: Request, found: Sequence[Answer]) -> Path:
    """`answers.jsonl`; an earlier one is replaced.

    Raises:
        DataError: it cannot be written.
    """
    path = Path(request.out or Path(request.run) / "answers" / slug(request)) / "answers.jsonl"
    with readable_errors("write answers", path):
        return write_jsonl(path, map(row, found))


def row(found: Answer) -> dict[str, Any]:
    """What was asked and answered; keys without a value are left out."""
    asked = {"question": found.question.question, "image": found.question.image, "choices": found.question.choices}
    values = {**asked, "answer": found.answer, "probabilities": found.probabilities}
    return {key: value for key, value in values.items() if value is not None}


def slug(request: Request) -> str:
    """`questions-1a2b3c`: the file's name, and another folder for other files and weights."""
    asked = (request.questions, request.checkpoint, request.step, request.ema, request.max_new_tokens)
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', Path(str(request.questions)).stem)}-{digest(asked)[:6]}"

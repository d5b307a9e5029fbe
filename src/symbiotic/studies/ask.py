"""`python src/ask.py run=… question=…`: answers of any run, decoded as in evaluation.

This file reads the command line; `answering` does the work, and torch is imported when there is something to answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from symbiotic.schema import ConfigError
from symbiotic.studies.batch_file import check_file, check_text, read_rows, report_left_out
from symbiotic.studies.request import (
    check_device,
    check_weights_choice,
    command,
    flag,
    parse_request,
    run_folder,
    whole,
)

if TYPE_CHECKING:
    from symbiotic.studies.answering import Answer

USAGE = """\
python src/ask.py run=FOLDER question="WORDS" [key=value ...]

Prints the answer to a question, with or without an image: decoded greedily, or with choices, the letter of highest
probability and the probabilities of all four.

  run=FOLDER       the folder of a run (it holds config.yaml), or of a cached parent
  question=WORDS   a question; or
  questions=FILE   .txt, one question a line; .jsonl, {"question": "…", "image": "…", "choices": ["…", …]} a line, where
                   image (relative to the file) and choices may be left out. Writes answers.jsonl. A line that cannot be
                   used is named, the others are answered, and the exit status is 1
  image=FILE       that the question is about
  choices=A|B|C|D  four texts to choose from
  max_new_tokens=16
                   of an answer
  out=FOLDER       where answers.jsonl goes (default: answers/… in the run folder)
  checkpoint=FILE  weights, .safetensors or .ckpt (default: those that the run ended with)
  step=N           the checkpoint of this optimiser step; 0: what joint training started from
  ema=true         the averaged weights that the run ended with
  data=FOLDER      where the corpora lie, if they were moved
  batch_size=32    questions at a time
  device=cpu       where the model runs

python src/ask.py run=runs/symbiotic/symbiotic-…-seed0 question="what number is it ?" image=digits.png
"""


@dataclass(frozen=True)
class Request:
    """What the command line asks for; `USAGE` says what the keys mean."""

    run: str
    question: str | None = None
    questions: str | None = None
    image: str | None = None
    choices: tuple[str, ...] | None = None
    max_new_tokens: int = 16
    out: str | None = None
    checkpoint: str | None = None
    step: int | None = None
    ema: bool = False
    data: str | None = None
    batch_size: int = 32
    device: str = "cpu"


@dataclass(frozen=True)
class Question:
    """A line of a file of questions."""

    question: str
    image: str | None = None
    choices: tuple[str, ...] | None = None


def options(text: str) -> Any:
    return [part.strip() for part in text.split("|")]


READ = {"max_new_tokens": whole, "step": whole, "batch_size": whole, "ema": flag, "choices": options}


def check_request(request: Request) -> None:
    """Raises ConfigError where values are out of range, exclude each other, or name what is not there."""
    if (request.question is None) == (request.questions is None):
        raise ConfigError("question=WORDS asks one question, questions=FILE those of a file; give one of the two")
    for name in ("image", "choices"):
        if request.questions is not None and getattr(request, name) is not None:
            raise ConfigError(f"{name}: has no effect here: each line of questions={request.questions} has its own")
    if request.question is not None and request.out is not None:
        raise ConfigError(f"out={request.out}: has no effect here: the answer to one question is printed")
    for name in ("max_new_tokens", "batch_size"):
        if getattr(request, name) < 1:
            raise ConfigError(f"{name}={getattr(request, name)}: must be at least 1")
    check_device(request.device)
    check_weights_choice(request.checkpoint, request.step, request.ema)
    run_folder(request.run)
    if request.questions is not None:
        check_file("questions", request.questions)
    else:
        check_question(Question(request.question or "", request.image, request.choices))


def check_question(asked: Question) -> None:
    """Raises ConfigError."""
    for key, text in [("question", asked.question), *(("choices", text) for text in asked.choices or ())]:
        check_text(key, text)
    if asked.choices is not None and len(asked.choices) != 4:
        raise ConfigError(f"choices={'|'.join(asked.choices)}: must be four texts, A|B|C|D")
    if asked.image is not None and not Path(asked.image).is_file():
        raise ConfigError(f"image={asked.image}: no such file")


def read_questions(request: Request) -> tuple[list[Question], list[str]]:
    """What is asked, and what is wrong with lines of the file.

    Raises:
        RunError: a file without a usable line.
    """
    if request.questions is None:
        return [Question(request.question or "", request.image, request.choices)], []
    beside = Path(request.questions).parent

    def located(line: Question) -> Question:
        return line if line.image is None else replace(line, image=str(beside / line.image))

    check = lambda line: check_question(located(line))  # noqa: E731
    lines, problems = read_rows(request.questions, Question, "question", check)
    return [located(line) for line in lines], problems


def ask(request: Request) -> None:
    """Print the answer, or write those of a file and print where they lie.

    Raises:
        ConfigError, RunError, DataError: what is missing or wrong, in one line; a bad line after all others.
    """
    questions, problems = read_questions(request)
    from symbiotic.studies.answering import answer, write_answers  # torch: seconds

    answers, unusable = answer(request, questions)
    if request.questions is None:
        print(shown(answers[0]))
        return
    path = write_answers(request, answers)
    print(f"{len(answers)} answers: {path}")
    report_left_out([*problems, *unusable], f"the answers to the others are in {path}")


def shown(answer: Answer) -> str:
    """The answer; with choices, below it what each of them gets."""
    if answer.probabilities is None:
        return answer.answer
    choices = answer.question.choices or ()
    rows = zip("ABCD", answer.probabilities, choices, strict=True)
    return "\n".join([answer.answer, *(f"  {letter}  {share:.3f}  {text}" for letter, share, text in rows)])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""

    def act(given: Sequence[str]) -> None:
        request = parse_request(Request, given, READ)
        check_request(request)
        ask(request)

    return command(USAGE, act, arguments)

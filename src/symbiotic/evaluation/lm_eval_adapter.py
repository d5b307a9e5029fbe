"""A model of ours as lm-eval sees it, and a task of ours run by lm-eval.

lm-eval renders the prompts, makes the requests and scores the answers. Its requests are answered document by document
through `Context.measured`: an interrupted evaluation goes on where it was, and every answer is a record.

    documents -> tasks/*.yaml -> requests -> `language_model` -> records and lm-eval's own scores
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from symbiotic.data.formats import reading_parts
from symbiotic.data.packing import Sample, Text, build_sample
from symbiotic.data.tokenizer import BOS, EOS, Tokenizer
from symbiotic.evaluation.assets import content_hash, versions
from symbiotic.evaluation.benchmark import Record
from symbiotic.evaluation.continuations import Continuation, continuation_scores
from symbiotic.evaluation.prompts import answers

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager

TASKS = Path(__file__).parent / "tasks"
MAX_NEW_TOKENS = 256
"""Where a task says nothing; lm-eval's default."""

Document = Mapping[str, Any]
Measured = Callable[[Sequence[Any], Callable[[Sequence[Any]], Sequence[Record]]], list[Record]]


class Documents(list[Document]):
    """Documents of a task, as lm-eval takes them; no table format comes between, so that every text stays one."""

    @property
    def features(self) -> dict[str, None]:
        return dict.fromkeys(self[0])


@dataclass
class Answering:
    """How requests are answered.

    Args:
        measured: keeps the records, as `Context.measured` of one benchmark does.
        describe: what a record says beside the answer, of (document, prompt, answer). An answer is a text, or the
            log-probabilities of the choices.
        pixels: uint8 [H, W, 3] of what the task's `doc_to_image` gave.
    """

    model: nn.Module
    tokenizer: Tokenizer
    measured: Measured
    describe: Callable[[Document, str, Any], Record]
    pixels: Callable[[Any], np.ndarray] | None = None
    batch_size: int = 96
    records: list[Record] = field(default_factory=list)
    """Of all documents, once they were asked."""

    def encode(self, text: str) -> tuple[int, ...]:
        return (BOS, *self.tokenizer.encode(text))

    def pair(self, prompt: str, continuation: str) -> Continuation:
        """Split as lm-eval does: spaces at the end of the prompt go to the continuation, whose tokens are those that
        the whole text has behind the prompt's. Where that is none, as one token covers both, the continuation's own."""
        end = len(prompt.rstrip())
        head, whole = self.encode(prompt[:end]), self.encode(prompt + continuation)
        return Continuation(head, whole[len(head) :] or tuple(self.tokenizer.encode(continuation)) or (EOS,))

    def ask(self, items: Sequence[Any], measure: Callable[[Sequence[Any]], list[Record]]) -> list[Record]:
        self.records = self.measured(items, measure)
        return self.records

    def choose(self, documents: Sequence[Sequence[Instance]]) -> list[Record]:
        """A record for each document (its requests): the log-probabilities of the continuations."""
        wanted = [self.pair(*request.args[:2]) for requests in documents for request in requests]
        scores = iter(continuation_scores(self.model, wanted, self.batch_size))
        records = []
        for requests in documents:
            log_probs, greedy = zip(*itertools.islice(scores, len(requests)), strict=True)
            described = self.describe(requests[0].doc, requests[0].args[0], log_probs)
            records.append({**described, "log_probs": log_probs, "greedy": greedy})
        return records

    def write(self, requests: Sequence[Instance]) -> list[Record]:
        """A record for each request: the greedily decoded answer. A task's requests share their settings."""
        settings = requests[0].args[1]
        limit, until = int(settings.get("max_gen_toks", MAX_NEW_TOKENS)), settings.get("until") or ()
        samples = [self.sample(*request.args) for request in requests]
        texts = [cut(text, until) for text in answers(self.model, samples, self.tokenizer, limit, self.batch_size)]
        return [
            {**self.describe(request.doc, request.args[0], text), "prediction": text}
            for request, text in zip(requests, texts, strict=True)
        ]

    def sample(self, prompt: str, settings: Mapping[str, Any], media: Mapping[str, Any] | None = None) -> Sample:
        """The prompt as a sequence of training: words, or an image and words."""
        if media is None or self.pixels is None:
            return build_sample("", "lm", [Text(list(self.encode(prompt)))])
        (image,) = media["visual"]
        return build_sample("", "mmu", reading_parts(self.pixels(image), prompt, self.tokenizer))


def cut(text: str, until: Sequence[str]) -> str:
    """The text up to the first of the stop texts."""
    return min((text.split(stop)[0] for stop in until if stop), key=len, default=text)


def language_model(answering: Answering) -> TemplateLM:
    """The model as an object of lm-eval's, whose library is imported only here and below."""
    from lm_eval.api.model import TemplateLM

    class UnifiedLM(TemplateLM):
        MULTIMODAL = True
        eot_token_id = EOS
        prefix_token_id = BOS

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return list(answering.encode(string))[add_special_tokens is False :]

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            wanted = [Continuation(tuple(prompt), tuple(tokens)) for _, prompt, tokens in requests]
            return continuation_scores(answering.model, wanted, answering.batch_size)

        def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            groups = itertools.groupby(requests, lambda request: (request.task_name, request.doc_id))
            records = answering.ask([list(document) for _, document in groups], answering.choose)
            return [pair for record in records for pair in zip(record["log_probs"], record["greedy"], strict=True)]

        def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
            wanted = [answering.pair("", request.args[0]) for request in requests]
            return [score for score, _ in continuation_scores(answering.model, wanted, answering.batch_size)]

        def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
            return [record["prediction"] for record in answering.ask(requests, answering.write)]

    return UnifiedLM()


def task_facts(name: str) -> dict[str, str]:
    """What of a task belongs to a protocol: its file, and the library that runs it.

    Raises:
        MissingAsset: the library is not installed.
    """
    return {"task": content_hash(TASKS / f"{name}.yaml"), **versions("lm-eval")}


def run_task(name: str, documents: Sequence[Document], answering: Answering) -> dict[str, float]:
    """Have lm-eval run `tasks/{name}.yaml` on the documents.

    Returns:
        lm-eval's own scores by `metric,filter`; what they rest on is in `answering.records`. Empty without documents.
    """
    if not documents:
        return {}
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from lm_eval import simple_evaluate

    with quiet():
        found = simple_evaluate(
            language_model(answering),
            tasks=[f"symbiotic_{name}"],
            task_manager=task_manager(documents),
            bootstrap_iters=0,
            log_samples=False,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
            fewshot_random_seed=None,
        )
    scores = found["results"][f"symbiotic_{name}"]
    return {key: value for key, value in scores.items() if isinstance(value, float)}


def task_manager(documents: Sequence[Document]) -> TaskManager:
    from lm_eval.tasks import TaskManager

    listed = Documents(documents)
    return TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"documents": lambda: listed})


def dataset(documents: Callable[[], Documents], **_: Any) -> dict[str, Documents]:
    """The `custom_dataset` of the tasks, from the manager's metadata; a function, as metadata is copied deeply."""
    return {"test": documents()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's progress bars, its advice, and what it draws from the global random state."""
    logger, drawn = logging.getLogger("lm_eval"), random.getstate()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        random.setstate(drawn)

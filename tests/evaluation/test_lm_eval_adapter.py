"""Our model as lm-eval sees it, against lm-eval's own tokenising and scoring and against single forwards."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from factory import build
from symbiotic.data.packing import Text, build_sample
from symbiotic.data.tokenizer import BOS, EOS, Tokenizer
from symbiotic.evaluation import continuations, prompts
from symbiotic.evaluation.benchmark import Record
from symbiotic.evaluation.continuations import Continuation, continuation_scores
from symbiotic.evaluation.lm_eval_adapter import TASKS, Answering, cut, language_model, run_task
from symbiotic.evaluation.prompts import answers, one_a_row
from symbiotic.generation.text import last_logits

TOKENIZER = Tokenizer.build(["a", "b", "c", "d", "e", "foo", "bar", "foobar", ".", ":", ","])
PAIRS = [("a b", " c"), ("a b", " d"), ("a b ", "c d e"), ("", "a b"), ("a", " b c"), ("a: b. ", " 12"), ("a", " b c")]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build("symbiotic", seed=2, vocab_size=TOKENIZER.vocab_size, init_std=0.5).eval()


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def plainly(items: Sequence[Any], measure: Callable[[Sequence[Any]], Sequence[Record]]) -> list[Record]:
    return list(measure(items))


def answering(model: torch.nn.Module) -> Answering:
    return Answering(model, TOKENIZER, plainly, lambda document, prompt, answer: {"prompt": prompt}, batch_size=3)


def request(kind: str, number: int, *arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0, metadata=("task", number, 1))


def one_by_one(model: torch.nn.Module, wanted: Continuation) -> tuple[float, bool]:
    """The chain rule: a forward for each token."""
    score, greedy, row = 0.0, True, list(wanted.prompt)
    for token in wanted.tokens:
        log_probs = last_logits(model, one_a_row([build_sample("", "lm", [Text(row)])])).log_softmax(-1)[0]
        score, greedy = score + float(log_probs[token]), greedy and int(log_probs.argmax()) == token
        row = [*row, token]
    return score, greedy


def test_log_probabilities_are_those_of_single_forwards(model: torch.nn.Module) -> None:
    wanted = [answering(model).pair(*pair) for pair in PAIRS]
    following = int(last_logits(model, one_a_row([build_sample("", "lm", [Text([BOS, 9])])])).argmax())
    wanted.append(Continuation((BOS, 9), (following,)))
    found = continuation_scores(model, wanted, batch_size=3)
    expected = [one_by_one(model, one) for one in wanted]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert found[-1][1]


def test_continuations_of_one_token_share_a_row(monkeypatch: pytest.MonkeyPatch, model: torch.nn.Module) -> None:
    rows: list[int] = []
    monkeypatch.setattr(continuations, "one_a_row", lambda samples: rows.append(len(samples)) or one_a_row(samples))
    wanted = [Continuation((BOS, 8, 9), (token,)) for token in TOKENIZER.letters]
    continuation_scores(model, wanted, batch_size=3)
    assert rows == [1]


def test_long_rows_go_in_smaller_batches(monkeypatch: pytest.MonkeyPatch, model: torch.nn.Module) -> None:
    monkeypatch.setattr(prompts, "MASK_PLACES", 32)
    assert list(prompts.by_length([11, 1, 4, 2, 3, 10], 3)) == [[1, 3, 4], [2], [5], [0]]
    wanted = [answering(model).pair(*pair) for pair in PAIRS]
    small = continuation_scores(model, wanted, batch_size=3)
    monkeypatch.undo()
    assert [s for s, _ in small] == pytest.approx([s for s, _ in continuation_scores(model, wanted, 96)], rel=1e-5)


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair[0]])
def test_pairs_are_split_as_lm_eval_splits_them(model: torch.nn.Module, pair: tuple[str, str]) -> None:
    head, tail = language_model(answering(model))._encode_pair(*pair)
    assert answering(model).pair(*pair) == (tuple(head), tuple(tail))


def test_a_token_across_the_border_leaves_the_continuation_its_own(model: torch.nn.Module) -> None:
    prompt, tokens = answering(model).pair("a foo", "bar")
    assert (prompt, tokens) == ((BOS, *TOKENIZER.encode("a foo")), tuple(TOKENIZER.encode("bar")))
    assert answering(model).pair("a", "").tokens == (EOS,)


def test_requests_are_answered_as_lm_evals_base_class_would(model: torch.nn.Module) -> None:
    from lm_eval.api.model import TemplateLM

    ours = language_model(answering(model))
    requests = [request("loglikelihood", i // 2, *pair) for i, pair in enumerate(PAIRS)]
    theirs = TemplateLM.loglikelihood(ours, requests, disable_tqdm=True)
    found = ours.loglikelihood(requests)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in theirs], rel=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in theirs]


def test_requests_of_a_document_are_one_record(model: torch.nn.Module) -> None:
    asked = answering(model)
    language_model(asked).loglikelihood([request("loglikelihood", i // 2, *pair) for i, pair in enumerate(PAIRS)])
    assert [len(record["log_probs"]) for record in asked.records] == [2, 2, 2, 1]
    assert [record["prompt"] for record in asked.records] == [prompt for prompt, _ in PAIRS[::2]]


def test_rolling_is_the_sum_over_the_text(model: torch.nn.Module) -> None:
    (found,) = language_model(answering(model)).loglikelihood_rolling([request("loglikelihood_rolling", 0, "a b c d")])
    assert found == pytest.approx(
        one_by_one(model, Continuation((BOS,), tuple(TOKENIZER.encode("a b c d"))))[0], rel=1e-4
    )


def test_texts_are_decoded_greedily_and_cut(model: torch.nn.Module) -> None:
    settings = {"max_gen_toks": 5, "until": []}
    asked = answering(model)
    requests = [request("generate_until", i, prompt, settings) for i, prompt in enumerate(("a b", "c", "d e a b"))]
    found = language_model(asked).generate_until(requests)
    samples = [build_sample("", "lm", [Text(list(asked.encode(r.args[0])))]) for r in requests]
    assert found == answers(model, samples, TOKENIZER, 5, 1) == [record["prediction"] for record in asked.records]
    assert any(found)
    stop = max(found, key=len).split()[-1]
    requests = [
        request("generate_until", i, *r.args[:1], {**settings, "until": [stop]}) for i, r in enumerate(requests)
    ]
    assert language_model(asked).generate_until(requests) == [text.split(stop)[0] for text in found]


def test_a_text_ends_at_the_first_stop() -> None:
    assert cut("a b\n\nc d", ["\n\n", "b"]) == "a "
    assert cut("a b", ["x", ""]) == cut("a b", []) == "a b"


def test_without_documents_nothing_is_asked(model: torch.nn.Module) -> None:
    assert run_task("mmlu", [], answering(model)) == {}


def test_task_files_are_installed(project_root: Path) -> None:
    tasks = sorted(path.name for path in TASKS.glob("*.yaml"))
    assert tasks == ["mmlu.yaml", "ocrbench.yaml"]
    packaging = tomllib.loads((project_root / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "tasks/*.yaml" in packaging["package-data"]["symbiotic.evaluation"]

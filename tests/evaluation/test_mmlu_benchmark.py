"""MMLU by lm-eval: the stock prompts, scores worked out by hand, evaluations that go on, and what cannot be asked."""

from __future__ import annotations

import csv
import functools
import json
import math
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from factory import build
from symbiotic.config import compose_evaluation
from symbiotic.data.errors import DataError
from symbiotic.data.packing import Text, build_sample
from symbiotic.data.tokenizer import BOS, Tokenizer
from symbiotic.evaluation.assets import ASSETS
from symbiotic.evaluation.benchmark import MissingAsset, Value, measuring
from symbiotic.evaluation.context import Context, whole_lines
from symbiotic.evaluation.lm_eval_adapter import Answering, run_task
from symbiotic.evaluation.mmlu import read_mmlu
from symbiotic.evaluation.mmlu_benchmark import CATEGORIES, MMLU, OFFICIAL_COUNTS, described, document, prompt, scores
from symbiotic.evaluation.names import metric
from symbiotic.evaluation.prompts import MAX_TOKENS, one_a_row
from symbiotic.generation.text import last_logits
from symbiotic.models.batch import Batch
from symbiotic.schema import ConfigError, Objective

WORDS = ("alpha", "beta", "gamma", "delta")
TOKENIZER = Tokenizer.build(
    [*WORDS, ":", ".", "the", "following", "are", "questions", "answers", "about", "Answer", "is"]
)
SIZE = TOKENIZER.vocab_size

TEST = {  # the stub answers A to alpha, ..., D to delta
    "anatomy": [
        ["What is alpha?", "None", "NA", "null", "nan", "A"],
        ['Is beta, or\nso it "seems"', "1,000", '"', "''", 'a"b', "B"],
        ["Ünïcode 数学 delta", "é", "ß", "λ", "🙂", "D"],
        ["  gamma  ", " a ", "b", "", "d", "A"],
    ],
    "virology": [["delta is", "True", "False", "0", "1e5", "D"], ["beta is", "a", "b", "c", "d", "C"]],
}
DEV = {s: [[f"{s} {word} {i}", "w", "x", "y", "z", "ABCD"[i % 4]] for i, word in enumerate(WORDS * 2)] for s in TEST}
BY_HAND = {
    "mmlu_share": 4 / 6,
    "mmlu_share_macro": (3 / 4 + 1 / 2) / 2,
    "mmlu_share/stem": 3 / 4,
    "mmlu_share/other": 1 / 2,
    "mmlu_share/anatomy": 3 / 4,
    "mmlu_share/virology": 1 / 2,
}
PREDICTIONS = ["A", "B", "D", "C", "D", "B"]


class Reader(torch.nn.Module):
    """Prefers the letter of the last of the four words that a sequence has, by one unit of logit."""

    def __init__(self, breaks_after: int = 10**9) -> None:
        super().__init__()
        self.calls, self.breaks_after, self.rows = 0, breaks_after, Counter[int]()

    def forward(self, batch: Batch, logits_at: torch.Tensor) -> SimpleNamespace:
        if self.calls == self.breaks_after:
            raise KeyboardInterrupt
        self.calls += 1
        logits = torch.zeros(int(logits_at.sum()), SIZE)
        words = {TOKENIZER.id(word): letter for word, letter in zip(WORDS, TOKENIZER.letters, strict=True)}
        for place, tokens in enumerate(batch.tokens.tolist()):
            logits[place, next(words[token] for token in reversed(tokens) if token in words)] = 1.0
            self.rows[len(tokens)] += 1
        return SimpleNamespace(logits=logits)


def write_csv(folder: Path, test: dict[str, list[list[str]]] = TEST) -> Path:
    for split, subjects in {"test": test, "dev": DEV}.items():
        (folder / split).mkdir(parents=True)
        for subject, rows in subjects.items():
            with (folder / split / f"{subject}_{split}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(rows)
    return folder


def write_parquet(folder: Path) -> Path:
    (folder / "all").mkdir(parents=True)
    for split, subjects in {"test": TEST, "dev": DEV}.items():
        rows = [
            {"question": q, "subject": subject, "choices": choices, "answer": "ABCD".index(letter)}
            for subject, found in subjects.items()
            for q, *choices, letter in found
        ]
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "all" / f"{split}-00000-of-00001.parquet")
    return folder


def context(folder: Path | None = None, **more: Any) -> Context:
    return Context(TOKENIZER, Objective(), folder=folder, **({"batch_size": 4} | more))


def run(benchmark: MMLU, model: torch.nn.Module, here: Context) -> dict[str, Value]:
    with measuring(model):
        return dict(benchmark.run(model, here))


def stock_task(subject: str, dev: list[Any], test: list[Any]) -> Any:
    """lm-eval's own task of a subject, on questions of ours."""
    import datasets
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    def rows(questions: list[Any]) -> Any:
        return datasets.Dataset.from_list(
            [{"question": q.question, "choices": list(q.choices), "answer": q.answer} for q in questions]
        )

    config = load_yaml(Path(lm_eval.tasks.__file__).parent / "mmlu" / "default" / f"mmlu_{subject}.yaml")
    found = {"dev": rows(dev), "test": rows(test)}
    return ConfigurableTask(config={**config, "tag": None, "custom_dataset": lambda **_: found})


def test_prompts_are_those_of_lm_evals_stock_template(tmp_path: Path) -> None:
    folder = write_csv(tmp_path / "mmlu")
    test, dev = read_mmlu(folder, "test")[0], read_mmlu(folder, "dev")[0]
    for subject in TEST:
        mine, shots = ([q for q in found if q.subject == subject] for found in (test, dev))
        task = stock_task(subject, shots, mine)
        for count in (0, 3, 5):
            stock = [task.fewshot_context(doc, num_fewshot=count) for doc in task.test_docs()]
            assert [prompt(document(question, shots[:count])) for question in mine] == stock
        (request, *_) = task.construct_requests(task.test_docs()[0], stock[0], metadata=(subject, 0, 1))
        assert request.args == (stock[0], " A")


def test_every_subject_has_the_stock_description_and_category(tmp_path: Path) -> None:
    import lm_eval.tasks
    import yaml

    stock: dict[str, list[str]] = {}
    question = read_mmlu(write_csv(tmp_path), "test")[0][0]
    for path in (Path(lm_eval.tasks.__file__).parent / "mmlu" / "default").glob("mmlu_*.yaml"):
        config = yaml.safe_load(path.read_text())
        stock.setdefault(config["tag"].removeprefix("mmlu_").removesuffix("_tasks"), []).append(config["dataset_name"])
        text = prompt({**document(question, []), "subject": config["dataset_name"]})
        assert text.startswith(config["description"] + question.question)
    assert {category: sorted(names) for category, names in stock.items()} == CATEGORIES
    assert sum(map(len, CATEGORIES.values())) == 57


@pytest.mark.parametrize("write", [write_csv, write_parquet])
def test_scores_are_those_worked_out_by_hand_in_both_layouts(tmp_path: Path, write: Any) -> None:
    benchmark, here = MMLU(str(write(tmp_path / "mmlu"))), context(tmp_path / "out")
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    found = run(benchmark, Reader(), here)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    assert {name: score.value for name, score in found.items()} == pytest.approx(BY_HAND)
    assert [found[name].n for name in BY_HAND] == [6, 6, 4, 2, 4, 2]
    assert here.problems == []
    records = list(whole_lines(tmp_path / "out" / "mmlu.jsonl"))
    assert records == here.records
    assert [record["prediction"] for record in records] == PREDICTIONS
    assert [record["answer"] for record in records] == [row[-1] for rows in TEST.values() for row in rows]
    assert {record["shots"] for record in records} == {5}
    low, high = -math.log(SIZE - 1 + math.e), 1 - math.log(SIZE - 1 + math.e)
    assert records[0]["log_probs"] == pytest.approx([high, low, low, low], rel=1e-6)


def test_scores_from_records_are_lm_evals_own_with_a_real_model(tmp_path: Path) -> None:
    benchmark, here = MMLU(str(write_csv(tmp_path))), context()
    model = build("symbiotic", seed=2, vocab_size=SIZE, init_std=1.0).eval()
    documents = benchmark.documents(here)
    answering = Answering(model, TOKENIZER, functools.partial(here.measured, "mmlu"), described, batch_size=4)
    with torch.no_grad():
        theirs = run_task("mmlu", documents, answering)
    found = run(benchmark, model, context())
    assert theirs["acc,none"] == found["mmlu_share"].value
    assert len({record["prediction"] for record in answering.records}) > 1
    for asked, record in zip(documents, answering.records, strict=True):
        sample = build_sample("", "lm", [Text([BOS, *TOKENIZER.encode(prompt(asked))])])
        with torch.no_grad():
            directly = last_logits(model, one_a_row([sample])).log_softmax(-1)[0, list(TOKENIZER.letters)]
        assert record["log_probs"] == pytest.approx(directly.tolist(), rel=1e-4)
        assert record["prediction"] == "ABCD"[int(directly.argmax())]


def test_only_the_official_questions_behind_five_shots_are_called_mmlu() -> None:
    subjects = {names[0]: OFFICIAL_COUNTS[category] for category, names in CATEGORIES.items()}
    record = {"shots": 5, "lost": 0, "correct": True}
    whole = [{**record, "subject": subject} for subject, count in subjects.items() for _ in range(count)]
    assert len(whole) == 14_042
    shorter = {**whole[0], "shots": 3, "lost": 2}  # to max_tokens, as in the authors' script
    expected = {"mmlu", "mmlu_macro", *(f"mmlu/{name}" for name in (*CATEGORIES, *subjects))}
    assert {name for name, _ in scores([shorter, *whole[1:]])} == expected
    for other in (whole[1:], [{**whole[0], "shots": 4}, *whole[1:]], [{**whole[0], "shots": 0}, *whole[1:]]):
        assert {name for name, _ in scores(other)} == {n.replace("mmlu", "mmlu_share") for n in expected}
    assert "mmlu" not in dict(scores([*whole, {**record, "subject": "cooking"}]))
    assert metric("mmlu/stem").official
    assert not any(metric(name).official for name in ("mmlu_share", "mmlu_share_macro", "mmlu_share/stem"))


def test_an_evaluation_that_was_killed_goes_on(tmp_path: Path) -> None:
    benchmark = MMLU(str(write_csv(tmp_path / "mmlu")))
    whole = run(benchmark, Reader(), context(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        run(benchmark, Reader(breaks_after=1), context(tmp_path / "cut"))
    assert len(list(whole_lines(tmp_path / "cut" / "mmlu.jsonl"))) == 4
    rest = Reader()
    assert run(benchmark, rest, context(tmp_path / "cut")) == whole
    assert rest.rows.total() == 2  # one row for the four letters of a question
    assert (tmp_path / "cut" / "mmlu.jsonl").read_bytes() == (tmp_path / "whole" / "mmlu.jsonl").read_bytes()
    assert run(benchmark, Reader(breaks_after=0), context(tmp_path / "cut")) == whole


def test_prompts_that_are_too_long_lose_shots_and_are_counted(tmp_path: Path) -> None:
    long = ["alpha " * 200, "a", "b", "c", "d", "A"]
    folder, here = write_csv(tmp_path, {"anatomy": [*TEST["anatomy"], long]}), context()
    sizes = [len(TOKENIZER.encode(prompt(asked))) + 2 for asked in MMLU(str(folder)).documents(context())]
    limit = sorted(sizes[:4])[1]
    found = run(MMLU(str(folder), max_tokens=limit), Reader(), here)
    assert [record["id"] for record in here.records] == [f"anatomy/{i}" for i in (1, 2, 3, 4)]
    assert [record["shots"] for record in here.records] == [5 if size <= limit else 4 for size in sizes[:4]]
    assert found["mmlu_share"] == Value(3 / 4, 4)
    named, counted = here.problems
    assert named.startswith("mmlu: anatomy/5: ")
    assert named.endswith(f" tokens without shots; max_tokens={limit}")
    assert counted == f"mmlu: 2 of 4 prompts lost shots to max_tokens={limit}: 2 with 4"
    nothing = run(MMLU(str(folder), max_tokens=3), Reader(), context())
    assert math.isnan(nothing["mmlu_share"].value)
    assert nothing["mmlu_share"].n == 0


def test_a_question_longer_than_the_default_limit_is_named_and_the_rest_asked(tmp_path: Path) -> None:
    endless = ["alpha " * MAX_TOKENS, "a", "b", "c", "d", "A"]
    here = context()
    found = run(MMLU(str(write_csv(tmp_path, {"anatomy": [endless, *TEST["anatomy"]]}))), Reader(), here)
    assert found["mmlu_share"].n == 4
    assert [problem.endswith(f" tokens without shots; max_tokens={MAX_TOKENS}") for problem in here.problems] == [True]
    assert compose_evaluation(["run=x"]).evaluation.benchmarks["mmlu"]["max_tokens"] == MAX_TOKENS


def test_rows_that_cannot_be_used_are_named_and_the_rest_is_asked(tmp_path: Path) -> None:
    folder, here = write_csv(tmp_path), context()
    with (folder / "test" / "anatomy_test.csv").open("a") as file:
        file.write('alpha,1,2,3,4,E\nalpha,1,2,3\nalpha,"never closed,2,3,4,A\n')
    (folder / "dev" / "virology_dev.csv").write_text("delta is,1,2,3,4,A\nbroken\n")
    found = run(MMLU(str(folder)), Reader(), here)
    assert {name: score.value for name, score in found.items()} == pytest.approx(BY_HAND)
    assert here.problems == [
        "anatomy_test.csv: row 5: answer 'E'; must be one of A, B, C, D",
        "anatomy_test.csv: row 6: 4 fields; must be 6 (question,A,B,C,D,letter)",
        "anatomy_test.csv: row 7: unexpected end of data",
        "virology_dev.csv: row 2: 1 fields; must be 6 (question,A,B,C,D,letter)",
        "mmlu: virology: 1 usable rows in its dev file, of 5 shots",
    ]
    assert [record["shots"] for record in here.records] == [5] * 4 + [1] * 2


def test_a_share_and_fewer_shots(tmp_path: Path) -> None:
    here = context(share=0.5)
    assert run(MMLU(str(write_csv(tmp_path)), shots=0), Reader(), here)["mmlu_share"] == Value(2 / 3, 3)
    assert [record["id"] for record in here.records] == ["anatomy/1", "anatomy/3", "virology/2"]
    assert {record["shots"] for record in here.records} == {0}


def test_what_is_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ASSETS, raising=False)
    with pytest.raises(MissingAsset, match=r"mmlu: no such file; .*evaluation.benchmarks.mmlu.folder=PATH"):
        MMLU().protocol()
    monkeypatch.setenv(ASSETS, str(tmp_path))
    folder = write_csv(tmp_path / "mmlu")
    assert MMLU().protocol() == MMLU(str(folder)).protocol()
    (folder / "dev" / "anatomy_dev.csv").unlink()
    (folder / "dev" / "virology_dev.csv").unlink()
    with pytest.raises(DataError, match=r"no file \*_dev.csv"):
        MMLU().protocol()
    for wrong in ({"shots": -1}, {"max_tokens": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            MMLU(**wrong)


def test_the_protocol_is_all_that_decides(tmp_path: Path) -> None:
    folder = write_csv(tmp_path / "mmlu")
    whole = MMLU(str(folder)).protocol()
    json.dumps(whole)
    assert MMLU(str(write_parquet(tmp_path / "other"))).protocol() != whole
    assert MMLU(str(folder), shots=4).protocol() != whole
    assert MMLU(str(folder), max_tokens=9).protocol() != whole
    (folder / "val").mkdir()
    (folder / "val" / "anatomy_val.csv").write_text("not read")
    assert MMLU(str(folder)).protocol() == whole
    with (folder / "dev" / "anatomy_dev.csv").open("a") as file:
        file.write("one,more,of,them,here,A\n")
    assert MMLU(str(folder)).protocol() != whole


def test_nothing_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run(MMLU(str(write_csv(tmp_path))), Reader(), context())
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []

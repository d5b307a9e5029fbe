"""The benchmarks of composition: exact trees for the official evaluators, and what these wrote read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from factory import build
from symbiotic.config import compose_evaluation
from symbiotic.data.errors import DataError
from symbiotic.data.tokenizer import Tokenizer
from symbiotic.evaluation.benchmark import MissingAsset, Value, measuring
from symbiotic.evaluation.composition import Composition
from symbiotic.evaluation.context import Context
from symbiotic.evaluation.dpg_bench import DPGBench
from symbiotic.evaluation.geneval import GenEval
from symbiotic.evaluation.images import image_facts, load_image
from symbiotic.evaluation.names import metric
from symbiotic.evaluation.suite import Suite
from symbiotic.evaluation.t2i_compbench import JUDGES, T2ICompBench
from symbiotic.evaluation.wise import WISE
from symbiotic.schema import ConfigError, Objective, Sampler
from symbiotic.studies.benchmarks import make_benchmarks

OBJECTIVE = Objective(sampler=Sampler(steps=1, guidance=1.0))
GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow"},
    {"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "red"}], "prompt": "a photo of a red “cow”"},
]


@pytest.fixture
def assets(tmp_path: Path) -> Path:
    """The official files of all four, tiny."""
    root = tmp_path / "assets"
    for folder in ("geneval", "dpg_bench/prompts", "t2i_compbench", "wise"):
        (root / folder).mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in GENEVAL)
    (root / "geneval" / "evaluation_metadata.jsonl").write_text(lines)
    for name, text in {"partiprompts107": "red 7 on black\n", "COCOval2014000000002685": "blue 1, on gray"}.items():
        (root / "dpg_bench" / "prompts" / f"{name}.txt").write_text(text)
    (root / "t2i_compbench" / "color_val.txt").write_text("a red 7 and a blue 1\nA black 3.\n")
    (root / "t2i_compbench" / "non_spatial_val.txt").write_text("a dog is chasing a ball\n")
    (root / "t2i_compbench" / "complex_val_action.txt").write_text("not a list of a category\n")
    kinds = {1: "Festival", 401: "Horizontal time", 568: "Map", 701: "Plant", 801: "Optics", 901: "Reaction"}
    rows = [{"prompt_id": i, "Prompt": f"red {i}", "Explanation": "", "Subcategory": k} for i, k in kinds.items()]
    files = {"cultural_common_sense": rows[:1], "spatio-temporal_reasoning": rows[1:3], "natural_science": rows[3:]}
    for name, some in files.items():
        (root / "wise" / f"{name}.json").write_text(json.dumps(some))
    (root / "wise" / "natural_science_rewrite.json").write_text(json.dumps(rows[3:]))
    return root


@pytest.fixture
def run(assets: Path, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Value]]:
    monkeypatch.setenv("SYMBIOTIC_ASSETS", str(assets))
    model = build("symbiotic", vocab_size=512)

    def measure(benchmark: Composition, **more: Any) -> dict[str, Value]:
        folder = {"folder": tmp_path / "e", "batch_size": 5} | more
        context = Context(Tokenizer.load(corpus / "tokenizer.json"), OBJECTIVE, **folder)
        measure.context = context  # type: ignore[attr-defined]
        with measuring(model):
            return dict(benchmark.run(model, context))

    return measure


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def waits(run: Callable[..., Any], benchmark: Composition, **more: Any) -> str:
    with pytest.raises(MissingAsset) as error:
        run(benchmark, **more)
    return str(error.value)


def rewrite(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# --------------------------------------------------------------------------- the exports


def test_geneval_is_laid_out_as_its_evaluator_walks_it(run: Any, tmp_path: Path) -> None:
    line = waits(run, GenEval())
    export = tmp_path / "e" / "exports" / "geneval"
    assert line.startswith(f"no results.jsonl in EXPORT={export}, where the images lie: GenEval's ")
    assert "evaluate_images.py $EXPORT --outfile $EXPORT/results.jsonl --model-path DETECTOR writes it; then" in line
    samples = [f"{i:05d}/samples/{j:04d}.png" for i in range(3) for j in range(4)]
    assert sorted(tree(export)) == sorted([*samples, *(f"{i:05d}/metadata.jsonl" for i in range(3))])
    for i, row in enumerate(GENEVAL):
        text = (export / f"{i:05d}" / "metadata.jsonl").read_text()
        assert json.loads(text) == row
        assert text.isascii()
        assert "\n" not in text
    facts = image_facts(export / "00002" / "samples" / "0001.png")
    assert (facts["prompt"], facts["seed"]) == ("a photo of a red “cow”", "0/9")
    assert len({content for name, content in tree(export).items() if name.endswith(".png")}) == 12


def test_an_export_goes_on_with_the_same_bytes(run: Any, tmp_path: Path) -> None:
    export, images = tmp_path / "e" / "exports" / "geneval", tmp_path / "e" / "images" / "geneval"
    waits(run, GenEval())
    whole = tree(tmp_path / "e")
    (export / "00001" / "samples" / "0002.png").unlink()
    (export / "00001" / "metadata.jsonl").unlink()
    (images / "00007.png").unlink()
    waits(run, GenEval())
    assert tree(tmp_path / "e") == whole
    assert (export / "00001" / "samples" / "0002.png").samefile(images / "00006.png")
    assert (export / "00001" / "samples" / "0003.png").samefile(images / "00007.png")


def test_a_file_system_without_links_gets_copies(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    waits(run, WISE())
    waits(run, WISE())
    images, exported = tree(tmp_path / "e" / "images" / "wise"), tree(tmp_path / "e" / "exports" / "wise")
    assert list(exported) == sorted(f"{i}.png" for i in (1, 401, 568, 701, 801, 901))
    assert list(images.values()) == [exported[f"{i}.png"] for i in (1, 401, 568, 701, 801, 901)]


def test_dpg_bench_gets_one_square_grid_a_prompt(run: Any, tmp_path: Path) -> None:
    line = waits(run, DPGBench())
    export = tmp_path / "e" / "exports" / "dpg_bench"
    assert "--image-root-path $EXPORT --resolution 20 --pic-num 4 --res-path $EXPORT/results.txt" in line
    assert sorted(tree(export)) == ["COCOval2014000000002685.png", "partiprompts107.png"]
    grid = load_image(export / "partiprompts107.png")  # the second prompt by name
    images = [load_image(tmp_path / "e" / "images" / "dpg_bench" / f"{i:05d}.png") for i in range(4, 8)]
    assert grid.shape == (40, 40, 3)
    for image, crop in zip(images, ((0, 0, 20, 20), (20, 0, 40, 20), (0, 20, 20, 40), (20, 20, 40, 40)), strict=True):
        assert np.array_equal(np.asarray(Image.fromarray(grid).crop(crop)), image)
    assert image_facts(export / "partiprompts107.png")["prompt"] == "red 7 on black"
    before = tree(export)
    (export / "partiprompts107.png").unlink()
    waits(run, DPGBench())
    assert tree(export) == before


def test_dpg_bench_takes_square_images_only(run: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="images of 20 x 24; its evaluator cuts squares"):
        run(DPGBench(), size=(20, 24))
    assert not (tmp_path / "e").exists()


def test_t2i_compbench_names_images_by_prompt_and_number(run: Any, assets: Path, tmp_path: Path) -> None:
    long = "a" * 245
    with (assets / "t2i_compbench" / "color_val.txt").open("a") as file:
        file.write(f"black and/or white\n\nsnake_case\n{long}\n{long[1:]}\nA black 3.\tignored\n")
    line = waits(run, T2ICompBench(images=2))
    export = tmp_path / "e" / "exports" / "t2i_compbench"
    assert line.startswith(f"no color/annotation_blip/vqa_result.json in EXPORT={export}, ")
    judges = "BLIPvqa_eval/BLIP_vqa.py on $EXPORT/color, CLIPScore_eval/CLIP_similarity.py on $EXPORT/non_spatial"
    assert judges in line
    assert "; 4 prompts were left out: color_val.txt: line 3: 'black and/or white': a prompt that names its" in line
    texts = ["a red 7 and a blue 1"] * 2 + ["A black 3."] * 2 + [long[1:]] * 2 + ["A black 3."] * 2
    names = {f"color/samples/{text}_{i:06d}.png" for i, text in enumerate(texts)}
    names |= {f"non_spatial/samples/a dog is chasing a ball_{i:06d}.png" for i in range(2)}
    assert set(tree(export)) == names
    facts = image_facts(export / "non_spatial" / "samples" / "a dog is chasing a ball_000001.png")
    assert facts["seed"] == "0/9"


# --------------------------------------------------------------------------- the results


def geneval_rows(export: Path) -> list[dict[str, Any]]:
    """As the evaluator writes them, in the order of a directory listing; 5 of 8 and 1 of 4 are right."""
    right = {"00000": [1, 1, 1, 0], "00001": [1, 1, 0, 0], "00002": [0, 0, 1, 0]}
    return [
        {
            "filename": f"{export}/{folder}/samples/{j:04d}.png",
            "tag": GENEVAL[int(folder)]["tag"],
            "prompt": GENEVAL[int(folder)]["prompt"],
            "correct": bool(right[folder][j]),
            "reason": "" if right[folder][j] else "expected cow>=1, found 0",
            "metadata": json.dumps(GENEVAL[int(folder)]),
            "details": "{}",
        }
        for folder in ("00002", "00000", "00001")
        for j in (1, 0, 3, 2)
    ]


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row).replace("/", "\\/") + "\n" for row in rows)


def test_geneval_scores_as_its_summary(run: Any, tmp_path: Path) -> None:
    waits(run, GenEval())
    export = tmp_path / "e" / "exports" / "geneval"
    rewrite(export / "results.jsonl", jsonl(geneval_rows(Path("elsewhere") / "images")))
    scores = run(GenEval())
    assert scores == {
        "geneval": Value(pytest.approx((5 / 8 + 1 / 4) / 2), 12),
        "geneval/single_object": Value(5 / 8, 8),
        "geneval/colors": Value(1 / 4, 4),
    }
    records = [json.loads(line) for line in (tmp_path / "e" / "geneval.jsonl").read_text().split("\n")[:-1]]
    assert [record["id"] for record in records] == [f"{i:05d}/samples/{j:04d}.png" for i in range(3) for j in range(4)]
    assert [record["correct"] for record in records] == [True, True, True, False, True, True] + [False] * 4 + [
        True,
        False,
    ]
    assert records[3]["reason"] == "expected cow>=1, found 0"
    assert run.context.files == ["images/geneval", "exports/geneval/results.jsonl", "geneval.jsonl"]


WRONG_GENEVAL: dict[str, tuple[Callable[[list[Any]], Any], str]] = {
    "unfinished": (lambda rows: rows[:-5], r"results.jsonl: no result for 5 of 12 images, the first is 00000/samples/"),
    "twice": (lambda rows: [*rows, rows[0]], r"results.jsonl:13: 00002/samples/0001.png has two results"),
    "foreign": (lambda rows: [*rows, rows[0] | {"filename": "a/00009/samples/0000.png"}], r":13: 00009/.* not in this"),
    "tag": (lambda rows: [rows[0] | {"tag": "colour"}, *rows[1:]], r":1: .*has the tag 'colour', .* prompts 'colors'"),
    "prompt": (lambda rows: [rows[0] | {"prompt": "a cat"}, *rows[1:]], r":1: .*has the prompt 'a cat', in the"),
    "correct": (lambda rows: [rows[0] | {"correct": "yes"}, *rows[1:]], r":1: correct is 'yes'; must be true or false"),
    "no mapping": (lambda rows: [*rows, 3], r":13: must be a mapping"),
    "empty": (lambda rows: [], r"no result for 12 of 12 images"),
}


@pytest.mark.parametrize("case", WRONG_GENEVAL)
def test_wrong_results_of_geneval_are_one_line(run: Any, tmp_path: Path, case: str) -> None:
    change, line = WRONG_GENEVAL[case]
    waits(run, GenEval())
    export = tmp_path / "e" / "exports" / "geneval"
    rewrite(export / "results.jsonl", jsonl(change(geneval_rows(export))))
    with pytest.raises(DataError, match=line) as error:
        run(GenEval())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "e" / "geneval.jsonl").exists()  # corrected results are read, not these
    rewrite(export / "results.jsonl", jsonl(geneval_rows(export)))
    assert run(GenEval())["geneval"].n == 12


def test_a_cut_file_of_results_is_one_line(run: Any, tmp_path: Path) -> None:
    waits(run, GenEval())
    path = tmp_path / "e" / "exports" / "geneval" / "results.jsonl"
    rewrite(path, jsonl(geneval_rows(path.parent))[:-40])
    with pytest.raises(DataError, match=r"results.jsonl:12: not JSON: .*; was the evaluator interrupted\?$"):
        run(GenEval())
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"results.jsonl: not UTF-8"):
        run(GenEval())


def dpg_text(score: float = 62.5) -> str:
    """As compute_dpg_bench.py writes it: lines of the prompts, then the summary."""
    return (
        "out, put/partiprompts107.png, 1.0, 0.5, 0.5, 0.0, 0.5\n"
        "out, put/COCOval2014000000002685.png, 0.75, 0.75, 0.75, 0.75, 0.75\n"
        "Model: out, put\nL1 category scores:\n\tentity: 70.25\n\tattribute: 55.0\n"
        "L2 category scores:\n\tattribute - color: 50.0\n\tentity - whole: 70.25\n"
        f"Image path: out, put\nSave results to: out, put/results.txt\nDPG-Bench score: {score}\n"
    )


@pytest.mark.parametrize("name", ["results.txt", "dpg-bench_20250101-101010_results.txt"])
def test_dpg_bench_scores_as_its_evaluator_wrote(run: Any, tmp_path: Path, name: str) -> None:
    waits(run, DPGBench())
    export = tmp_path / "e" / "exports" / "dpg_bench"
    rewrite(export / name, dpg_text())
    rewrite(export / name.replace(".txt", "_detail.txt"), "out/x.png, (0, 0, 20, 20), is it red?, yes\n")
    assert run(DPGBench()) == {
        "dpg_bench": Value(62.5, 2),
        "dpg_bench/entity": Value(70.25, 2),
        "dpg_bench/attribute": Value(55.0, 2),
    }
    records = [json.loads(line) for line in (tmp_path / "e" / "dpg_bench.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == ["COCOval2014000000002685", "partiprompts107"]
    assert records[1]["images"] == [1.0, 0.5, 0.5, 0.0]


WRONG_DPG = {
    "unfinished": (lambda text: text.split("Model")[0], r"no line `DPG-Bench score:` .*was the evaluator interrupted"),
    "failed": (lambda text: text.split("\n", 1)[1], r"no result for 1 of 2 images, the first is partiprompts107"),
    "total": (lambda text: text.replace("score: 62.5", "score: 63"), r"says a score of 63, its 2 lines have the mean"),
    "mean": (lambda text: text.replace("0.0, 0.5", "0.0, 0.6"), r"results.txt:1: .*must be scores and their mean"),
    "text": (lambda text: text.replace("1.0, 0.5, 0.5", "1.0, x, 0.5"), r"results.txt:1: 'x' is no number"),
    "foreign": (lambda text: text.replace("partiprompts107", "parti"), r"results.txt:1: parti is not in this export"),
}


@pytest.mark.parametrize("case", WRONG_DPG)
def test_wrong_results_of_dpg_bench_are_one_line(run: Any, tmp_path: Path, case: str) -> None:
    change, line = WRONG_DPG[case]
    waits(run, DPGBench())
    path = tmp_path / "e" / "exports" / "dpg_bench" / "results.txt"
    rewrite(path, change(dpg_text()))
    with pytest.raises(DataError, match=line):
        run(DPGBench())
    rewrite(path.with_name("old_results.txt"), dpg_text())
    with pytest.raises(DataError, match=r"old_results.txt, results.txt: which one\?"):
        run(DPGBench())


def answers_of(export: Path, category: str, answers: list[Any]) -> Path:
    path = export / category / JUDGES[category][1] / "vqa_result.json"
    rewrite(path, json.dumps([{"question_id": i, "answer": answer} for i, answer in enumerate(answers)]))
    return path


def test_t2i_compbench_scores_when_all_categories_are_judged(run: Any, tmp_path: Path) -> None:
    waits(run, T2ICompBench(images=2))
    export = tmp_path / "e" / "exports" / "t2i_compbench"
    answers_of(export, "color", ["0.5000", "1.0000", "0.2500", "0.2500"])
    line = waits(run, T2ICompBench(images=2))
    assert line.startswith(f"no non_spatial/annotation_clip/vqa_result.json in EXPORT={export}, ")
    assert "color" not in line
    assert run(T2ICompBench(images=2, categories=["color"])) == {"t2i_compbench/color": Value(0.5, 4)}
    (tmp_path / "e" / "t2i_compbench.jsonl").unlink()
    answers_of(export, "non_spatial", [0.3125, -0.0625])
    assert run(T2ICompBench(images=2)) == {
        "t2i_compbench/color": Value(0.5, 4),
        "t2i_compbench/non_spatial": Value(0.125, 2),
    }
    records = [json.loads(line) for line in (tmp_path / "e" / "t2i_compbench.jsonl").read_text().splitlines()]
    assert records[3] == {
        "benchmark": "t2i_compbench",
        "id": "color/3",
        "category": "color",
        "prompt": "A black 3.",
        "score": 0.25,
    }


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('[{"question_id": 0, "answer": "1.0"}]', r"vqa_result.json: no result for 3 of 4 images, the first is 1;"),
        ('[{"question_id": 4, "answer": "1.0"}]', r"item 0: 4 is not in this export"),
        ('[{"question_id": 0, "answer": "high"}]', r"item 0: answer is 'high'; must be a number from -1 to 1"),
        ('[{"question_id": 0, "answer": NaN}]', r"item 0: answer is nan; must be a number"),
        ("[3]", r"item 0: must be a mapping with question_id and answer"),
        ("{}", r"vqa_result.json: must be a JSON list"),
        ('[{"question_id"', r"vqa_result.json: not a JSON file"),
    ],
)
def test_wrong_answers_of_t2i_compbench_are_one_line(run: Any, tmp_path: Path, content: str, line: str) -> None:
    benchmark = T2ICompBench(images=2, categories=["color"])
    waits(run, benchmark)
    export = tmp_path / "e" / "exports" / "t2i_compbench"
    rewrite(export / "color" / "annotation_blip" / "vqa_result.json", content)
    with pytest.raises(DataError, match=line):
        run(benchmark)


WISE_SCORES = {1: (2, 1, 0), 401: (2, 2, 2), 568: (0, 0, 0), 701: (1, 1, 1), 801: (0, 2, 2), 901: (2, 0, 0)}


def wise_rows(**more: Any) -> list[dict[str, Any]]:
    names = ("consistency", "realism", "aesthetic_quality")
    return [
        {"prompt_id": i, "Subcategory": "", **dict(zip(names, map(float, s), strict=True)), **more}
        for i, s in WISE_SCORES.items()
    ]


def test_wise_scores_are_wiscores_and_their_weighted_mean(run: Any, tmp_path: Path) -> None:
    line = waits(run, WISE())
    results = tmp_path / "e" / "exports" / "wise" / "Results"
    assert line.startswith(f"no Results/*.jsonl in EXPORT={results.parent}, ")
    rows = wise_rows()
    rewrite(results / "natural_science_scores_results.jsonl", jsonl(rows[3:]))
    rewrite(results / "natural_science_full_results.json", "not read")
    rewrite(results / "others.jsonl", jsonl(rows[:3]))
    found = {"cultural": 0.8, "time": 1.0, "space": 0.0, "biology": 0.5, "physics": 0.3, "chemistry": 0.7}
    scores = run(WISE())
    assert {name: (round(v.value, 12), v.n) for name, v in scores.items() if name != "wise"} == {
        f"wise/{name}": (value, 1) for name, value in found.items()
    }
    assert scores["wise"] == Value(pytest.approx(0.4 * 0.8 + 0.167 + 0.1 * (0.5 + 0.3 + 0.7)), 6)


def test_a_part_of_wise_has_no_overall_score(run: Any, assets: Path, tmp_path: Path) -> None:
    (assets / "wise" / "natural_science.json").unlink()
    waits(run, WISE())
    rewrite(tmp_path / "e" / "exports" / "wise" / "Results" / "a.jsonl", jsonl(wise_rows()[:3]))
    assert sorted(run(WISE())) == ["wise/cultural", "wise/space", "wise/time"]


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (wise_rows(consistency=999), r"a.jsonl:1: prompt 1 was not judged \(999\); run the evaluator again"),
        (wise_rows(realism=3), r"a.jsonl:1: realism is 3; must be a number from 0 to 2"),
        (wise_rows()[:-2], r"Results: no result for 2 of 6 images, the first is 801"),
        ([*wise_rows(), wise_rows()[0]], r"a.jsonl:7: 1 has two results"),
        ([wise_rows()[0] | {"prompt_id": 2}], r"a.jsonl:1: 2 is not in this export"),
    ],
)
def test_wrong_results_of_wise_are_one_line(run: Any, tmp_path: Path, rows: list[Any], line: str) -> None:
    waits(run, WISE())
    rewrite(tmp_path / "e" / "exports" / "wise" / "Results" / "a.jsonl", jsonl(rows))
    with pytest.raises(DataError, match=line):
        run(WISE())


# --------------------------------------------------------------------------- prompts that cannot be used


def test_bad_prompts_are_named_and_the_rest_exported(run: Any, assets: Path, tmp_path: Path) -> None:
    path = assets / "geneval" / "evaluation_metadata.jsonl"
    path.write_text(
        "{\n" + json.dumps({"tag": "x", "prompt": " "}) + "\n" + json.dumps(GENEVAL[0]) + "\n[]\n\n" + "[" * 10**5
    )
    assert "4 prompts were left out: evaluation_metadata.jsonl: line 1: must be a mapping" in waits(run, GenEval())
    assert sorted(p.name for p in (tmp_path / "e" / "exports" / "geneval").iterdir()) == ["00002"]  # its line, from 0
    assert [problem.split(": ")[1] for problem in run.context.problems] == ["line 1", "line 2", "line 4", "line 6"]

    prompts = assets / "dpg_bench" / "prompts"
    (prompts / "a.b.txt").write_text("red 7")
    (prompts / "empty.txt").write_text(" \n")
    (prompts / "latin.txt").write_bytes("prés".encode("latin-1"))
    waits(run, DPGBench())
    assert [problem.split(": ")[0].split("/")[-1] for problem in run.context.problems] == [
        "a.b.txt",
        "empty.txt",
        "latin.txt",
    ]
    science = assets / "wise" / "natural_science.json"
    science.write_text(
        json.dumps([3, {"prompt_id": "7", "Prompt": "x"}, {"prompt_id": 701}, {"prompt_id": 1, "Prompt": "x"}])
    )
    waits(run, WISE())
    assert [problem.partition(": item ")[2] for problem in run.context.problems] == [
        "0: prompt_id is None; must be a number from 1 to 1000",
        "1: prompt_id is '7'; must be a number from 1 to 1000",
        "2: Prompt is None; must be a text",
        "3: prompt_id 1 occurs twice",
    ]


def test_half_a_character_is_left_out(run: Any, assets: Path, tmp_path: Path) -> None:
    path = assets / "geneval" / "evaluation_metadata.jsonl"
    path.write_text(json.dumps(GENEVAL[0] | {"prompt": "red \ud800"}) + "\n" + json.dumps(GENEVAL[1]))
    assert r"1 prompts were left out: prompt 00000: 'red \ud800': not valid Unicode" in waits(run, GenEval())
    assert [p.name for p in (tmp_path / "e" / "exports" / "geneval").iterdir()] == ["00001"]


def test_a_prompt_that_is_too_long_is_left_out(run: Any, assets: Path, tmp_path: Path) -> None:
    assert "5 prompts were left out: prompt 401: a caption of 4 tokens" in waits(run, WISE(), caption_tokens=2)
    waits(run, DPGBench(), caption_tokens=4)
    assert [path.stem for path in (tmp_path / "e" / "exports" / "dpg_bench").iterdir()] == ["partiprompts107"]


def test_files_without_a_prompt_fail(run: Any, assets: Path) -> None:
    (assets / "geneval" / "evaluation_metadata.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"evaluation_metadata.jsonl: no prompt in it"):
        run(GenEval())
    (assets / "wise" / "natural_science.json").write_text("{}")
    with pytest.raises(DataError, match=r"natural_science.json: must be a JSON list"):
        run(WISE())


@pytest.mark.parametrize("benchmark", [GenEval(), DPGBench(), T2ICompBench(), WISE()], ids=lambda b: b.name)
def test_missing_prompts_say_where_they_are_looked_for(
    benchmark: Composition, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SYMBIOTIC_ASSETS", raising=False)
    with pytest.raises(
        MissingAsset, match=rf"\$SYMBIOTIC_ASSETS/{benchmark.name}.*evaluation.benchmarks.{benchmark.name}.prompts"
    ):
        benchmark.protocol()
    for folder in ("dpg_bench/prompts", "t2i_compbench", "wise"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setenv("SYMBIOTIC_ASSETS", str(tmp_path))
    with pytest.raises(
        MissingAsset, match=r"no \*.txt in it|no \*_val.txt in it|no cultural_common|evaluation_metadata"
    ):
        benchmark.protocol()


def test_named_categories_must_be_there(assets: Path) -> None:
    prompts = str(assets / "t2i_compbench")
    with pytest.raises(MissingAsset, match=r"t2i_compbench: no shape_val.txt in it"):
        T2ICompBench(prompts, categories=["color", "shape"]).protocol()
    with pytest.raises(ConfigError, match=r"categories: colour: no such category; did you mean 'color'"):
        T2ICompBench(categories=["colour"])


# --------------------------------------------------------------------------- in a suite


def test_a_protocol_changes_with_the_prompts_and_their_images(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYMBIOTIC_ASSETS", str(assets))
    before = [b.protocol() for b in (GenEval(), DPGBench(), T2ICompBench(), WISE())]
    assert [b.protocol() for b in (GenEval(), DPGBench(), T2ICompBench(), WISE())] == before
    assert GenEval(images=2).protocol() != before[0]
    (assets / "dpg_bench" / "prompts" / "new.txt").write_text("red")
    assert DPGBench().protocol() != before[1]
    assert T2ICompBench(categories=["color"]).protocol() != before[2]
    assert WISE().protocol() == before[3]


def test_the_config_names_all_four(assets: Path) -> None:
    config = compose_evaluation(["run=x", "evaluation=official", "evaluation.benchmarks.geneval.images=2"])
    made = make_benchmarks(config.evaluation)
    for cls in (GenEval, DPGBench, T2ICompBench, WISE):
        assert type(made[cls.name]) is cls
        assert made[cls.name].needs_latents
        assert metric(f"{cls.name}/color").official
        assert metric(cls.name).side == "generation"
    assert made["geneval"].images == 2  # type: ignore[attr-defined]


def test_an_export_without_results_is_a_missing_file_of_a_suite(
    run: Any, assets: Path, corpus: Path, tmp_path: Path
) -> None:
    suite = Suite([GenEval(), WISE()], Tokenizer.load(corpus / "tokenizer.json"), OBJECTIVE, batch_size=8)
    model = build("symbiotic", vocab_size=512)
    found = suite.run(model, folder=tmp_path / "s")
    assert sorted(found.missing) == ["geneval", "wise"]
    assert not found
    assert not found.failed
    rewrite(tmp_path / "s" / "exports" / "wise" / "Results" / "a.jsonl", jsonl(wise_rows()))
    found = suite.run(model, folder=tmp_path / "s")
    assert sorted(found.missing) == ["geneval"]
    assert found.n["wise"] == 6
    assert "src/eval.py has one" in suite.run(model, only=["wise"]).missing["wise"]

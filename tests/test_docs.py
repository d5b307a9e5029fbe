"""What the documents say holds: commands compose, targets, files, symbols, keys and tests exist."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from checkpoints import OLMOE
from symbiotic import arc
from symbiotic.callbacks.csv_log import last_values
from symbiotic.config import CONF, compose, compose_evaluation
from symbiotic.files import write_json
from symbiotic.ranks import planned
from symbiotic.studies import ask, check_data, export_hf, generate, inspection
from symbiotic.studies.request import parse_request
from symbiotic.studies.study import read_study

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (
        *(ROOT / n for n in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("experiments/*/*.md"),
    )
}


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """Cells of the tables in a text, without their headings."""
    table = [line.strip().strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    ruler = [i for i, cells in enumerate(table) if set(cells[0].strip()) <= set("-:")]
    return [[cell.strip() for cell in cells] for i, cells in enumerate(table) if i not in ruler and i + 1 not in ruler]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


COMMANDS = [
    line.split(" #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", "\n".join(DOCUMENTS.values()), re.DOTALL)
    for line in block.splitlines()
]
TRAIN = [command for command in COMMANDS if "src/train.py" in command]
EVAL = [command for command in COMMANDS if "src/eval.py" in command]
REQUESTS = [c for c in COMMANDS if re.search(r"src/(generate|ask|inspect_run|check_data|export_hf)\.py", c)]
MAP = rows(section("Paper map"))


@pytest.mark.parametrize("command", TRAIN)
def test_commands_compose(command: str, tmp_path: Path) -> None:
    """Under torchrun as in one of its ranks; a pretrained model is its config alone."""
    starter, _, rest = command.partition("src/train.py")
    write_json(tmp_path / "config.json", OLMOE)
    arguments = shlex.split(re.sub(r"(?<= init_from=)\S+", str(tmp_path), rest))
    overrides = [argument for argument in arguments if "=" in argument or argument.startswith("~")]
    assert set(arguments) - set(overrides) <= {"-m", "--cfg", "job"}
    choices = [choice_of(override) for override in overrides]
    assert "-m" in arguments or all(len(choice) == 1 for choice in choices)
    count = dict(re.findall(r"--(nproc-per-node|nnodes) (\d+)", starter))
    nodes = int(count.get("nnodes", 1))
    with planned(nodes * int(count.get("nproc-per-node", 1)), nodes):
        for member in itertools.product(*choices):
            compose(member)


@pytest.mark.parametrize("command", sorted({c for c in COMMANDS if c.startswith("make study")}))
def test_studies_that_make_runs_compose(command: str) -> None:
    arguments = dict(word.partition("=")[::2] for word in shlex.split(command)[2:])
    assert set(arguments) <= {"STUDY", "PROCESSES", "ARGS"}
    assert int(arguments.get("PROCESSES", 2)) > 0
    study = read_study(arguments["STUDY"])
    seeds = [seed for word in arguments.get("ARGS", "").split() for seed in word.removeprefix("seed=").split(",")]
    assert study.arms
    assert {int(seed) for seed in seeds} <= set(study.seeds)


def choice_of(override: str) -> list[str]:
    key, equals, values = override.partition("=")
    return [key + equals + value for value in ([values] if "[" in values or "{" in values else values.split(","))]


@pytest.mark.parametrize("command", EVAL)
def test_commands_of_the_evaluation_compose(command: str) -> None:
    compose_evaluation(shlex.split(command.partition("src/eval.py")[2]))


@pytest.mark.parametrize("command", REQUESTS)
def test_commands_of_the_other_scripts_are_read(command: str) -> None:
    script, arguments = re.fullmatch(r"python src/(\w+)\.py (.*)", command).groups()  # type: ignore[union-attr]
    scripts = {"generate": generate, "ask": ask, "inspect_run": inspection, "check_data": check_data}
    module = (scripts | {"export_hf": export_hf})[script]
    parse_request(module.Request, shlex.split(arguments), module.READ)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_make_targets_and_links_exist(name: str) -> None:
    text = DOCUMENTS[name]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    written = [*code(text), *COMMANDS]
    named = {match for command in written for match in re.findall(r"^make ([a-z-]+)", command)}
    assert named <= targets
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    files = [link.partition("#")[0] for link in links]
    assert [file for file in files if file and not ((ROOT / name).parent / file).exists()] == []


def test_the_axes_are_those_of_conf() -> None:
    for cells in rows(section("The axes")):
        if (CONF / cells[0].strip("`")).is_dir():
            folder = CONF / cells[0].strip("`")
            shown = {path.stem for path in folder.glob("*.yaml")} - {"none", "roles"}
            assert set(code(cells[1])) - {"none"} == shown, cells[0]
            continue
        for group in code(cells[0]):
            known = {path.stem for path in (CONF / group).glob("*.yaml")} if (CONF / group).is_dir() else set()
            assert known <= set(code(cells[1])) or (CONF / "system" / f"{group}.yaml").exists(), group


def test_every_system_has_its_row() -> None:
    shown = {code(cells[0])[0] for cells in rows(section("The axes")) if len(cells) == 5}
    assert shown == {path.stem for path in (CONF / "system").glob("*.yaml")}


@pytest.fixture(scope="module")
def folder(shared_tmp: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a smoke run."""
    runs = tmp_path_factory.mktemp("runs")
    paths = [f"paths.runs={runs}", f"paths.data={shared_tmp / 'data'}", f"paths.cache={shared_tmp / 'cache'}"]
    config = compose(["experiment=smoke", *paths])
    arc.run(config)
    return Path(config.run_dir)


def test_the_run_folder_is_as_described(folder: Path) -> None:
    """Every file of a run is described, and every described one is there."""
    assert re.fullmatch(r"symbiotic-[0-9a-f]{8}-seed0", folder.name)
    described = [pattern for cells in rows(section("The run folder")) for pattern in code(cells[0])]
    found = {p: {f for g in folder.glob(p) for f in (g.rglob("*") if g.is_dir() else [g])} for p in described}
    assert [pattern for pattern, files in found.items() if not files] == []
    everything = {path for path in folder.rglob("*") if path.is_file()}
    assert everything - set().union(*found.values()) == set()


# --------------------------------------------------------------------------- the paper map


@functools.cache
def default_config() -> dict[str, Any]:
    return dataclasses.asdict(compose())


def lookup(key: str) -> Any:
    node: Any = default_config()
    for part in key.split("."):
        node = node[part]
    return node


@functools.cache
def defined_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", MAP, ids=lambda row: row[0].replace(" ", "_"))
def test_paper_map(row: list[str]) -> None:
    mechanism, source, symbols, keys, tests, whose = row
    assert mechanism
    assert source
    assert "theirs" in whose or "ours" in whose
    assert code(symbols)
    for symbol in code(symbols):
        path, _, name = symbol.partition(":")
        module = importlib.import_module("symbiotic." + path.removesuffix(".py").replace("/", "."))
        functools.reduce(getattr, name.split("."), module)
    for key in code(keys):
        lookup(key)
    assert code(keys) or keys == "–"
    assert code(tests)
    for test in code(tests):
        path, _, name = test.partition("::")
        assert name in defined_in(ROOT / "tests" / path), test


def test_a_wrong_row_is_seen() -> None:
    with pytest.raises(KeyError):
        lookup("objective.no_such_key")
    good = next(row for row in MAP if code(row[3]))
    with pytest.raises(AttributeError):
        test_paper_map([*good[:2], "`models/moe.py:NoSuchClass`", *good[3:]])


# --------------------------------------------------------------------------- metrics


def test_every_logged_metric_is_documented(folder: Path) -> None:
    """Each column of a run's metrics.csv matches a name of docs/metrics.md, and each name there occurs or is named
    here with the reason."""
    logged = set(last_values(folder / "metrics.csv"))
    documented = [name for cells in rows(METRICS_PAGE) for name in code(cells[0])]
    patterns = {name: re.compile(metric_pattern(name)) for name in documented}
    assert [name for name in logged if not any(p.fullmatch(name) for p in patterns.values())] == []
    unused = {name for name, pattern in patterns.items() if not any(pattern.fullmatch(name) for name in logged)}
    off = {"eval/quick/SCORE", "eval/ema/SCORE", "eval/ema/quick/SCORE"}  # by default; see test_eval.py
    task = {name for name in documented if "task" in name}  # of system=utamoe; see callbacks/test_task_routing.py
    codes = {"train/image_ce"}  # of objective=autoregressive; see test_codes_run.py
    gpu = {"memory/peak_gb"}
    assert unused == off | task | codes | gpu


METRICS_PAGE = (ROOT / "docs" / "metrics.md").read_text()


def metric_pattern(name: str) -> str:
    words = {
        "ROLE": r"\w+",
        "KIND": "(text|prompt|vit|vae)",
        "GROUP": "(text|prompt|vit|vae|und|all)",
        "SCORE": r"[\w.]+",
    }
    words |= {"POOL": r"[\w+]+", "@F": r"@[\d.]+", "layerI": r"layer\d+", "METRIC": r"[\w@.]+"}
    pattern = re.escape(name)
    for word, meaning in words.items():
        pattern = pattern.replace(re.escape(word), meaning)
    return pattern

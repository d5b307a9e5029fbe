"""The layers of the package (who may import whom), and calls that must not stand in it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src"
FILES = {str(path.relative_to(SRC)): path for path in sorted(SRC.rglob("*.py"))}
INITS = [name for name in FILES if name.endswith("__init__.py")]
LAYERS = [
    {"schema", "layout", "files", "stop", "redact", "ranks"},
    {"models"},
    {"objectives", "training", "convert", "images"},
    {"generation", "data"},
    {"evaluation"},
    {"module", "callbacks"},
    {
        "allocator",
        "config",
        "checks",
        "hints",
        "claim",
        "launch",
        "team",
        "strategy",
        "arc",
        "fit",
        "resume",
        "runs",
        "studies",
        "trained",
    },
    {path.stem for path in SRC.glob("*.py")},  # the scripts
]
LAYER = {name: layer for layer, names in enumerate(LAYERS) for name in names}
FIRST_LAYER = {"lightning": 5, "pytorch_lightning": 5, "hydra": 6, "omegaconf": 6}  # of a library's importers
OUTSIDE = {"symbiotic/models/towers.py": {"open_clip"}}  # a published tower is a part of the model; inside functions
HEAVY = {"torchmetrics", "torch_fidelity", "lm_eval", "open_clip", "transformers", "diffusers", "timm", "wandb"}


def part(path: Path) -> str:
    """`models` of src/symbiotic/models/moe.py; `config` of src/symbiotic/config.py; `train` of src/train.py."""
    inside = path.relative_to(SRC).with_suffix("").parts
    return inside[1] if inside[0] == "symbiotic" else inside[0]


def imports(path: Path, depth: str = "any") -> Iterator[str]:
    """Full names imported in a file; depth=`module`: only those that importing the file executes."""
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if depth == "module" and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if depth == "module" and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        nodes.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("name", [name for name in FILES if name != "symbiotic/__init__.py"])
def test_imports_go_down(name: str) -> None:
    me = part(FILES[name])
    for imported in imports(FILES[name]):
        library, _, rest = imported.partition(".")
        broken = f"{me} (layer {LAYER[me]}) imports {imported}"
        if library == "symbiotic" and rest != "__version__":
            other = rest.split(".")[0]
            own = other == me or (LAYER[other] == LAYER[me] and LAYER[me] in (0, 6))
            assert own or LAYER[other] < LAYER[me], broken
        assert LAYER[me] >= FIRST_LAYER.get(library, 0), broken
        if LAYER[me] <= 1:
            outside = {"torch"} if LAYER[me] == 1 else set()
            assert library in {"symbiotic", *outside, *OUTSIDE.get(name, ()), *sys.stdlib_module_names}, broken


@pytest.mark.parametrize("name", FILES)
def test_heavy_packages_are_imported_inside_functions(name: str) -> None:
    assert not {imported.partition(".")[0] for imported in imports(FILES[name], "module")} & HEAVY


@pytest.mark.parametrize("name", INITS)
def test_importing_a_package_imports_nothing_else(name: str) -> None:
    libraries = {imported.partition(".")[0] for imported in imports(FILES[name], "module")}
    assert libraries <= {"__future__", "typing", "importlib"}


def forbidden(node: ast.AST) -> str | None:
    """What is wrong with a call: it runs code from files, or text in a shell, or writes outside a folder."""
    if not isinstance(node, ast.Call):
        return None
    called = ast.unparse(node.func)
    keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
    loads = {"pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "joblib.load", "eval", "exec", "os.system"}
    if called in loads or called.endswith(".extractall"):
        return called
    wrong = {"weights_only": "False", "shell": "True", "allow_pickle": "True", "trust_remote_code": "True"}
    return next((f"{called}({k}={v})" for k, v in keywords.items() if wrong.get(str(k)) == v), None)


@pytest.mark.parametrize("name", FILES)
def test_no_call_that_runs_what_a_file_says(name: str) -> None:
    tree = ast.parse(FILES[name].read_text())
    assert [f"line {node.lineno}: {call}" for node in ast.walk(tree) if (call := forbidden(node))] == []


@pytest.mark.parametrize(
    "code",
    ["torch.load(p, weights_only=False)", "pickle.load(f)", "eval('1')", "run(c, shell=True)", "tar.extractall(p)"],
)
def test_the_call_test_sees(code: str) -> None:
    assert forbidden(ast.parse(code, mode="eval").body)


def test_one_module_calls_hydras_instantiate() -> None:
    """Everything configurable is built behind the allow-list of `symbiotic.config`."""
    uses = [
        name
        for name, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.ImportFrom) and node.module == "hydra.utils" and node.names[0].name == "instantiate")
        or (isinstance(node, ast.Attribute) and ast.unparse(node) in ("hydra.utils.instantiate", "utils.instantiate"))
    ]
    assert uses == ["symbiotic/config.py"]

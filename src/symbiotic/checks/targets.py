"""Which classes a config may name in `_target_`, and whether it names them rightly: checked without importing them.

A class of this package is looked up in its source (module, class, arguments), so a misspelt argument in a YAML file
is found before torch is loaded. Standard library only.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from symbiotic.schema import ConfigError, near_miss, parse

ALLOWED = ("symbiotic.", "lightning.pytorch.callbacks.", "lightning.pytorch.loggers.", "lightning.pytorch.profilers.",
           "lightning.pytorch.strategies.", "torch.optim.")  # fmt: skip
"""Prefixes of what may be instantiated."""

_PACKAGE = Path(__file__).parents[1]
_PATH = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\.[A-Za-z][A-Za-z0-9_]*)+")
_PLAIN = {"int": int, "float": float, "str": str, "bool": bool}
_HYDRA_KEYS = ("_target_", "_args_", "_recursive_", "_convert_", "_partial_")


def check_targets(node: Any, key: str) -> None:
    """Check the `_target_` of a plain mapping, and all that stand deeper in it.

    Raises:
        ConfigError: a target outside the allow-list, one that does not exist, or an argument that it does not take.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(f"{key}: must be null or a mapping with the key _target_")
    for where, mapping in _mappings(node, key):
        if any(isinstance(name, str) and name.startswith("_") and name.endswith("_") for name in mapping):
            _target(where, mapping)


def _mappings(node: Any, key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(node, Mapping):
        yield key, node
        for name, value in node.items():
            yield from _mappings(value, f"{key}.{name}")
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from _mappings(value, f"{key}[{i}]")


def _target(key: str, node: Mapping[str, Any]) -> None:
    target = node.get("_target_")
    if not isinstance(target, str) or not _PATH.fullmatch(target) or not target.startswith(ALLOWED):
        allowed = ", ".join(prefix + "*" for prefix in ALLOWED)
        raise ConfigError(f"{key}._target_={target}: not allowed; must be one of {allowed}")
    for name in node:
        if name.startswith("_") and name not in ("_target_", "_convert_"):
            raise ConfigError(f"{key}.{name}={node[name]}: not allowed; arguments are given by name")
    if target.startswith("symbiotic."):
        check_arguments(key, target, node, _source_arguments(key, target))


def arguments(node: Mapping[str, Any]) -> dict[str, Any]:
    """What the node passes to its target."""
    return {name: value for name, value in node.items() if name not in _HYDRA_KEYS}


def check_arguments(key: str, target: str, node: Mapping[str, Any], known: list[str] | None) -> None:
    """known: names of the arguments that the target takes; None: unknown, anything goes.

    Raises:
        ConfigError: an argument that is not among them.
    """
    for name in arguments(node) if known is not None else ():
        if name not in (known or ()):
            raise ConfigError(f"{key}.{name}: no such argument of {target}; {near_miss(name, known or ())}")


def _source_arguments(key: str, target: str) -> list[str] | None:
    """Arguments of a class of this package, read from its source."""
    module, _, name = target.rpartition(".")
    path = _PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    if not path.is_file():
        raise ConfigError(f"{key}._target_={target}: no such module; {near_miss(path.stem, _modules(path.parent))}")
    classes = classes_of(path)
    if name not in classes:
        raise ConfigError(f"{key}._target_={target}: no such class; {near_miss(name, classes)}")
    body, init = classes[name].body, init_of(classes[name])
    if init is not None:
        return [a.arg for a in (*init.args.args[1:], *init.args.kwonlyargs)]
    if any("dataclass" in ast.unparse(d) for d in classes[name].decorator_list):
        return [n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    own = {ast.unparse(base) for base in classes[name].bases}
    return [] if own <= {"object", "Callback"} else None  # inherited from elsewhere: known at instantiation


def init_of(cls: ast.ClassDef) -> ast.FunctionDef | None:
    return next((n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)


def check_source_types(node: Mapping[str, Any], key: str) -> None:
    """Raises ConfigError: an argument of a class of this package that is of another type than its source says, where
    that says text, number or flag, or null beside one of them."""
    module, _, name = str(node["_target_"]).rpartition(".")
    path = _PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    found = classes_of(path).get(name) if module.startswith("symbiotic.") and path.is_file() else None
    init = init_of(found) if found is not None else None
    for argument in (*init.args.args, *init.args.kwonlyargs) if init is not None else ():
        said = ast.unparse(argument.annotation) if argument.annotation is not None else ""
        kind = _PLAIN.get(said.removesuffix(" | None"))
        if kind is not None and argument.arg in node and not (node[argument.arg] is None and "None" in said):
            parse(kind, node[argument.arg], f"{key}.{argument.arg}")


@functools.cache
def classes_of(path: Path) -> dict[str, ast.ClassDef]:
    return {n.name: n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef)}


def _modules(folder: Path) -> list[str]:
    return [path.stem for path in folder.glob("*.py")] if folder.is_dir() else []


def signature_arguments(cls: type) -> list[str] | None:
    """Arguments of an imported class; None if it takes any."""
    parameters = inspect.signature(cls).parameters.values()
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters) else [p.name for p in parameters]

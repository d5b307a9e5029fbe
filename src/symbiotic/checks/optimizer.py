"""What an optimiser of torch would refuse.

Standard library only: torch's classes are looked up in their sources, as ours are (`targets`).
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from symbiotic.checks.rules import require
from symbiotic.checks.targets import check_arguments, classes_of, init_of
from symbiotic.schema import ConfigError, near_miss

OPTIM = "torch.optim."
_SHARES = ("momentum", "alpha", "rho", "momentum_decay")  # in [0, 1)
_NOT_NEGATIVE = ("eps", "weight_decay", "dampening", "lr_decay", "lambd", "initial_accumulator_value")
_FLAGS = ("amsgrad", "maximize", "nesterov", "centered", "decoupled_weight_decay", "foreach", "capturable", "fused")


def check_optimizer(node: Mapping[str, Any], key: str) -> None:
    """Raises ConfigError: no such class of torch, an argument that it does not take, or a value out of range."""
    target = str(node.get("_target_"))
    if target.startswith(OPTIM):
        check_arguments(key, target, node, _arguments(target.removeprefix(OPTIM), key))
    for name in _FLAGS:
        value = node.get(name)
        require(value is None or isinstance(value, bool), f"{key}.{name}", value, "must be true, false or null")
    for name in _SHARES:
        ok = _is_number(node.get(name, 0)) and 0 <= node.get(name, 0) < 1
        require(ok, f"{key}.{name}", node.get(name), "must be a number in [0, 1)")
    for name in _NOT_NEGATIVE:
        values = node.get(name, 0)
        pair = name == "eps" and isinstance(values, (list, tuple))  # of Adafactor
        listed = [value for value in values if value is not None] if pair else [values]
        ok = all(_is_number(value) and 0 <= value < float("inf") for value in listed)
        require(ok, f"{key}.{name}", values, "must be a number, at least 0")
    betas = node.get("betas", (0, 0))
    ok = isinstance(betas, (list, tuple)) and len(betas) == 2 and all(_is_number(b) and 0 <= b < 1 for b in betas)
    require(ok, f"{key}.betas", betas, "must be two numbers in [0, 1)")
    both = node.get("fused") and node.get("foreach")
    require(not both, f"{key}.foreach", node.get("foreach"), f"is not to be had with {key}.fused=true")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _arguments(name: str, key: str) -> list[str] | None:
    """Those of a class of `torch.optim`, of which the parameters are given to it; None where they cannot be told."""
    found = find_spec("torch")  # finds it, and does not import it
    folder = Path(str(found.origin)).parent / "optim" if found is not None else Path("none")
    files = [folder / f"{name.lower()}.py"]
    files += [file for file in sorted(folder.glob("*.py")) if file not in files]
    known: list[str] = []
    for file in filter(Path.is_file, files):
        classes: dict[str, ast.ClassDef] = classes_of(file)
        if name in classes:
            init = init_of(classes[name])
            if init is None or init.args.kwarg:
                return None
            return [argument.arg for argument in (*init.args.args, *init.args.kwonlyargs)]
        known += [one for one in classes if not one.startswith("_")]
    if not known:
        return None
    raise ConfigError(f"{key}._target_={OPTIM}{name}: no such class; {near_miss(name, known)}")

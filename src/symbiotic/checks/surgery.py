"""Whether the gradient surgery of a config can be applied, and if not, why.

Standard library only.
"""

from __future__ import annotations

from importlib.util import find_spec

from symbiotic.checks.rules import at_least, known, plain, trained_tasks
from symbiotic.layout import trained_names
from symbiotic.schema import Config, ConfigError
from symbiotic.training.roles import assign_roles

NEEDS = {
    "pcgrad": ("torchjd",),
    "cagrad": ("torchjd", "cvxpy", "clarabel"),
    "upgrad": ("torchjd", "qpsolvers", "quadprog"),
}
"""Method of torchjd -> what has to be installed for it."""

MOMENTUM = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax")
"""Optimisers of torch that keep a first moment `exp_avg`."""


def check_surgery(config: Config) -> None:
    """Raises ConfigError."""
    surgery = config.surgery
    at_least(surgery, "surgery.", 0, "cagrad_c")
    known("surgery.roles", surgery.roles, config.rates.roles, "role")
    why = refusal(config)
    if why:
        raise ConfigError(f"surgery.method={surgery.method}: {why}")


def refusal(config: Config) -> str | None:
    """Why the method cannot be applied, and what to do; None where it can, and for `none`."""
    method = config.surgery.method
    if method == "none":
        return None
    why = _conflict(config) or _parameters(config)
    return why or (_momentum(config) if method == "maop" else _tasks(config))


def _conflict(config: Config) -> str | None:
    """The two tasks are understanding (CE: captions too) and generation (flow); one alone conflicts with nothing."""
    if "generation" not in trained_tasks(config):
        return "the mix trains no generation samples, and one task alone has no conflicts; must be none"
    for key in ("ce_weight", "flow_weight"):
        if getattr(config.objective, key) == 0:
            return f"objective.{key} is 0, and one task alone has no conflicts; must be none"
    return None


def _parameters(config: Config) -> str | None:
    roles = config.surgery.roles
    assigned = assign_roles(trained_names(config), config.rates.roles)
    if not roles or set(roles) & set(assigned.values()):
        return None
    return f"system={config.system.name} has no parameter of surgery.roles={plain(roles)}; name others, or none"


def _momentum(config: Config) -> str | None:
    target = str(config.rates.optimizer.get("_target_"))
    if target.startswith("torch.optim.") and target.rpartition(".")[2] in MOMENTUM:
        return None
    return f"rates.optimizer._target_={target} keeps no first moment; must be torch.optim.AdamW or a relative"


def _tasks(config: Config) -> str | None:
    trainer, method = config.trainer, config.surgery.method
    for key in ("devices", "num_nodes"):
        if trainer.get(key, 1) != 1:
            why = "the tasks' gradients would be combined on each device before they are averaged"
            return f"trainer.{key}={plain(trainer[key])}: {why}; must be 1"
    if str(trainer.get("precision")) in ("16", "16-mixed"):
        return f"trainer.precision={trainer['precision']} scales the loss, but not the tasks'; must be bf16-mixed or 32"
    missing = [name for name in NEEDS[method] if find_spec(name) is None]
    return f"needs {', '.join(missing)}: pip install 'symbiotic[surgery]'" if missing else None

"""What a training would take on machines that are not here: memory, communication, time, data rates; ours.

    python -m symbiotic.studies.forecast                 the paper's setting on 1, 8, 64 and 256 GPUs
    python -m symbiotic.studies.forecast gpus=64 device=h200 model=FOLDER system=standard_moe tokens=1e6 mfu=.3

The formulas are in `forecast_costs.py`. tests/studies/test_forecast.py holds parameters, states, activations and
operations against real models; benchmarks/forecast.py the time of a step on this machine.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from symbiotic.config import CONF, read_yaml
from symbiotic.schema import Attention, ConfigError, Model, Router, System, parse
from symbiotic.studies.console import make_table, show
from symbiotic.studies.forecast_costs import (
    Device,
    Forecast,
    Layout,
    Setting,
    Shapes,
    data_rates,
    forecast,
    shapes_of,
    split,
)

DEVICES = {
    "a100": Device(80e9, 312e12, 300e9, 25e9),
    "h100": Device(80e9, 989e12, 450e9, 50e9),
    "h800": Device(80e9, 989e12, 200e9, 50e9),
    "h200": Device(141e9, 989e12, 450e9, 50e9),
}

MODELS = {
    # 47 MoE layers of 128 routed experts, 30 billion parameters of which 3 are active: so much is published. The other
    # sizes are those of Qwen3-30B-A3B, the open model of that class, with one shared expert as wide as a routed one.
    "30b_a3b": Model(2048, 48, 151_936, 128, 768, 768, Attention(32, 4, 128), Router(8), 0.25, dense_layers=(0,),
                     dense_hidden=6144, patch_dim=64, max_grid=64),
    "olmoe": Model(2048, 16, 50_304, 64, 1024, 0, Attention(16, 16, 128, qk_norm="full"), Router(8, normalize=False),
                   0.25, patch_dim=64, max_grid=64),
    "1b": Model(1024, 16, 50_304, 32, 512, 512, Attention(16, 4, 64), Router(4), 0.25, patch_dim=64, max_grid=64),
}  # fmt: skip


GPUS = (1, 8, 64, 256)


def layouts(gpus: int, model: Model, system: System, setting: Setting) -> list[Layout]:
    """Those to choose among: copies, shards over eight GPUs or all, experts spread over powers of two, 1 to 8 rows."""
    pools = model.num_experts // system.merge if system.pools else 1
    rows = [m for m in (1, 2, 4, 8) if m == 1 or m * setting.row_tokens * gpus <= setting.tokens]
    cuts = sorted({1, gpus, *([8] if gpus % 8 == 0 else [])})
    spread = [(s, k) for s in cuts for k in (1, 2, 4, 8, 16, 32) if s % k == 0 and pools % k == 0]
    return [Layout(gpus, s, k, m, r) for (s, k), m, r in itertools.product(spread, rows, (False, True))]


def best(
    shapes: Shapes,
    model: Model,
    system: System,
    setting: Setting,
    gpus: int,
    device: Device,
    only: Mapping[str, Any] | None = None,
) -> Forecast:
    """The fastest layout that fits into memory; where none does, the smallest. Fewer means win at equal times.

    only: field of the layout -> the value it must have.

    Raises:
        ConfigError: no layout is so.
    """
    wanted = dict(only or {})
    chosen = [one for one in layouts(gpus, model, system, setting) if wanted.items() <= dataclasses.asdict(one).items()]
    if not chosen:
        said = ", ".join(f"{key}={value}" for key, value in wanted.items())
        raise ConfigError(
            f"{said}: no layout of {gpus} GPUs is so; shard must be 1, 8 or all, experts divide it, micro be 1 to 8"
        )
    found = [forecast(shapes, model, system, setting, one, device) for one in chosen]
    fits = [one for one in found if one.memory <= device.memory * (1 - setting.spare)]
    if not fits:
        return min(found, key=lambda one: one.memory)
    return min(fits, key=lambda one: (round(one.overlapped, 3), one.layout.experts, one.layout.recompute))


# --------------------------------------------------------------------------- the command


def model_of(name: str) -> Model:
    """Of a name in `MODELS`, an option of conf/model, or a folder with a checkpoint's config.json.

    Raises:
        ConfigError: none of them.
    """
    if name in MODELS:
        return MODELS[name]
    if Path(name).is_dir():
        from symbiotic.convert.families import model_of_file

        return model_of_file(name, gen_fraction=0.25, patch_dim=64, max_grid=64)
    if name in ("embedded", "smoke"):
        from symbiotic.config import compose

        return compose([f"model={name}"]).model
    raise ConfigError(f"model={name}: must be {', '.join([*MODELS, 'embedded', 'smoke'])}, or a checkpoint's folder")


def system_of(name: str, model: Model) -> System:
    """A shipped system on a model."""
    path = CONF / "system" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(one.stem for one in path.parent.glob("*.yaml")))
        raise ConfigError(f"system={name}: must be one of {known}")
    node = OmegaConf.create({"model": {"gen_fraction": model.gen_fraction}, "system": read_yaml(path)})
    plain: Any = OmegaConf.to_container(node.system, resolve=True)
    return parse(System, plain, "system")


def options_of(arguments: Sequence[str]) -> dict[str, Any]:
    """`key=value` -> values as YAML has them.

    Raises:
        ConfigError: an unknown key, or a value of another type.
    """
    kinds: dict[str, Any] = {f.name: float for f in dataclasses.fields(Setting) if f.name != "shares"}
    kinds |= {"row_tokens": int, "image_tokens": int, "gpus": int, "device": str, "model": str, "system": str}
    kinds |= {"shard": int, "experts": int, "micro": int, "recompute": bool}
    found: dict[str, Any] = {}
    for argument in arguments:
        key, _, text = argument.partition("=")
        if key not in kinds:
            raise ConfigError(f"{argument}: no such option; one of {', '.join(kinds)}")
        value = text if kinds[key] is str else yaml.safe_load(text)
        value = float(text) if kinds[key] is float and _is_number(text) else value
        if not isinstance(value, kinds[key]) or (isinstance(value, bool) and kinds[key] is not bool):
            raise ConfigError(f"{argument}: must be of type {kinds[key].__name__}")
        if kinds[key] in (int, float) and value <= 0:
            raise ConfigError(f"{argument}: must be above 0")
        found[key] = value
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def column_of(found: Forecast, device: Device, setting: Setting) -> dict[str, str]:
    """One column of the table: row -> text."""
    one, rates = found.layout, data_rates(setting, found.overlapped)
    fits = found.memory <= device.memory * (1 - setting.spare)
    return {
        "sharded over": str(one.shard),
        "experts spread over": str(one.experts),
        "rows of a micro-batch": str(one.micro),
        "blocks recomputed": "yes" if one.recompute else "no",
        "memory a GPU, GB": f"{found.memory / 1e9:.1f}{'' if fits else ': TOO MUCH'}",
        "of it states": f"{found.states / 1e9:.1f}",
        "gathered or cast": f"{found.gathered / 1e9:.1f}",
        "activations": f"{found.activations / 1e9:.1f}",
        "logits": f"{found.logits / 1e9:.1f}",
        "compute, s": f"{found.compute:.2f}",
        "gather and reduce, s": f"{found.gather:.2f}",
        "dispatch to experts, s": f"{found.dispatch:.2f}",
        "step, overlapped, s": f"{found.overlapped:.2f}",
        "step, one after another, s": f"{found.one_after_another:.2f}",
        "tokens a second": f"{rates['tokens']:,.0f}",
        "images a second": f"{rates['images']:,.0f}",
        "data, MB a second": f"{rates['bytes'] / 1e6:,.0f}",
    }


def main(arguments: Sequence[str]) -> int:
    """The exit status."""
    try:
        options = options_of(arguments)
        model = model_of(options.get("model", "30b_a3b"))
        name = options.get("device", "h100")
        if name not in DEVICES:
            raise ConfigError(f"device={name}: must be one of {', '.join(DEVICES)}")
        system, device = system_of(options.get("system", "symbiotic"), model), DEVICES[name]
        fields = {f.name for f in dataclasses.fields(Setting)}
        setting = Setting(**{key: value for key, value in options.items() if key in fields})
        only: dict[str, Any] = {
            key: options[key] for key in ("shard", "experts", "micro", "recompute") if key in options
        }
        shapes = shapes_of(model, system)
        numbers = [options["gpus"]] if "gpus" in options else list(GPUS)
        columns = [best(shapes, model, system, setting, n, device, only) for n in numbers]
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    billions = [numbers / 1e9 for numbers in split(shapes)]
    print(f"{sum(billions):.2f} billion parameters, {billions[0]:.2f} of them in routed experts; {name}")
    told = [column_of(found, device, setting) for found in columns]
    heads = ["", *(f"{n} GPU{'s' * (n > 1)}" for n in numbers)]
    show(make_table("", heads, [[row, *(one[row] for one in told)] for row in told[0]]))
    print("By formula, at assumed efficiencies (mfu, reached); not measured on these machines.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""The forecast: its parts against real models and by hand, and its command."""

from __future__ import annotations

import pytest
import torch

from factory import SYSTEMS, build, load_system, random_batch, tiny_model
from symbiotic.config import compose
from symbiotic.schema import Attention
from symbiotic.studies.flops import count_flops
from symbiotic.studies.forecast import DEVICES, MODELS, best, main, system_of
from symbiotic.studies.forecast_costs import (
    Layout,
    Setting,
    activation_bytes,
    data_rates,
    dispatch_bytes,
    forecast,
    gather_bytes,
    shapes_of,
    split,
    state_bytes,
    step_flops,
)

SIZES = {"width": 64, "expert_hidden": 40, "shared_hidden": 56}
"""Distinct enough that no part of a sum stands for another."""


@pytest.mark.parametrize("name", SYSTEMS)
def test_parameters_and_states_are_those_of_a_real_optimiser(name: str) -> None:
    model = build(name)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    held = [
        t for p in model.parameters() for t in (p, p.grad, *optimizer.state[p].values()) if t is not None and t.dim()
    ]
    shapes = shapes_of(model.cfg, model.system)
    assert sum(split(shapes)) == sum(p.numel() for p in model.parameters())
    assert state_bytes(shapes, Layout(1, 1)) == sum(t.nbytes for t in held)
    assert state_bytes(shapes, Layout(8, 8, 2)) == pytest.approx(sum(t.nbytes for t in held) / 8)


@pytest.mark.filterwarnings("ignore:.*Cannot dispatch to fused implementation")
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", ["symbiotic", "standard_moe", "dense", "mot"])
@pytest.mark.parametrize("norm", ["none", "head"])
def test_activations_are_those_that_a_block_keeps(name: str, mixed: bool, norm: str) -> None:
    sizes = SIZES | {"attention": Attention(num_heads=4, num_kv_heads=2, head_dim=24, qk_norm=norm)}  # type: ignore[arg-type]
    batch = random_batch(count=9, row_tokens=48)
    kept = [saved_bytes(name, layers, mixed, batch, sizes) for layers in (2, 3)]
    model = tiny_model(**sizes)
    expected = activation_bytes(model, load_system(name, model), 48, mixed)
    assert (kept[1] - kept[0]) / batch.tokens.numel() == pytest.approx(expected, rel=0.12)


def saved_bytes(name: str, layers: int, mixed: bool, batch: object, sizes: dict[str, object]) -> int:
    """Bytes of all storages that a forward keeps for its backward, weights and their bfloat16 copies aside."""
    model = build(name, num_layers=layers, **sizes)
    weights = {tuple(sorted(p.shape[-2:])) for p in model.parameters()}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.dtype == torch.bfloat16 and tuple(sorted(tensor.shape[-2:])) in weights
        if tensor.untyped_storage().data_ptr() not in own and not copy:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed), hooks:
        out = model(batch)
    assert out.prediction.grad_fn is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def test_operations_are_those_of_the_audit() -> None:
    config = compose(["experiment=smoke"])
    shapes = shapes_of(config.model, config.system)
    shares = {"text": 0.4, "prompt": 0.1, "vit": 0.2, "vae": 0.3}
    setting = Setting(tokens=1000, row_tokens=config.data.row_tokens, shares=shares, targets=0.5)
    training = count_flops(shapes, config).training
    found = step_flops(shapes, config.model, config.system, setting, recompute=False)
    assert found == pytest.approx(1000 * sum(shares[kind] * training[kind] for kind in shares))
    fewer = Setting(tokens=1000, row_tokens=config.data.row_tokens, shares=shares, targets=0.25)
    head = 2 * config.model.width * config.model.vocab_size
    left = step_flops(shapes, config.model, config.system, fewer, recompute=False)
    assert found - left == pytest.approx(1000 * 0.25 * 3 * head)


def test_communication_by_hand() -> None:
    model = tiny_model(dense_layers=(0,), dense_hidden=16)
    system = load_system("symbiotic", model)
    shapes, setting = shapes_of(model, system), Setting(tokens=32 * 100, row_tokens=100)
    experts, others = split(shapes)
    two_micro_batches = Layout(gpus=16, shard=8, experts=2, micro=1)
    within, between = gather_bytes(shapes, setting, two_micro_batches)
    assert within == pytest.approx(2 * (others * 8 * 7 / 8 + experts / 2 * 8 * 3 / 4))
    assert between == pytest.approx((experts + others) / 8 * 8 / 2)
    assert gather_bytes(shapes, setting, Layout(1, 1))[0] == 0.0
    tokens, there_and_back, passes, layers = 32 * 100 / 16, 2, 3, 2
    by_hand = tokens * 2 * 32 * 2 * there_and_back * passes * layers / 2  # top-2, width 32, bfloat16, half stay
    assert dispatch_bytes(model, system, setting, two_micro_batches) == pytest.approx(by_hand)


def test_the_best_layout_fits_and_is_the_fastest() -> None:
    model = MODELS["30b_a3b"]
    system, device, setting = system_of("symbiotic", model), DEVICES["h100"], Setting()
    shapes = shapes_of(model, system)
    assert sum(split(shapes)) == pytest.approx(30e9, rel=0.02)
    found = best(shapes, model, system, setting, 256, device)
    assert found.memory < 0.9 * device.memory
    assert found.compute <= found.overlapped <= found.one_after_another
    other = forecast(shapes, model, system, setting, Layout(256, 256, 1, 1, True), device)
    assert found.overlapped <= other.overlapped
    assert best(shapes, model, system, setting, 1, device).memory > device.memory  # said, not hidden
    assert data_rates(setting, 2.0) == {"tokens": 1e6, "images": 1e6 / 512, "bytes": 1e6 / 512 * 60e3 + 2e6}


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model=1b", "gpus=8", "tokens=1e5", "device=h200", "experts=2"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "experts spread over 2" in printed
    assert "not measured on these machines" in printed
    assert main(["gpus=1"]) == 0
    assert "TOO MUCH" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("gpu=3", "gpu=3: no such option; one of tokens"),
        ("gpus=x", "gpus=x: must be of type int"),
        ("gpus=true", "gpus=true: must be of type int"),
        ("mfu=0", "mfu=0: must be above 0"),
        ("device=z", "device=z: must be one of a100, h100"),
        ("model=z", "model=z: must be 30b_a3b, olmoe, 1b, embedded, smoke, or a checkpoint's folder"),
        ("system=z", "system=z: must be one of bagel"),
        ("experts=5", "experts=5: no layout of 1 GPUs is so"),
    ],
)
def test_a_wrong_option_is_one_line(argument: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([argument]) == 2
    assert f"error: {line}" in capsys.readouterr().err

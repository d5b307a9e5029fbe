"""Conversions from disk to disk: nothing is lost, little is in memory, what cannot be is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import OLMOE, QWEN2, SIZES, tensors, write
from split_runs import logits, random_tokens, text_batch
from symbiotic.convert.families import CONFIG, model_of_file
from symbiotic.convert.huggingface import parent_layout, read_parent
from symbiotic.convert.profile import router_inputs
from symbiotic.convert.tensor_files import header, write_file
from symbiotic.models.places import Places
from symbiotic.models.unified import UnifiedModel
from symbiotic.schema import RunError
from symbiotic.studies.convert_hf import main

ROOT = Path(__file__).resolve().parents[2]
MADE = {"olmoe": OLMOE, "qwen2": QWEN2}
LLAMA = SIZES | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "intermediate_size": 40}
LLAMA |= {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "initializer_range": 0.2}


def read_back(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MADE)
def test_there_and_back_keeps_every_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    state = tensors(MADE[name], dtype)
    folder = write(tmp_path / "in", MADE[name], state, shards=3)
    (folder / "tokenizer.json").write_text("{}")
    assert main([f"folder={folder}", f"out={tmp_path / 'parent'}", "to=parent"]) == 0
    assert main([f"folder={tmp_path / 'parent'}", f"out={tmp_path / 'again'}", "to=hf", "shard=1"]) == 0
    again = read_back(tmp_path / "again")
    assert set(again) == set(state)
    assert all(torch.equal(again[key], state[key]) and again[key].dtype == dtype for key in state)
    assert (tmp_path / "again" / CONFIG).read_text() == (folder / CONFIG).read_text()
    assert (tmp_path / "again" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("name", MADE)
def test_a_converted_parent_is_read_as_the_checkpoint_is(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "in", MADE[name], tensors(MADE[name], torch.bfloat16), shards=3)
    assert main([f"folder={folder}", f"out={tmp_path / 'parent'}", "to=parent"]) == 0
    model = model_of_file(tmp_path / "parent")
    assert model == model_of_file(folder)
    one, other = read_parent(folder, model, seed=3), read_parent(tmp_path / "parent", model, seed=3)
    assert set(one) == set(other)
    assert all(torch.equal(one[key], other[key]) and other[key].dtype == torch.float32 for key in one)
    record = json.loads((tmp_path / "parent" / "conversion.json").read_text())
    count = sum(tensor.numel() for tensor in tensors(MADE[name]).values())
    assert record["parameters"] == {"before": count, "after": count}
    file = tmp_path / "parent" / "parent.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(RunError, match=r"parent\.safetensors: .* it is cut off"):
        read_parent(tmp_path / "parent", model, seed=3)


# --------------------------------------------------------------------------- what it costs

PEAK = """
import resource, sys
from symbiotic.convert.disk import to_checkpoint, to_parent
import symbiotic.studies.convert_hf as command
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
base, before = sys.argv[1], peak()
for source, to in (("in", "parent"), ("parent", "hf")):
    assert command.main([f"folder={base}/{source}", f"out={base}/{to}", f"to={to}"]) == 0
    print(before, peak())
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A model of 8 layers, 200 MB, in the memory of one layer's experts and a half, beside what stands there before."""
    big = OLMOE | {"hidden_size": 512, "intermediate_size": 512, "num_experts": 8, "num_hidden_layers": 8}
    state = tensors(big)
    write(tmp_path / "in", big, state, shards=4)
    size, layer = sum(tensor.nbytes for tensor in state.values()), 8 * 512 * 1024 * 4
    del state
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert size > 10 * layer
    for line in re.findall(r"^\d+ \d+$", out, re.MULTILINE):
        before, peak = map(int, line.split())
        assert peak - before < 3 * layer
    assert len(re.findall(r"^\d+ \d+$", out, re.MULTILINE)) == 2


def test_other_tensors_than_announced_are_refused(tmp_path: Path) -> None:
    about = {"a": ("F32", (2, 2))}
    with pytest.raises(RunError, match=r"one: a F32 \[3\] in the place of a F32 \[2, 2\]"):
        write_file(tmp_path / "one", about, [("a", torch.zeros(3))], None)
    assert list(tmp_path.iterdir()) == []
    both = [("a", torch.ones(2, 2)), ("b", torch.tensor(1.5).bfloat16())]
    write_file(tmp_path / "two", about | {"b": ("BF16", ())}, both, None)
    assert {name: one.shape for name, one in header(tmp_path / "two").items()} == {"a": (2, 2), "b": ()}
    assert float(load_file(tmp_path / "two")["b"]) == 1.5


# --------------------------------------------------------------------------- dense -> experts


def dense_tensors(config: dict) -> dict[str, torch.Tensor]:
    """Those of Qwen2-MoE with one FFN in every layer."""
    layers = list(range(config["num_hidden_layers"]))
    made = tensors(QWEN2 | {"intermediate_size": config["intermediate_size"], "mlp_only_layers": layers})
    return {name: 0.3 * value for name, value in made.items() if config["model_type"] == "qwen2" or "bias" not in name}


def dense_ffn(state: dict[str, torch.Tensor], layer: int, x_ND: torch.Tensor) -> torch.Tensor:
    gate, up, down = (state[f"model.layers.{layer}.mlp.{side}_proj.weight"] for side in ("gate", "up", "down"))
    return (torch.nn.functional.silu(x_ND @ gate.T) * (x_ND @ up.T)) @ down.T


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_upcycled_layers_compute_what_the_ffn_did(model_type: str, tmp_path: Path) -> None:
    names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    config = {k: v for k, v in LLAMA.items() if model_type == "llama" or k not in ("mlp_bias", "pretraining_tp")}
    config |= {"architectures": [names[model_type]], "model_type": model_type}
    state = dense_tensors(config)
    folder = write(tmp_path / "dense", config, state, shards=2)
    arguments = [f"folder={folder}", f"out={tmp_path / 'moe'}", "to=experts", "experts=4", "top_k=3"]
    assert main(arguments) == 0
    model = model_of_file(tmp_path / "moe")
    assert (model.num_experts, model.router.top_k, model.expert_hidden, model.shared_hidden) == (4, 3, 40, 40)
    assert model.attention.qkv_bias == (model_type == "qwen2")
    upcycled = UnifiedModel(model, parent_layout(model), latents=False)
    upcycled.load_state_dict(read_parent(tmp_path / "moe", model, seed=0))
    batch = text_batch(random_tokens())
    for layer, (block, x_ND) in enumerate(zip(upcycled.blocks, router_inputs(upcycled, batch), strict=True)):
        with torch.no_grad():
            out, stats = block.moe(x_ND, Places(batch, None))
        assert (stats.counts_ME.sum(0) > 0).all()
        torch.testing.assert_close(out, dense_ffn(state, layer, x_ND), rtol=1e-5, atol=1e-5)
    assert logits(upcycled, random_tokens()).isfinite().all()


REFUSED = {
    "experts=2 top_k=3": r"top_k=3: must lie between 1 and experts=2",
    "family=dots1": r"family=dots1: LlamaForCausalLM can become qwen2_moe",
    "shard=0": r"shard=0: must be at least 1",
    "out={tmp}/dense": r"dense: is there already; must be a new folder",
    "folder={tmp}/none": r"none: no such folder",
    "to=hf seed=1": r"seed=1: has no effect with to=hf",
    "to=moe": r"to='moe': must be one of parent, hf, experts",
    "to=parent": r"architectures=LlamaForCausalLM: no such family here",
}


@pytest.mark.parametrize("changes", REFUSED)
def test_a_wrong_request_is_one_line(changes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "dense", LLAMA, dense_tensors(LLAMA))
    given = {"folder": str(tmp_path / "dense"), "out": str(tmp_path / "out"), "to": "experts"}
    given |= dict(change.format(tmp=tmp_path).split("=", 1) for change in changes.split())
    assert main([f"{key}={value}" for key, value in given.items()]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert re.search(REFUSED[changes], line), line
    assert not (tmp_path / "out").exists()


DENSE_REFUSED = {
    "mlp_bias": (True, r"mlp_bias=true: this backbone cannot do that"),
    "rope_scaling": ({"type": "yarn"}, r"rope_scaling="),
    "logit_scale": (2.0, r"logit_scale=2\.0: no key of llama that is known here"),
    "architectures": (["GPT2LMHeadModel"], r"architectures=GPT2LMHeadModel: no dense family known here"),
}


@pytest.mark.parametrize("key", DENSE_REFUSED)
def test_dense_models_that_cannot_be_are_refused(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value, line = DENSE_REFUSED[key]
    folder = write(tmp_path / "dense", LLAMA | {key: value}, None)
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    assert main([f"folder={folder}", f"out={tmp_path / 'out'}", "to=experts"]) == 2
    assert re.search(line, capsys.readouterr().err)

"""Pretrained checkpoints by their files alone: what is read where, what is refused, what it costs, what comes back.

That the models are those of transformers is shown in tests/peer.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import CONFIGS, OLMOE, QWEN2, tensors, write
from factory import load_system
from symbiotic.convert.families import CONFIG, FAMILIES, config_of, flat, model_of_file, pretrained
from symbiotic.convert.huggingface import empty_parent, parent_layout, places, read_parent, write_checkpoint
from symbiotic.convert.join import joined
from symbiotic.convert.split import assign, split_state
from symbiotic.models.unified import UnifiedModel
from symbiotic.schema import ConfigError, RunError

ROOT = Path(__file__).resolve().parents[2]
MADE = {"olmoe": OLMOE, "qwen2": QWEN2}


def read_back(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_round_trip_keeps_every_bit(name: str, shards: int, tmp_path: Path) -> None:
    state = tensors(MADE[name])
    folder = write(tmp_path / "in", MADE[name], state, shards)
    model, source = model_of_file(folder), pretrained(folder)
    write_checkpoint(tmp_path / "out", read_parent(folder, model, 0), model, source.family, source.given, limit=20_000)
    again = read_back(tmp_path / "out")
    assert set(again) == set(state)
    assert all(torch.equal(again[key], state[key]) for key in state)
    assert pretrained(tmp_path / "out").fields == source.fields
    assert json.loads((tmp_path / "out" / CONFIG).read_text()) == MADE[name]


@pytest.mark.parametrize("name", MADE)
def test_a_round_trip_through_a_split_keeps_every_bit(name: str, tmp_path: Path) -> None:
    """Split at random into pools, put together by the assignment: the parent again."""
    folder = write(tmp_path, MADE[name], tensors(MADE[name]))
    model = model_of_file(folder)
    parent = read_parent(folder, model, 0)
    child = UnifiedModel(model, load_system("symbiotic" if name == "qwen2" else "symbiotic_bridge", model))
    assignment = assign(torch.rand(2, 4, 8)[len(model.dense_layers) :], model, child.system, "random", seed=3)
    state = split_state(parent, child, assignment, seed=0)
    wanted = {place.ours: parent[place.ours].shape for place in places(pretrained(folder).family, model)}
    again = joined(state, wanted, child.system, assignment)
    assert all(torch.equal(again[key], parent[key]) for key in wanted)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_filled_once(name: str, tmp_path: Path) -> None:
    """The views of a parameter cover it: writing each adds up to all of it, and nothing fresh is among them."""
    folder = write(tmp_path, CONFIGS[name], None)
    model = model_of_file(folder)
    sizes = {key: empty.numel() for key, empty in empty_parent(model).state_dict().items()}
    for stacked in ((), range(model.num_layers)):
        filled = {key: torch.zeros(empty.shape) for key, empty in empty_parent(model).state_dict().items()}
        names = []
        for place in places(pretrained(folder).family, model, stacked):
            view = place.view(filled[place.ours])
            assert view.numel() == torch.Size(place.shape).numel()
            view += 1
            names.append(place.theirs)
        assert len(names) == len(set(names))
        unfilled = {key for key, value in filled.items() if not torch.all(value == 1)}
        assert unfilled == {key for key in sizes if key.startswith("vit_")}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_written_as_it_is_read(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, CONFIGS[name], None)
    model, family = model_of_file(folder), pretrained(folder).family
    assert pretrained(write(tmp_path / "again", config_of(family, model), None)).fields == pretrained(folder).fields


def test_a_family_that_cannot_be_the_model_is_refused(tmp_path: Path) -> None:
    model = model_of_file(write(tmp_path, QWEN2, None))
    with pytest.raises(ConfigError, match=r"model\.\w+.*Qwen3MoeForCausalLM has .* cannot be this model"):
        config_of(FAMILIES["Qwen3MoeForCausalLM"], model)


def test_read_patches_start_fresh_and_the_numbers_are_the_files(tmp_path: Path) -> None:
    folder = write(tmp_path, QWEN2, tensors(QWEN2))
    model = model_of_file(folder)
    assert (model.attention.qkv_bias, model.gated_shared, model.dense_layers, model.dense_hidden) == (
        True,
        True,
        (0,),
        40,
    )
    one, other = read_parent(folder, model, 0), read_parent(folder, model, 1)
    assert {key for key in one if not torch.equal(one[key], other[key])} == {
        *("vit_in.weight", "vit_grid.row.weight", "vit_grid.column.weight")
    }
    UnifiedModel(model, parent_layout(model), latents=False).load_state_dict(one)
    assert flat(model)["attention.head_dim"] == 8


def test_half_precision_is_widened(tmp_path: Path) -> None:
    state = tensors(OLMOE, torch.bfloat16)
    folder = write(tmp_path, OLMOE, state)
    read = read_parent(folder, model_of_file(folder), 0)
    assert read["embed.weight"].dtype == torch.float32
    assert torch.equal(read["embed.weight"], state["model.embed_tokens.weight"].float())


# --------------------------------------------------------------------------- what is refused

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown family": ({"architectures": ["MixtralForCausalLM"]}, r"MixtralForCausalLM: no such family here"),
    "MLA": (
        {"architectures": ["DeepseekV3ForCausalLM"], "kv_lora_rank": 512},
        r"kv_lora_rank=512 is multi-head latent",
    ),
    "clipping": ({"clip_qkv": 8.0}, r"clip_qkv=8\.0: this backbone cannot do that; must be null"),
    "a bias of all projections": ({"attention_bias": True}, r"attention_bias=true: this backbone cannot do that"),
    "rope scaling": ({"rope_scaling": {"type": "yarn", "factor": 4}}, r"rope_scaling=.*yarn.*cannot do that"),
    "rope scaling, new": (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4}},
        r"rope_type=\"yarn\": this backbone cannot",
    ),
    "a window": ({"use_sliding_window": True}, r"use_sliding_window=true: this backbone cannot"),
    "windows by layer": ({"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types: sliding_attention"),
    "another activation": ({"hidden_act": "gelu"}, r"hidden_act=\"gelu\""),
    "quantised": ({"quantization_config": {"bits": 4}}, r"quantization_config="),
    "an unknown key": ({"logit_scale": 0.5}, r"logit_scale=0\.5: no key of OlmoeForCausalLM that is known here"),
    "a missing number": ({"num_experts": None}, r"num_experts: missing"),
    "heads that the norm does not fit": ({"head_dim": 16}, r"head_dim=16: must be .* = 8"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_backbone_cannot_do_is_one_line(what: str, tmp_path: Path) -> None:
    changes, line = REFUSED[what]
    with pytest.raises(ConfigError, match=line) as error:
        pretrained(write(tmp_path, OLMOE | changes, None))
    assert "\n" not in str(error.value)
    assert str(tmp_path / CONFIG) in str(error.value)


def drop_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def cut_shard(folder: Path) -> None:
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


State = dict[str, torch.Tensor]
BROKEN: dict[str, tuple[Callable[[State], Any], Callable[[Path], Any], str]] = {
    "missing": (lambda s: s.pop("model.norm.weight"), lambda f: None, r"no tensor 'model\.norm\.weight'; Olmoe"),
    "extra": (lambda s: s.update(more=torch.zeros(1)), lambda f: None, r"more: no tensor of OlmoeForCausalLM"),
    "shape": (
        lambda s: s.update({"lm_head.weight": torch.zeros(95, 32)}),
        lambda f: None,
        r"lm_head\.weight is \[95, 32\], config\.json says \[96, 32\]",
    ),
    "type": (
        lambda s: s.update({"lm_head.weight": torch.zeros(96, 32, dtype=torch.int8)}),
        lambda f: None,
        r"lm_head\.weight is I8: must be one of F32",
    ),
    "no shard": (lambda s: None, drop_shard, r"no model-00002-of-00003\.safetensors, which model\.safetensors\.index"),
    "cut off": (lambda s: None, cut_shard, r"model-00002-of-00003\.safetensors: .* it is cut off"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files_are_one_line(what: str, tmp_path: Path) -> None:
    change, damage, line = BROKEN[what]
    state = tensors(OLMOE)
    change(state)
    folder = write(tmp_path, OLMOE, state, shards=3)
    damage(folder)
    with pytest.raises(RunError, match=line) as error:
        read_parent(folder, model_of_file(folder), 0)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------- what it costs

MEASURE = """
import resource, sys
from symbiotic.convert.families import model_of_file
from symbiotic.convert.huggingface import empty_parent, read_parent
empty_parent(model := model_of_file(sys.argv[1]))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
state = read_parent(sys.argv[1], model, 0)
print(sum(t.nbytes for t in state.values()), before, peak())
"""


def test_peak_memory_is_that_of_the_model_and_one_tensor(tmp_path: Path) -> None:
    """No second copy: below 1.3 times the (one) shard, beside what the imported interpreter and torch take before."""
    big = OLMOE | {"hidden_size": 512, "intermediate_size": 512, "num_experts": 32, "vocab_size": 4096}
    folder = write(tmp_path, big, tensors(big))
    size = (folder / "model.safetensors").stat().st_size
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", MEASURE, str(folder)]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    held, before, peak = (int(number) for number in re.findall(r"\d+", out))
    assert held > 2e8
    assert peak - before < 1.3 * size

"""Against transformers: tiny random models of every family are the same model here, and there again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from factory import load_system
from split_runs import logits, random_tokens, text_batch
from symbiotic.convert.families import CONFIG, FAMILIES, Family, model_of_file, pretrained
from symbiotic.convert.huggingface import parent_layout, read_parent, write_checkpoint
from symbiotic.convert.profile import expert_counts
from symbiotic.convert.receipt import receipt
from symbiotic.convert.split import assign, split_state
from symbiotic.models.unified import UnifiedModel

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]
transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"vocab_size": 96, "max_position_embeddings": 64, "initializer_range": 0.2, "eos_token_id": None}
QWEN = {"intermediate_size": 40, "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("OlmoeForCausalLM", {"intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2}),
    "qwen1.5-moe": ("Qwen2MoeForCausalLM", QWEN | {"shared_expert_intermediate_size": 24}),
    "qwen2-moe-dense-layer": (
        "Qwen2MoeForCausalLM",
        QWEN | {"shared_expert_intermediate_size": 24, "mlp_only_layers": [1], "norm_topk_prob": True},
    ),
    "qwen3-moe": ("Qwen3MoeForCausalLM", QWEN | {"head_dim": 16, "norm_topk_prob": True, "rope_theta": 1e6}),
    "qwen3-moe-sparse-step-tied": (
        "Qwen3MoeForCausalLM",
        QWEN | {"head_dim": 8, "decoder_sparse_step": 2, "tie_word_embeddings": True},
    ),
    "dots1": (
        "Dots1ForCausalLM",
        {k: v for k, v in QWEN.items() if k != "num_experts"}
        | {"n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1, "norm_topk_prob": True}
        | {"routed_scaling_factor": 2.5},
    ),
    "ernie4.5": (
        "Ernie4_5_MoeForCausalLM",
        {"intermediate_size": 40, "moe_intermediate_size": 16, "moe_num_experts": 8, "moe_k": 2},
    ),
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder that transformers wrote in several shards, and the model that it holds."""
    name, sizes = VARIANTS[request.param]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**SIZES | sizes)).eval()
    for parameter in (*model.parameters(), *(b for n, b in model.named_buffers() if "correction_bias" in n)):
        if parameter.dim() == 1 or parameter.shape[0] == 1:  # norms of one and biases of zero would hide an error
            parameter.data += 0.3 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder, model


def build(folder: Path) -> UnifiedModel:
    model = model_of_file(folder)
    parent = UnifiedModel(model, parent_layout(model), latents=False)
    parent.load_state_dict(read_parent(folder, model, seed=0))
    return parent


def test_logits_are_those_of_transformers(variant: tuple[Path, Any]) -> None:
    folder, theirs = variant
    tokens = random_tokens()
    with torch.no_grad():
        want = theirs(tokens).logits
    assert want.std() > 0.1
    torch.testing.assert_close(logits(build(folder), tokens), want, rtol=0, atol=1e-5)


def test_what_is_written_back_loads_in_transformers(variant: tuple[Path, Any], tmp_path: Path) -> None:
    folder, theirs = variant
    source, model = pretrained(folder), model_of_file(folder)
    state, tokens = read_parent(folder, model, seed=0), random_tokens()
    for given in (source.given, None):
        write_checkpoint(tmp_path, state, model, source.family, given, limit=60_000)
        again, told = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        for (name, one), (other, two) in zip(theirs.named_parameters(), again.named_parameters(), strict=True):
            assert name == other
            assert torch.equal(one, two), name
        with torch.no_grad():
            torch.testing.assert_close(again.eval()(tokens).logits, theirs(tokens).logits, rtol=0, atol=1e-6)


def test_generation_is_token_identical(variant: tuple[Path, Any]) -> None:
    folder, theirs = variant
    mine, start = build(folder), random_tokens(count=3, length=6)
    want = theirs.generate(start, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    tokens = start
    for _ in range(12):
        tokens = torch.cat([tokens, logits(mine, tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(tokens, want)


def test_the_split_adds_nothing_and_changes_no_logit_with_its_masks_off(variant: tuple[Path, Any]) -> None:
    folder, _ = variant
    parent = build(folder)
    model = dataclasses.replace(parent.cfg, gen_fraction=0.25)
    shared = {} if model.shared_hidden else {"shared": {}, "shield": {"mode": "none"}}
    child = UnifiedModel(model, load_system("symbiotic", model, **shared))
    batch = text_batch(random_tokens())
    assignment = assign(expert_counts(parent, [batch]), model, child.system, "profiled", seed=0)
    child.load_state_dict(split_state(parent.state_dict(), child, assignment, seed=0))
    found = receipt(parent, child, assignment, batch)
    assert found["parameters"]["added"] == 0
    assert found["masks_off"]["max_logit_change"] <= 1e-5
    for row in found["gate_identity"]:
        assert row["kept_gate_change"] < 1e-6
        if model.router.bias and model.router.score == "softmax":
            assert row["choice_kept"] > 0.5  # a bias does not grow with the probabilities that masked columns leave
            continue
        assert (row["choice_kept"], row["max_gate_change"]) == (1.0, row["kept_gate_change"])
        if model.router.normalize:
            assert row["factor"] == pytest.approx([1.0, 1.0], abs=1e-5)


def test_stacked_experts_are_read_too(variant: tuple[Path, Any], tmp_path: Path) -> None:
    """What transformers holds in memory, in the place of a tensor for each expert."""
    from safetensors.torch import save_file

    folder, theirs = variant
    model = model_of_file(folder)
    state = {name: value.contiguous() for name, value in theirs.state_dict().items()}
    if model.tied_head:
        del state["lm_head.weight"]
    assert any("experts.gate_up_proj" in name for name in state)
    renamed = {name.replace("mlp.gate.moe_statics", "mlp.moe_statics"): value for name, value in state.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    (tmp_path / CONFIG).write_text((folder / CONFIG).read_text())
    one, other = read_parent(tmp_path, model, seed=0), read_parent(folder, model, seed=0)
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.model_type)
def test_defaults_are_those_of_the_configuration_class(family: Family) -> None:
    cls = getattr(transformers, family.architecture).config_class
    assert cls.model_type == family.model_type
    known = cls()
    for key, value in family.defaults.items():
        assert getattr(known, key) == value, key

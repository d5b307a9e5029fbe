"""A checkpoint that transformers wrote, through the whole arc and back into transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from split_runs import logits, masks_off, random_tokens
from symbiotic.arc import run as train
from symbiotic.config import compose
from symbiotic.convert.families import CONFIG
from symbiotic.models.unified import model_of
from symbiotic.runs import load_state
from symbiotic.studies.export_hf import main as export
from symbiotic.trained import read_config

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run: parent, profile, split, joint training, evaluation."""
    base = tmp_path_factory.mktemp("arc")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 512}
    sizes |= {"initializer_range": 0.2, "pad_token_id": None}  # a padding row is zeros: its gates are ties
    torch.manual_seed(0)
    model = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**sizes, eos_token_id=None))
    model.save_pretrained(base / "checkpoint", max_shard_size="60KB")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("runs", "data", "cache"):
            patch.setenv(f"SYMBIOTIC_{name.upper()}", str(base / name))
        arguments = ["experiment=smoke", f"init_from={base / 'checkpoint'}", "system=symbiotic_bridge"]
        train(compose([*arguments, "evaluation.images=4", "phases.steps=8", "phases.shield_steps=4"]))
    return next((base / "runs" / "smoke").iterdir())


def test_the_report_of_the_split(run: Path) -> None:
    receipt = json.loads((run / "receipt.json").read_text())
    assert receipt["parameters"]["added"] == 0
    assert receipt["masks_off"]["max_logit_change"] <= 1e-5
    for row in receipt["gate_identity"]:
        assert row["kept_gate_change"] < 1e-6, row
        assert row["choice_kept"] > 0.999, row
    assert "With the masks off" in (run / "receipt.txt").read_text()
    assert receipt["pretrained"]["architecture"] == "OlmoeForCausalLM"
    assert {"stage_0", "iteration_0"} <= set(receipt)
    assert "knowledge_replayed" in (run / "summary.txt").read_text()


@pytest.mark.parametrize("shard", [1, 5120])
def test_the_trained_model_is_that_of_transformers_with_its_masks_off(run: Path, shard: int, tmp_path: Path) -> None:
    config = read_config(run)
    child = model_of(config)
    child.load_state_dict(load_state(run / "model.safetensors"))
    assert export([f"run={run}", f"out={tmp_path / 'hf'}", f"shard={shard}"]) == 0
    loading: dict[str, object] = {"output_loading_info": True, "local_files_only": True}
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", **loading)
    assert type(theirs).__name__ == "OlmoeForCausalLM"
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = random_tokens(512)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(tokens).logits, logits(masks_off(child), tokens), rtol=0, atol=1e-5)
    begun = transformers.AutoModelForCausalLM.from_pretrained(run.parents[2] / "checkpoint")
    assert not torch.equal(begun.model.embed_tokens.weight, theirs.model.embed_tokens.weight)
    assert json.loads((tmp_path / "hf" / CONFIG).read_text())["architectures"] == ["OlmoeForCausalLM"]


def test_the_card_has_the_scores_of_the_run(run: Path, tmp_path: Path) -> None:
    assert export([f"run={run}", f"out={tmp_path / 'hf'}"]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    scores = json.loads((run / "summary.json").read_text())["scores"]
    assert all(f"| {name} |" in card for name in scores)
    assert "8 steps of joint training" in card

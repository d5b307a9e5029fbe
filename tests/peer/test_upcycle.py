"""Dense models of transformers as mixtures of experts: the same logits there, as a mixture, and here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from split_runs import logits, random_tokens
from symbiotic.convert.families import model_of_file
from symbiotic.convert.huggingface import parent_layout, read_parent
from symbiotic.convert.upcycle import DENSE, INTO
from symbiotic.models.unified import UnifiedModel
from symbiotic.studies.convert_hf import main

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]
transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"vocab_size": 96, "max_position_embeddings": 64, "initializer_range": 0.2, "intermediate_size": 40}
PAIRS = [(name, family) for name, dense in DENSE.items() for family in dense.into]
TIED = {"Qwen2ForCausalLM"}  # as their small models are


@pytest.mark.parametrize(("name", "family"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_the_mixture_computes_what_the_dense_model_did(name: str, family: str, tmp_path: Path) -> None:
    cls = getattr(transformers, name)
    more = {"head_dim": 16} if name == "Qwen3ForCausalLM" else {}
    more |= {"sliding_window": None} if name == "MistralForCausalLM" else {}
    torch.manual_seed(0)
    dense = cls(cls.config_class(**SIZES, **more, tie_word_embeddings=name in TIED)).eval()
    for parameter in dense.parameters():
        if parameter.dim() == 1:  # norms of one and biases of zero would hide an error
            parameter.data += 0.3 * torch.randn_like(parameter)
    dense.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    asked = [f"folder={tmp_path / 'dense'}", f"out={tmp_path / 'moe'}", "to=experts", f"family={family}"]
    assert main([*asked, "experts=4", "top_k=2"]) == 0
    tokens = random_tokens()
    loading: dict[str, Any] = {"output_loading_info": True, "local_files_only": True}
    mixture, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe", **loading)
    assert type(mixture).__name__ == INTO[family]
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model = model_of_file(tmp_path / "moe")
    mine = UnifiedModel(model, parent_layout(model), latents=False)
    mine.load_state_dict(read_parent(tmp_path / "moe", model, seed=0))
    with torch.no_grad():
        want = dense(tokens).logits
        assert want.std() > 0.1
        torch.testing.assert_close(mixture.eval()(tokens).logits, want, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(mine, tokens), want, rtol=0, atol=1e-5)
    assert (model.shared_hidden > 0) == (family != "qwen3_moe")

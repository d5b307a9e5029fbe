"""A run whose images are latents of an AutoencoderKL and vectors of a CLIP, on a pretrained model with its own tokens:
shards encoded by the command, the whole arc, and its export back into transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers, trainers

from symbiotic.arc import run as train
from symbiotic.config import compose, instantiate
from symbiotic.convert.tokens import adapted
from symbiotic.data.formats import reading_parts
from symbiotic.data.packing import build_sample
from symbiotic.data.tokenizer import SPECIALS
from symbiotic.evaluation.prompts import answers
from symbiotic.models.towers import CONFIG
from symbiotic.runs import load_state
from symbiotic.schema import RunError
from symbiotic.studies.encode_shards import main as encode
from symbiotic.studies.export_hf import main as export
from symbiotic.trained import open_run

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]
transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

TOWER = {"image_size": 16, "layers": 1, "width": 24, "head_width": 12, "patch_size": 8}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}


def write_parent(folder: Path, texts: list[str]) -> None:
    """A tiny OLMoE with a byte-level BPE of its own."""
    inner = Inner(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|padding|>"]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    inner.train_from_iterator(texts, trainer)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 640}
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(**sizes, initializer_range=0.2, eos_token_id=0, pad_token_id=None)
    transformers.OlmoeForCausalLM(config).save_pretrained(folder)
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|padding|>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)


def write_encoders(base: Path) -> None:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
    diffusers.AutoencoderKL(**blocks, **sizes).save_pretrained(base / "vae")
    (base / "clip").mkdir()
    content = {"model_cfg": {"embed_dim": 24, "vision_cfg": TOWER, "text_cfg": TEXT}, "preprocess_cfg": {}}
    (base / "clip" / CONFIG).write_text(json.dumps(content))
    model = open_clip.create_model(f"local-dir:{base / 'clip'}", load_weights=False)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, base / "clip" / "open_clip_model.safetensors")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("real")
    source = compose(["experiment=smoke", f"paths.data={base / 'data'}"]).data.source
    shutil.copytree(Path(instantiate(source, "data.source").prepare()) / "shards", base / "mine")
    write_parent(base / "olmoe", ["what is the colour of digit 4 7", "the answer is A B C D"] * 20)
    write_encoders(base)
    for encoder, weights in (("kl", "vae"), ("vision", "clip")):
        given = [f"shards={base / 'mine'}", f"tokenizer={base / 'olmoe'}", f"encoder={encoder}"]
        assert encode([*given, f"path={base / weights}", f"out={base / encoder}", "dtype=float32"]) == 0
    paths = [f"paths.{name}={base / name}" for name in ("runs", "data", "cache")]
    data = ["data=shards", f"data.source.shards=[{base / 'mine'}]", f"data.source.tokenizer={base / 'olmoe'}"]
    data += [
        "data.samples=8",
        "data.row_tokens=256",
        "data.micro_batches=1",
        f"data.encoded=[{base / 'kl'},{base / 'vision'}]",
    ]
    target = f"{{_target_: symbiotic.images.kl.KLAutoencoder, path: {base / 'vae'}}}"
    vision = f"{{_target_: symbiotic.images.vision.VisionEncoder, path: {base / 'clip'}}}"
    data += [f"data.autoencoder={target}", f"data.vision={vision}", "model.patch_dim=16", "model.vit_dim=24"]
    few = ["phases.steps=4", "phases.shield_steps=2", "save_every=2", "log_every=2", "logger.tensorboard=null"]
    start = [f"init_from={base / 'olmoe'}", "system=symbiotic_bridge", "init.profile_micro_batches=2"]
    config = compose(["experiment=smoke", *start, *data, *paths, *few])
    train(config)
    return Path(config.run_dir)


def test_a_run_of_latents_and_vectors_trains_and_draws(run: Path) -> None:
    state = load_state(run / "model.safetensors")
    assert state["latent_in.weight"].shape == (32, 16)
    assert state["vit_in.weight"].shape == (32, 24)
    assert list((run / "samples").glob("*.png"))
    assert all(value.isfinite().all() for value in state.values())
    opened = open_run(run)
    assert opened.tokenizer.autoencoder.patch == 4
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    sample = build_sample("q", "mmu", reading_parts(image, "what is the colour", opened.tokenizer))
    assert len(answers(opened.model, [sample], opened.tokenizer, 3, 8)) == 1
    opened.tokenizer.vision = None
    with pytest.raises(RunError, match=r"patches of 48 numbers, the model takes 24; .* data\.vision says which"):
        answers(opened.model, [sample], opened.tokenizer, 3, 8)


def test_the_tokens_are_the_pretrained_models(run: Path, tmp_path: Path) -> None:
    base = run.parents[2]
    found = adapted(base / "olmoe", SPECIALS)
    assert (run / "tokenizer.json").read_text() == found.text
    assert [tuple(pair) for pair in json.loads((run / "pretrained.json").read_text())["token_rows"]] == list(
        found.swaps
    )
    assert (run / "pretrained_tokenizer" / "tokenizer.json").is_file()
    begun = transformers.AutoModelForCausalLM.from_pretrained(base / "olmoe").model.embed_tokens.weight
    start = load_state(run / "init.safetensors")["embed.weight"]
    assert export([f"run={run}", f"out={tmp_path / 'hf'}", "step=0"]) == 0
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(again.model.embed_tokens.weight, begun)
    assert not torch.equal(start, begun)
    text = "the colour of digit 4 is A"
    one, other = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (base / "olmoe", tmp_path / "hf"))
    assert one(text)["input_ids"] == other(text)["input_ids"] != []
    ids = open_run(run).tokenizer.encode(text)
    with torch.no_grad():
        assert torch.equal(start[ids], begun[one(text)["input_ids"]])
    assert "The tokenizer is that of the pretrained model, unchanged" in (tmp_path / "hf" / "README.md").read_text()

"""Published VQ tokenizers, from tiny files with random weights; what needs their libraries is marked `peer`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from symbiotic.config import instantiate
from symbiotic.images.checkpoint import LAYOUTS, VQCheckpoint
from symbiotic.images.layouts import arguments, own_names, to_diffusers
from symbiotic.images.store import load_image_tokenizer
from symbiotic.images.tokenizer import to_input
from symbiotic.schema import ConfigError, RunError

GEOMETRY = {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1, "latent_channels": 16}
JANUS = {**GEOMETRY, "num_embeddings": 24, "embed_dim": 8, "num_patches": 8}
CHAMELEON = {**GEOMETRY, "num_embeddings": 24, "embed_dim": 16, "resolution": 16}
HERE = Path()


def block(name: str, into: int, out: int) -> dict[str, Tensor]:
    """A residual block under the names that all families share."""
    sizes = {"norm1": (into,), "conv1": (out, into, 3, 3), "norm2": (out,), "conv2": (out, out, 3, 3)}
    if into != out:
        sizes["nin_shortcut"] = (out, into, 1, 1)
    return {f"{name}.{part}.weight": torch.randn(size) for part, size in sizes.items()}


def llamagen_state() -> dict[str, Tensor]:
    """Two levels of 32 and 64 channels, enough of LlamaGen's names for everything that shapes tell."""
    attention = {"norm": (64,), "q": (64, 64, 1, 1), "proj_out": (64, 64, 1, 1)}
    state = {
        "quantize.embedding.weight": torch.randn(24, 8),
        "quantize.codebook_used": torch.zeros(65536),
        "quant_conv.weight": torch.randn(8, 16, 1, 1),
        "encoder.conv_in.weight": torch.randn(32, 3, 3, 3),
        "encoder.norm_out.weight": torch.randn(64),
        "encoder.conv_blocks.0.downsample.conv.weight": torch.randn(32, 32, 3, 3),
        "decoder.conv_in.weight": torch.randn(64, 16, 3, 3),
        "decoder.conv_blocks.0.upsample.conv.weight": torch.randn(64, 64, 3, 3),
        **block("encoder.conv_blocks.0.res.0", 32, 32),
        **block("encoder.conv_blocks.1.res.0", 32, 64),
        **block("decoder.conv_blocks.0.res.0", 64, 64),
        **block("decoder.conv_blocks.1.res.0", 64, 32),
        **block("encoder.mid.2", 64, 64),
    }
    for place in ("encoder.conv_blocks.1.attn.0", "encoder.mid.1", "decoder.conv_blocks.0.attn.0"):
        state |= {f"{place}.{part}.weight": torch.randn(size) for part, size in attention.items()}
    return state


# --------------------------------------------------------------------------- names and shapes: no library


def test_llamagens_names_become_those_of_diffusers() -> None:
    state = llamagen_state()
    renamed = to_diffusers({short: state[name] for name, short in own_names(state).items()})
    assert "quantize.codebook_used" not in renamed
    assert renamed["encoder.down_blocks.1.attentions.0.to_q.weight"].shape == (64, 64)
    for new, old in {
        "encoder.down_blocks.1.resnets.0.conv_shortcut.weight": "encoder.conv_blocks.1.res.0.nin_shortcut.weight",
        "encoder.down_blocks.0.downsamplers.0.conv.weight": "encoder.conv_blocks.0.downsample.conv.weight",
        "encoder.mid_block.resnets.1.conv1.weight": "encoder.mid.2.conv1.weight",
        "encoder.mid_block.attentions.0.group_norm.weight": "encoder.mid.1.norm.weight",
        "encoder.conv_norm_out.weight": "encoder.norm_out.weight",
        "decoder.up_blocks.0.upsamplers.0.conv.weight": "decoder.conv_blocks.0.upsample.conv.weight",
    }.items():
        assert torch.equal(renamed[new], state[old]), new


def test_shapes_tell_the_arguments() -> None:
    assert arguments(to_diffusers(llamagen_state())) == {
        "block_out_channels": [32, 64],
        "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        "layers_per_block": 1,
        "latent_channels": 16,
        "num_vq_embeddings": 24,
        "vq_embed_dim": 8,
        "mid_block_add_attention": True,
    }


def test_tamings_levels_are_turned_round() -> None:
    """There decoder.up.0 is the finest, the one without upsampling."""
    state = {**block("decoder.up.0.block.0", 64, 32), **block("decoder.up.1.block.0", 64, 64)}
    state["decoder.up.1.upsample.conv.weight"] = torch.randn(64, 64, 3, 3)
    renamed = to_diffusers(state)
    old, new = "decoder.up.1.block.0.conv1.weight", "decoder.up_blocks.0.resnets.0.conv1.weight"
    assert torch.equal(renamed[new], state[old])
    assert "decoder.up_blocks.0.upsamplers.0.conv.weight" in renamed
    assert len(renamed) == len(state)


def test_a_tokenizer_inside_a_larger_model_is_found() -> None:
    names = ["model.vqmodel.quantize.embedding.weight", "model.vqmodel.encoder.conv_in.bias", "lm_head.weight"]
    assert list(own_names(names).values()) == ["quantize.embedding.weight", "encoder.conv_in.bias"]
    assert own_names(["encoder.conv_in.bias"]) == {}


# --------------------------------------------------------------------------- bad input: no library


def test_a_config_builds_it(tmp_path: Path) -> None:
    save_file(llamagen_state(), tmp_path / "vq.safetensors")
    node = {"_target_": "symbiotic.images.checkpoint.VQCheckpoint", "path": str(tmp_path / "vq.safetensors")}
    assert instantiate(node, "objective.image_tokenizer").codebook_size == 24
    with pytest.raises(ConfigError, match=r"layout=taming: must be one of llamagen, chameleon, diffusers"):
        instantiate({**node, "layout": "taming"}, "objective.image_tokenizer")


@pytest.mark.parametrize("layout", ["llamagen", "chameleon"])
def test_a_folder_of_diffusers_is_of_no_other_layout(layout: Any, tmp_path: Path) -> None:
    """Its weights would be taken, and other codes made of them."""
    save_file(llamagen_state(), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text('{"_class_name": "VQModel"}')
    with pytest.raises(ConfigError, match=rf"layout={layout}: .* is a VQModel of diffusers; must be diffusers"):
        VQCheckpoint(str(tmp_path), layout).prepare(HERE, HERE)


def test_another_codebook_size_is_one_line_with_the_right_one(tmp_path: Path) -> None:
    path = tmp_path / "vq.safetensors"
    save_file(llamagen_state(), path)
    line = rf"objective\.image_tokenizer\.codebook_size=16384: the codebook of {path} has 24 codes; set it to 24, and"
    with pytest.raises(ConfigError, match=line):
        _ = VQCheckpoint(str(path), "llamagen", 16384).codebook_size
    with pytest.raises(ConfigError, match=line):
        VQCheckpoint(str(path), "llamagen", 16384).prepare(HERE, HERE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_missing_file_says_where_it_was_looked_for_and_how_to_get_it(layout: Any, tmp_path: Path) -> None:
    missing = tmp_path / "vq.safetensors"
    with pytest.raises(ConfigError, match=rf"path={missing} \(looked for at {missing}\): no such file") as error:
        VQCheckpoint(str(missing), layout).prepare(HERE, HERE)
    assert LAYOUTS[layout].get in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nothing")
    (tmp_path / "cut.pt").write_bytes(b"nothing")
    torch.save({"model": HERE}, tmp_path / "code.pt")  # an object of a class
    for name in ("cut.safetensors", "cut.pt", "code.pt"):
        with pytest.raises(ConfigError, match=rf"{name}: not readable weights"):
            VQCheckpoint(str(tmp_path / name)).prepare(HERE, HERE)
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"no image tokenizer in it \(quantize.embedding.weight is missing\)"):
        VQCheckpoint(str(tmp_path / "other.safetensors")).prepare(HERE, HERE)
    encoder = {name: value for name, value in llamagen_state().items() if not name.startswith("decoder")}
    save_file(encoder, tmp_path / "half.safetensors")
    with pytest.raises(ConfigError, match=r"has an encoder and a decoder, this one only encoder, quant_conv, quantize"):
        VQCheckpoint(str(tmp_path / "half.safetensors"), "chameleon").prepare(HERE, HERE)
    with pytest.raises(ConfigError, match=r"layout=diffusers needs its folder"):
        VQCheckpoint(str(tmp_path / "half.safetensors"), "diffusers").prepare(HERE, HERE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no file in it ends with"):
        VQCheckpoint(str(tmp_path / "empty")).prepare(HERE, HERE)


def test_the_fingerprint_is_of_weights_and_layout(tmp_path: Path) -> None:
    state = llamagen_state()
    for name in ("a", "b"):
        save_file(state, tmp_path / f"{name}.safetensors")
    torch.save({"model": state, "steps": 7}, tmp_path / "c.pt")
    made = {VQCheckpoint(str(tmp_path / name)).fingerprint for name in ("a.safetensors", "b.safetensors", "c.pt")}
    assert len(made) == 1
    assert VQCheckpoint(str(tmp_path / "a.safetensors"), "chameleon").fingerprint not in made
    save_file({**state, "quant_conv.weight": state["quant_conv.weight"] + 1}, tmp_path / "d.safetensors")
    assert VQCheckpoint(str(tmp_path / "d.safetensors")).fingerprint not in made


# --------------------------------------------------------------------------- against the libraries


def pictures(n: int = 3) -> Tensor:
    return torch.randint(256, (n, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def spread(model: Any) -> Any:
    """Random weights whose codes are encodings of the pictures, so that many of them are used."""
    torch.manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.copy_(torch.randn_like(value) / value[0].numel() ** 0.5)
        z = model.quant_conv(model.encoder(to_input(pictures())))
        z_ND = z.permute(0, 2, 3, 1).flatten(0, 2)
        codes = model.quantize.embedding.weight
        codes.copy_(z_ND[:: len(z_ND) // len(codes)][: len(codes)])
    return model.eval()


def to_llamagen(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Janus's names as those of LlamaGen's own file."""
    numbers = {"block_1": "0", "attn_1": "1", "block_2": "2"}
    made = {"quantize.codebook_used": torch.zeros(65536)}
    for name, value in state.items():
        name = re.sub(r"(encoder\.down|decoder\.up)\.", lambda m: m[0][:8] + "conv_blocks.", name)
        name = re.sub(r"\.mid\.(\w+)\.", lambda m: f".mid.{numbers[m[1]]}.", name).replace(".block.", ".res.")
        made[name] = value
    return made


@pytest.fixture(scope="module")
def janus() -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("diffusers")
    from transformers.models.janus.modeling_janus import JanusVQVAE

    return spread(JanusVQVAE(transformers.JanusVQVAEConfig(**JANUS)))


@pytest.mark.peer
@pytest.mark.filterwarnings("default")
def test_llamagens_file_gives_the_codes_and_pixels_of_janus(janus: Any, tmp_path: Path) -> None:
    """Codes: what Janus's quantiser says to encodings and codes of length 1, as LlamaGen's own code does."""
    torch.save({"model": to_llamagen(janus.state_dict())}, tmp_path / "vq_ds16_c2i.pt")
    save_file({f"model.vqmodel.{k}": v for k, v in janus.state_dict().items()}, tmp_path / "janus.safetensors")
    pixels = pictures()
    with torch.no_grad():
        janus.quantize.embedding.weight.copy_(F.normalize(janus.quantize.embedding.weight, dim=-1))
        z = janus.quant_conv(janus.encoder(to_input(pixels)))
        _, _, codes = janus.quantize(F.normalize(z, dim=1))
        drawn = janus.decode(codes.view(3, 64))
    assert len(codes.unique()) > 8
    for name in ("vq_ds16_c2i.pt", "janus.safetensors"):
        tokenizer = VQCheckpoint(str(tmp_path / name), "llamagen", 24).prepare(HERE, HERE)
        assert (tokenizer.codebook_size, tokenizer.patch) == (24, 2)
        assert torch.equal(tokenizer.encode(pixels), codes.view(3, 64))
        assert torch.allclose(tokenizer.pictures(codes.view(3, 8, 8)), drawn, atol=1e-5)
        right = ((drawn + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1)
        assert (tokenizer.decode(codes.view(3, 64), 16, 16) - right).abs().max() <= 1


@pytest.mark.peer
@pytest.mark.filterwarnings("default")
def test_chameleons_file_gives_its_codes(tmp_path: Path) -> None:
    """transformers has Chameleon's encoder; the decoder, which only the original file has, is Janus's without the
    attention that Chameleon does not have, its levels turned round."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("diffusers")
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE
    from transformers.models.janus.modeling_janus import JanusVQVAEDecoder

    chameleon = spread(ChameleonVQVAE(transformers.ChameleonVQVAEConfig(**CHAMELEON)))
    decoder = JanusVQVAEDecoder(transformers.JanusVQVAEConfig(**{**JANUS, "embed_dim": 16})).eval()
    decoder.up[0].attn = torch.nn.ModuleList()
    turned = {re.sub(r"^up\.(\d)", lambda m: f"up.{1 - int(m[1])}", k): v for k, v in decoder.state_dict().items()}
    state = {**chameleon.state_dict(), **{f"decoder.{name}": value for name, value in turned.items()}}
    torch.save({"state_dict": {**state, "loss.logits": torch.zeros(3)}}, tmp_path / "vqgan.ckpt")
    pixels = pictures()
    with torch.no_grad():
        codes = chameleon.encode(to_input(pixels)).image_tokens.view(3, 64)
        entries = chameleon.quantize.embedding(codes).view(3, 8, 8, 16).permute(0, 3, 1, 2)
        drawn = decoder(chameleon.post_quant_conv(entries))
    tokenizer = VQCheckpoint(str(tmp_path / "vqgan.ckpt"), "chameleon").prepare(HERE, HERE)
    assert len(codes.unique()) > 8
    assert torch.equal(tokenizer.encode(pixels), codes)
    assert torch.allclose(tokenizer.pictures(codes.view(3, 8, 8)), drawn, atol=1e-5)


@pytest.mark.peer
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("norm", ["group", "spatial"])
def test_a_folder_of_diffusers_gives_its_codes_and_pixels(norm: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    sizes = {"block_out_channels": (32, 64), "latent_channels": 4, "num_vq_embeddings": 20, "norm_type": norm}
    model = spread(diffusers.VQModel(**blocks, **sizes))
    model.save_pretrained(tmp_path)
    pixels = pictures()
    with torch.no_grad():
        latents = model.encode(to_input(pixels)).latents
        codes = model.quantize(latents)[2][2].view(3, 64)
        drawn = model.decode(latents).sample
    tokenizer = VQCheckpoint(str(tmp_path), "diffusers").prepare(HERE, HERE)
    assert len(codes.unique()) > 8
    assert torch.equal(tokenizer.encode(pixels), codes)
    assert torch.allclose(tokenizer.pictures(codes.view(3, 8, 8)), drawn, atol=1e-4)


@pytest.mark.peer
@pytest.mark.filterwarnings("default")
def test_a_run_keeps_a_reference(janus: Any, tmp_path: Path) -> None:
    path, kept = tmp_path / "vq.safetensors", tmp_path / "run" / "image_tokenizer.safetensors"
    save_file(to_llamagen(janus.state_dict()), path)
    tokenizer = VQCheckpoint(str(path)).prepare(HERE, HERE)
    tokenizer.save(kept)
    assert kept.stat().st_size < 1000
    again = load_image_tokenizer(kept)
    assert torch.equal(again.encode(pictures()), tokenizer.encode(pictures()))
    other = to_llamagen(janus.state_dict())
    save_file({**other, "quant_conv.bias": other["quant_conv.bias"] + 1}, path)
    with pytest.raises(RunError, match="the image tokenizer has weights"):
        load_image_tokenizer(kept)
    path.unlink()
    with pytest.raises(ConfigError, match="no such file"):
        load_image_tokenizer(kept)


@pytest.mark.peer
@pytest.mark.filterwarnings("default")
def test_a_file_of_another_layout_is_one_line(janus: Any, tmp_path: Path) -> None:
    state = to_llamagen(janus.state_dict())
    save_file({n: v for n, v in state.items() if "encoder.mid.0" not in n}, tmp_path / "vq.safetensors")
    with pytest.raises(ConfigError, match=r"not of layout llamagen \(.*encoder.mid_block.resnets.0") as error:
        VQCheckpoint(str(tmp_path / "vq.safetensors")).prepare(HERE, HERE)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("default")
def test_a_missing_library_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    save_file(llamagen_state(), tmp_path / "vq.safetensors")
    with pytest.raises(ConfigError, match=r"diffusers, which is not installed: pip install 'symbiotic\[hf\]'"):
        VQCheckpoint(str(tmp_path / "vq.safetensors")).prepare(HERE, HERE)

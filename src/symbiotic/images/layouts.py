"""Parameter names of published VQ tokenizers, brought to those of `diffusers.VQModel`, whose blocks are the same.

All of them are the encoder and decoder of VQGAN (taming-transformers, arXiv 2012.09841) under three families of names:

    taming     encoder.down.0.block.1.conv1, decoder.up.0 is the finest level      Chameleon's `vqgan.ckpt`
    janus      the same, but decoder.up.0 is the coarsest level                    transformers' JanusVQVAE
    llamagen   encoder.conv_blocks.0.res.1.conv1, decoder.conv_blocks.0 coarsest   LlamaGen's `vq_ds16_c2i.pt`

The shapes tell channels, levels, blocks and attention, so that no config is needed beside the weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

CODES = "quantize.embedding.weight"  # [K, D]
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", CODES)
"""What belongs to a tokenizer; discriminators, losses, counters and language models in the same file do not."""

RENAMED = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^encoder\.(?:down|conv_blocks)\.", "encoder.down_blocks."),
        (r"^decoder\.(?:up|conv_blocks)\.", "decoder.up_blocks."),
        (r"\.mid\.(?:block_1|0)\.", ".mid_block.resnets.0."),
        (r"\.mid\.(?:attn_1|1)\.", ".mid_block.attentions.0."),
        (r"\.mid\.(?:block_2|2)\.", ".mid_block.resnets.1."),
        (r"\.(?:block|res)\.(\d+)\.", r".resnets.\1."),
        (r"\.attn\.(\d+)\.", r".attentions.\1."),
        (r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
        (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
        (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
        (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    )
]
_LEVEL = re.compile(r"^(decoder\.up_blocks\.)(\d+)")


def prefix_of(names: Iterable[str]) -> str | None:
    """What stands before a tokenizer's names in a larger model, such as `model.vqmodel.`; None: there is none in it."""
    return next((name.removesuffix(CODES) for name in names if name.endswith(CODES)), None)


def own_names(names: Iterable[str]) -> dict[str, str]:
    """Names in a file -> those of the tokenizer in it, without what does not belong to one."""
    names = list(names)
    prefix = prefix_of(names)
    if prefix is None:
        return {}
    inside = {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    return {name: short for name, short in inside.items() if short.startswith(PARTS)}


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights, as float32, under the names and in the order of levels of `diffusers.VQModel`."""
    renamed = {}
    for name, value in state.items():
        for pattern, right in RENAMED:
            name = pattern.sub(right, name)
        is_linear = ".attentions." in name and value.ndim == 4  # there a 1x1 convolution, here a matrix
        renamed[name] = (value.flatten(1) if is_linear else value).float()
    levels = count(renamed, "decoder.up_blocks.{}.resnets.0.conv1.weight")
    if levels > 1 and "decoder.up_blocks.0.upsamplers.0.conv.weight" not in renamed:  # the finest level comes first
        return {_LEVEL.sub(lambda m: f"{m[1]}{levels - 1 - int(m[2])}", name): value for name, value in renamed.items()}
    return renamed


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many names `pattern` gives with 0, 1, 2, ... in its place."""
    number = 0
    while pattern.format(number) in state:
        number += 1
    return number


def arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of the `diffusers.VQModel` that these weights, under its names, fill.

    Raises:
        KeyError: a part that every tokenizer has is not there; the name of its weight.
    """
    down, up = "encoder.down_blocks.{}.resnets.0.conv2.weight", "decoder.up_blocks.{}.resnets.0.conv2.weight"
    codes, latent = state[CODES], state["quant_conv.weight"]
    channels = [state[down.format(i)].shape[0] for i in range(count(state, down))]
    attends = {False: "", True: "Attn"}

    def kinds(side: str, block: str, levels: int) -> list[str]:
        return [attends[f"{side}.{i}.attentions.0.to_q.weight" in state] + block for i in range(levels)]

    return {
        "block_out_channels": channels,
        "down_block_types": kinds("encoder.down_blocks", "DownEncoderBlock2D", len(channels)),
        "up_block_types": kinds("decoder.up_blocks", "UpDecoderBlock2D", count(state, up)),
        "layers_per_block": count(state, "encoder.down_blocks.0.resnets.{}.conv1.weight"),
        "latent_channels": latent.shape[1],
        "num_vq_embeddings": codes.shape[0],
        "vq_embed_dim": codes.shape[1],
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in state,
    }

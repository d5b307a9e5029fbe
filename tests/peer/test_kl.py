"""The autoencoder against diffusers itself, on tiny random weights of the layouts of Stable Diffusion and FLUX."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from symbiotic.images.kl import KLAutoencoder
from symbiotic.images.tokenizer import to_input, to_pixels
from symbiotic.schema import ConfigError

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]
diffusers = pytest.importorskip("diffusers")

SIZES: dict[str, Any] = {"block_out_channels": (8, 16, 16), "norm_num_groups": 4, "layers_per_block": 1}
SIZES |= {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
LAYOUTS = {
    "sd": {"latent_channels": 4, "scaling_factor": 0.18215},
    "flux": {
        "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=LAYOUTS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(**SIZES, **LAYOUTS[request.param]).eval()
    folder = tmp_path_factory.mktemp(request.param)
    network.save_pretrained(folder)
    return folder, network


def pictures() -> torch.Tensor:
    return torch.randint(0, 256, (2, 32, 16, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_latents_and_pixels_are_those_of_the_pipelines(saved: tuple[Path, Any]) -> None:
    """z = (mean - shift) * scale before the transformer, z / scale + shift before the decoder."""
    folder, network = saved
    mine, pixels, cfg = KLAutoencoder(str(folder)), pictures(), network.config
    shift = cfg.shift_factor or 0.0
    with torch.no_grad():
        want = (network.encode(to_input(pixels)).latent_dist.mean - shift) * cfg.scaling_factor
        again = to_pixels(network.decode(want / cfg.scaling_factor + shift).sample)
    got = mine.encode(pixels)
    assert got.shape == (2, 4, 2, 4 * cfg.latent_channels)
    assert (mine.patch, mine.patch_dim, mine.grid(32, 16)) == (8, 4 * cfg.latent_channels, (4, 2))
    for y in range(8):
        for x in range(4):  # a token holds 2 x 2 latents, (y, x, channel) inside
            inside = got[:, y // 2, x // 2].unflatten(1, (2, 2, -1))[:, y % 2, x % 2]
            torch.testing.assert_close(inside, want[:, :, y, x], rtol=0, atol=1e-6)
    assert torch.equal(mine.decode(got.flatten(1, 2), 32, 16), again)
    assert KLAutoencoder(str(folder), token=1).encode(pixels).shape == (2, 8, 4, cfg.latent_channels)


def test_what_is_missing_or_wrong_is_one_line(saved: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = saved
    config = json.loads((folder / "config.json").read_text())

    def changed(name: str, **keys: Any) -> str:
        made = tmp_path / name
        made.mkdir()
        (made / "diffusion_pytorch_model.safetensors").write_bytes(
            (folder / "diffusion_pytorch_model.safetensors").read_bytes()
        )
        (made / "config.json").write_text(json.dumps(config | keys))
        return str(made)

    wrong = [
        (str(tmp_path / "none"), r"path=.*none \(looked for at .*\): no such file or folder; download the folder vae/"),
        (str(tmp_path), r"no diffusion_pytorch_model\.safetensors in it"),
        (changed("vq", _class_name="VQModel"), r"config\.json is of VQModel; must be of AutoencoderKL"),
        (changed("mean", latents_mean=[0.0] * 4), r"latents_mean: latents by channel are not read"),
        (changed("wide", block_out_channels=[8, 16, 32]), r"not weights of its config\.json"),
    ]
    for path, line in wrong:
        with pytest.raises(ConfigError) as error:
            KLAutoencoder(path)
        assert re.search(line, str(error.value)), str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"token=0: must be at least 1"):
        KLAutoencoder(str(folder), token=0)
    with pytest.raises(ValueError, match=r"12x16 pixels do not divide into tokens of 8x8 pixels"):
        KLAutoencoder(str(folder)).encode(pictures()[:, :12])

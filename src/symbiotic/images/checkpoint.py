"""Published VQ tokenizers from local files: LlamaGen, Chameleon, and what `diffusers` saves. Nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor
from torch.nn import functional as F

from symbiotic.files import read_json, write_bytes
from symbiotic.images.layouts import CODES, arguments, own_names, to_diffusers
from symbiotic.images.quantiser import nearest
from symbiotic.images.tokenizer import KEY, ImageTokenizer
from symbiotic.schema import ConfigError, RunError

HF = "pip install 'symbiotic[hf]'"


class Layout(NamedTuple):
    """normalised: codes and encodings are compared, and decoded, at length 1. get: how a user gets such a file."""

    normalised: bool
    get: str


LAYOUTS = {
    "llamagen": Layout(True, "download vq_ds16_c2i.pt from FoundationVision/LlamaGen on Hugging Face"),
    "chameleon": Layout(False, "Meta sends Chameleon's tokenizer/vqgan.ckpt on request"),
    "diffusers": Layout(False, "download the folder that holds the VQModel's config.json and weights"),
}
SUFFIXES = (".safetensors", ".pt", ".ckpt", ".bin")
WRAPPERS = ("state_dict", "model", "ema")  # keys under which training code puts the parameters


class VQCheckpoint:
    """A tokenizer that others trained, read by `diffusers.VQModel` (extra `hf`). All three take and give pixels in
    [-1, 1].

    Args:
        path: a file (.safetensors; .pt, .ckpt and .bin are read with `weights_only`) or a folder with one, or with
            shards of one model in which the tokenizer is a part (transformers' Janus, for one).
        layout: llamagen: encodings and codes are normalised to length 1 (LlamaGen, arXiv 2406.06525, section 2.1), as
            in its own code; transformers' JanusVQVAE does so on decoding only. chameleon: VQGAN as it is, scaled as in
            Chameleon's own code, x / 127.5 - 1 (transformers' image processor has x * 0.0078 - 1, darker by up to
            0.011); transformers keeps no decoder, so its folders are refused. diffusers: a folder with `config.json`.
        codebook_size: number of codes; null: as many as the file has.

    Raises:
        ConfigError: an unknown layout.
    """

    def __init__(
        self,
        path: str,
        layout: Literal["llamagen", "chameleon", "diffusers"] = "llamagen",
        codebook_size: int | None = None,
    ) -> None:
        self.path, self.layout, self.given = Path(path).expanduser(), layout, codebook_size
        if layout not in LAYOUTS:
            raise ConfigError(f"{KEY}.layout={layout}: must be one of {', '.join(LAYOUTS)}")

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The weights, under the names of `diffusers.VQModel`. Raises ConfigError: none, or of another layout."""
        about = read_json(self.path / "config.json") if self.path.is_dir() else None
        if self.layout != "diffusers" and isinstance(about, dict) and about.get("_class_name") == "VQModel":
            raise ConfigError(f"{KEY}.layout={self.layout}: {self.path} is a VQModel of diffusers; must be diffusers")
        return to_diffusers(_read(self.path, self.layout))

    @property
    def codebook_size(self) -> int:
        """Raises ConfigError: the config says another one than the file."""
        found = len(self.state[CODES])
        if self.given not in (None, found):
            what = f"the codebook of {self.path} has {found} codes; set it to {found}, and objective.codebook_size too"
            raise ConfigError(f"{KEY}.codebook_size={self.given}: {what}")
        return found

    @cached_property
    def fingerprint(self) -> str:
        """Of the layout and the weights; the place of the file does not matter."""
        sha = hashlib.sha256(self.layout.encode())
        for name, value in sorted(self.state.items()):
            sha.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()[:12]

    def prepare(self, data: Path, cache: Path) -> ImageTokenizer:
        """The tokenizer; neither folder is used.

        Raises:
            ConfigError: no such file, another codebook size, a file of another layout, or `diffusers` is missing.
        """
        del data, cache
        if not self.codebook_size or not {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= set(self.state):
            has = ", ".join(sorted({name.split(".")[0] for name in self.state}))
            raise ConfigError(
                f"{KEY}.path={self.path}: a tokenizer has an encoder and a decoder, this one only {has}; "
                f"{LAYOUTS[self.layout].get}"
            )
        return CheckpointTokenizer(self, _network(self.path, self.layout, self.state))


@final
class CheckpointTokenizer(ImageTokenizer):
    """What `VQCheckpoint` makes of its file; built there.

    `save` writes a reference, path and fingerprint, and no weights: LlamaGen's are 290 MB, one copy in every run.
    """

    def __init__(self, source: VQCheckpoint, network: Any) -> None:
        super().__init__()
        self.source, self.network = source, network.eval().requires_grad_(False)
        self.codebook_size, self.patch = source.codebook_size, 2 ** (len(network.config.block_out_channels) - 1)
        self.normalised = LAYOUTS[source.layout].normalised

    @property
    def codes(self) -> Tensor:
        """[K, D]."""
        codes = self.network.quantize.embedding.weight
        return F.normalize(codes, dim=-1) if self.normalised else codes

    def numbers(self, x: Tensor) -> Tensor:
        z = self.network.quant_conv(self.network.encoder(x)).permute(0, 2, 3, 1)
        z_ND = z.flatten(0, 2)
        return nearest(F.normalize(z_ND, dim=-1) if self.normalised else z_ND, self.codes).view(z.shape[:3])

    def pictures(self, numbers: Tensor) -> Tensor:
        quantised = self.codes[numbers].permute(0, 3, 1, 2)
        spatial = self.network.config.norm_type == "spatial"  # MoVQ (arXiv 2209.09002) norms see the codes too
        return self.network.decoder(self.network.post_quant_conv(quantised), quantised if spatial else None)

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def save(self, path: Path) -> Path:
        from safetensors.torch import save

        where = {"path": str(self.source.path.resolve()), "layout": self.source.layout, "fingerprint": self.fingerprint}
        content = save({}, {"image_tokenizer": json.dumps({"kind": "checkpoint", "arguments": where})})
        return write_bytes(path, content)


def restore(arguments: dict[str, Any], state: dict[str, Tensor]) -> ImageTokenizer:
    """Back from what `CheckpointTokenizer.save` wrote.

    Raises:
        ConfigError: the file is gone. RunError: it holds other weights by now.
    """
    del state
    source = VQCheckpoint(arguments["path"], arguments["layout"])
    if source.fingerprint != arguments["fingerprint"]:
        was = f"weights {arguments['fingerprint']}, which the run was trained with"
        raise RunError(f"{source.path}: the image tokenizer has weights {source.fingerprint} now, not {was}")
    return source.prepare(Path(), Path())


# --------------------------------------------------------------------------- files


def _read(path: Path, layout: str) -> dict[str, Tensor]:
    """The tokenizer's tensors under their short names."""
    try:
        state = {k: v for file in _files(path, layout) for k, v in _tensors(file)}
    except (OSError, RuntimeError, ValueError, UnpicklingError, EOFError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{KEY}.path={path}: not readable weights ({' '.join(str(error).split())[:200]})") from error
    if CODES not in state or "quant_conv.weight" not in state:
        missing = next(name for name in (CODES, "quant_conv.weight") if name not in state)
        raise ConfigError(f"{KEY}.path={path}: no image tokenizer in it ({missing} is missing); {LAYOUTS[layout].get}")
    return state


def _files(path: Path, layout: str) -> list[Path]:
    if path.is_file() and layout != "diffusers":
        return [path]
    for suffix in SUFFIXES if path.is_dir() else ():
        if found := sorted(path.glob(f"*{suffix}")):
            return found
    what = "no such file or folder" if not path.exists() else f"no file in it ends with {', '.join(SUFFIXES)}"
    if path.is_file():
        what = "a file; layout=diffusers needs its folder, with config.json"
    raise ConfigError(f"{KEY}.path={path} (looked for at {path.resolve()}): {what}; {LAYOUTS[layout].get}")


def _tensors(file: Path) -> Iterable[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt") as opened:
                return [(short, opened.get_tensor(name)) for name, short in own_names(opened.keys()).items()]
        except SafetensorError as error:
            raise ValueError(error) from error
    state = torch.load(file, map_location="cpu", weights_only=True)
    while isinstance(state, dict) and (inner := next((key for key in WRAPPERS if key in state), None)):
        state = state[inner]
    return [(short, state[name]) for name, short in own_names(state).items()]


def _network(path: Path, layout: str, state: dict[str, Tensor]) -> Any:
    try:
        from diffusers import VQModel
    except ImportError as error:
        raise ConfigError(f"{KEY}: a VQ checkpoint is read by diffusers, which is not installed: {HF}") from error
    try:
        if layout == "diffusers":
            return VQModel.from_pretrained(path, local_files_only=True)
        with torch.random.fork_rng(devices=[]):
            network = VQModel(**arguments(state))
        network.load_state_dict(state, assign=True)
        return network
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        what = " ".join(str(error).split())[:300]
        raise ConfigError(f"{KEY}.path={path}: not of layout {layout} ({what}); {LAYOUTS[layout].get}") from error

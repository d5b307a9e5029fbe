"""Image tokenizers in files: safetensors whose metadata says which class and arguments rebuild the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from symbiotic.images import checkpoint
from symbiotic.images.autoencoder import VQAutoencoder
from symbiotic.images.tokenizer import ImageTokenizer
from symbiotic.schema import ConfigError, RunError

KINDS: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], ImageTokenizer]] = {
    "autoencoder": VQAutoencoder.restore,
    "checkpoint": checkpoint.restore,
}
"""By the metadata's `kind`: arguments and tensors -> tokenizer."""


def load_image_tokenizer(path: str | Path) -> ImageTokenizer:
    """What `ImageTokenizer.save` wrote.

    Raises:
        RunError: no such file, or one that is damaged or no image tokenizer. ConfigError: the checkpoint that it refers
            to is gone.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise RunError(f"{path}: no such file; a run that generates by image codes keeps its image tokenizer there")
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["image_tokenizer"])  # one key: their order is not kept
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return KINDS[facts["kind"]](facts["arguments"], state)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, (RunError, ConfigError)):
            raise
        raise RunError(f"{path}: not a readable image tokenizer ({' '.join(str(error).split())[:200]})") from error

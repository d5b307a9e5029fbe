"""A trained run, opened again: its config, its corpus, its words, and the weights that are asked for.

What looks at finished runs (inspector, evaluation, generation, questions) starts here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from symbiotic.config import instantiate, read_yaml
from symbiotic.data.tokenizer import Tokenizer
from symbiotic.evaluation.captions import image_size
from symbiotic.images.encoder import ImageEncoder
from symbiotic.images.store import load_image_tokenizer
from symbiotic.models.lora import is_lora
from symbiotic.models.unified import UnifiedModel, model_of
from symbiotic.runs import load_state, read_json
from symbiotic.schema import SAMPLING, Config, ConfigError, Objective, RunError, parse
from symbiotic.studies.request import run_folder

AGAIN = "the run's own command writes it again"
TOKENIZER, IMAGE_TOKENIZER = "tokenizer.json", "image_tokenizer.safetensors"
FINAL, EMA, INITIAL, PARENT_FILE = "model.safetensors", "ema.safetensors", "init.safetensors", "parent.safetensors"
LORA = "lora.safetensors"
PRETRAINED = "pretrained.json"  # where a run that started from a Hugging Face checkpoint has its parameters from
PRETRAINED_TOKENS = "pretrained_tokenizer"  # folder of that checkpoint's tokenizer, where its tokens are the run's


@dataclass(frozen=True)
class Trained:
    """weights: the file that the model's parameters came from. step: of joint training; None where the file does not
    tell. corpus: the folder of its data, with the embedded benchmarks; it may be gone, as a run keeps its words."""

    folder: Path
    config: Config
    weights: Path
    step: int | None
    corpus: Path
    tokenizer: Tokenizer
    model: UnifiedModel

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images that it draws: those of its corpus."""
        known = (read_json(self.folder / "summary.json") or {}).get("image_size")
        return (int(known[0]), int(known[1])) if known else image_size(self.corpus / "benchmarks" / "generation")


def open_run(
    run: str | Path,
    *,
    checkpoint: str | None = None,
    step: int | None = None,
    ema: bool = False,
    data: str | None = None,
    device: str = "cpu",
) -> Trained:
    """
    Args:
        run: the folder of a run, or of a cached parent. checkpoint, step, ema: which weights, see `weights_file`.
        data: the folder of corpora, where it was moved.

    Raises:
        ConfigError, RunError, DataError: what is missing or wrong, in one line.
    """
    folder = run_folder(run)
    config = read_config(folder)
    weights = weights_file(folder, checkpoint, step, ema)
    corpus = corpus_folder(config, data, needed=data is not None or not (folder / TOKENIZER).is_file())
    words = folder / TOKENIZER if (folder / TOKENIZER).is_file() else corpus / TOKENIZER
    tokenizer = Tokenizer.load(words)
    if tokenizer.vocab_size > config.model.vocab_size:
        what = f"{tokenizer.vocab_size} words, the model has {config.model.vocab_size}: not its corpus"
        raise RunError(f"{words.parent}: {what}")
    if config.objective.name == "autoregressive":
        tokenizer.images = load_image_tokenizer(folder / IMAGE_TOKENIZER)
    if config.data.autoencoder is not None:
        tokenizer.autoencoder = instantiate(config.data.autoencoder, "data.autoencoder")
    tokenizer.vision = reads_images(config)
    model = load_model(config, weights, device)
    return Trained(folder, config, weights, step_of_weights(weights, config), corpus, tokenizer, model)


def reads_images(config: Config) -> ImageEncoder | None:
    """What further images are read by, where it is no patches of pixels: the encoder of `data.vision`, or the
    preprocessing of the tower inside the model.

    Raises:
        ConfigError: its files are missing.
    """
    if config.model.vision is not None:
        from symbiotic.images.vision import TowerPixels

        return TowerPixels(config.model.vision, "model.vision")
    return instantiate(config.data.vision, "data.vision") if config.data.vision is not None else None


def resampled(objective: Objective, asked: Mapping[str, Any], prefix: str = "") -> Objective:
    """The objective with other keys of its sampler; null: as they are. prefix: of the keys, in messages.

    Raises:
        ConfigError: a key that this objective does not sample by.
    """
    changed = {name: value for name, value in asked.items() if value is not None}
    for name, keys in SAMPLING.items():
        vain = next((key for key in keys if key in changed and name != objective.name), None)
        if vain:
            what = f"{prefix}{vain}={changed[vain]:g}: has no effect"
            raise ConfigError(f"{what}: the run's objective is {objective.name}")
    return replace(objective, sampler=replace(objective.sampler, **changed))


def read_config(run: Path) -> Config:
    """Raises RunError: not readable, or of other code."""
    path = run / "config.yaml"
    try:
        return parse(Config, read_yaml(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ConfigError) as error:
        raise RunError(f"{path}: not the config of a run of this code ({' '.join(str(error).split())})") from error


def weights_file(run: Path, checkpoint: str | None = None, step: int | None = None, ema: bool = False) -> Path:
    """The file asked for; by default what the run, or the training of a parent, ended with, else its newest checkpoint.

    Args:
        checkpoint: this file. step: the checkpoint of this step; 0: what joint training started from. ema: the
            averaged weights that the run ended with.

    Raises:
        RunError: it is not there.
    """
    if ema:
        if (run / EMA).is_file():
            return run / EMA
        raise RunError(f"{run / EMA}: no such file; only a finished run with callbacks.ema has averaged weights")
    if checkpoint is not None or step == 0:
        path = Path(checkpoint) if checkpoint is not None else run / INITIAL
        if path.exists():
            return path
        raise RunError(f"{path}: no such file; {AGAIN}" if step == 0 else f"{path}: no such checkpoint")
    ended = next((run / name for name in (FINAL, PARENT_FILE) if (run / name).is_file()), None)
    if step is None and ended is not None:
        return ended
    from symbiotic.callbacks.checkpoint import checkpoint_path, checkpoints, newest_valid, step_of  # Lightning: seconds

    folder = run / "checkpoints"
    if step is not None:
        path = checkpoint_path(folder, step)
        if path.exists():
            return path
        kept = ", ".join(str(step_of(found)) for found in checkpoints(folder)) or "none"
        raise RunError(f"{path}: no such checkpoint; steps that were kept: {kept}, and 0")
    newest = newest_valid(folder)
    if newest is not None:
        return newest
    raise RunError(f"{run / FINAL}: no such file, and no checkpoint either; {AGAIN}")


def step_of_weights(path: Path, config: Config) -> int | None:
    known: Mapping[str, Any] = {FINAL: config.phases.steps, EMA: config.phases.steps, INITIAL: 0}
    if path.name in known:
        return int(known[path.name])
    number = path.stem.removeprefix("step=")
    return int(number) if number.isdigit() else None


def corpus_folder(config: Config, data: str | None, needed: bool = True) -> Path:
    """The corpus that the run was trained on; it is found, never written.

    Raises:
        RunError: it is not there, and needed.
    """
    source = instantiate({**config.data.source, **({"folder": data} if data else {})}, "data.source")
    path = Path(source.path)
    if needed and not (path / TOKENIZER).is_file():
        raise RunError(f"{path / TOKENIZER}: no such file; {AGAIN}, or data=FOLDER says where the corpus lies")
    return path


def load_model(config: Config, path: Path, device: str) -> UnifiedModel:
    """Raises RunError (a file that does not fit the config), ConfigError (no such device)."""
    state = load_state(path)
    model = model_of(config, latents="latent_head.weight" in state)
    if any(map(is_lora, state)):
        model.adapt(config.lora, config.seed)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = " ".join(str(error).split("\n")[1:2]).strip()
        raise RunError(f"{path}: not weights of the model in config.yaml ({first or error})") from error
    try:
        return model.to(device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(f"device={device}: {str(error).splitlines()[0]}") from error

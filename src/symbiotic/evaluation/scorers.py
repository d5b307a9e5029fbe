"""The scorers of generated pictures: trained once per corpus, in a process of their own, and cached beside it.

`python -m symbiotic.evaluation.scorers DATA_FOLDER [--preset NAME]` trains them unless they are there. The cache is
`<data>/scorers/{preset}-{key}.safetensors` and `.json` (own accuracies, sha256 of the weights); both are written
beside their target and renamed, the JSON last. One process trains, the others wait: the lock is held by the
system and falls with its owner, so that nobody waits for the dead.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from symbiotic.data.errors import DataError, readable_errors
from symbiotic.data.tokenizer import Tokenizer
from symbiotic.evaluation.benchmark import MissingAsset
from symbiotic.evaluation.scorer_networks import VALUES, Classifier, build_clip, clip_text, to_input
from symbiotic.evaluation.scorer_training import Preset, train

VERSION = 1  # to be raised with every change of the networks or of their training
PRESETS = {
    "default": Preset(rounds=16, classifier_steps=200, clip_steps=450),
    "tiny": Preset(rounds=2, classifier_steps=25, clip_steps=4, batch=64),  # plumbing: judges nothing well
}


class Scorers:
    """The trained judges. All methods take uint8 pictures [n, H, W, 3] and keep to the CPU.

    accuracy: the scorers' own scores on fresh renderings: `classifier` (all four attributes right), the same on
    blurred and noised pictures, `clip_retrieval` (the right one of all 960 captions), mean cosines of right and
    wrong captions; and the `seconds` that training took. key: which judges these are, by a hash of their weights.
    """

    def __init__(
        self, classifier: Classifier, clip: Any, tokenizer: Tokenizer, accuracy: dict[str, float], key: str = ""
    ) -> None:
        self.key = key
        self.classifier, self.clip = classifier.eval().requires_grad_(False), clip.eval().requires_grad_(False)
        self.tokenizer, self.accuracy = tokenizer, accuracy

    def attributes(self, images: Tensor) -> list[tuple[Any, ...]]:
        """(digit, foreground, background, layout) that the classifier sees in each picture."""
        chosen = [logits.argmax(-1).tolist() for logits in self.classifier(to_input(images))]
        return [tuple(VALUES[i][number] for i, number in enumerate(row)) for row in zip(*chosen, strict=True)]

    def features(self, images: Tensor) -> np.ndarray:
        """float64 [n, d] features of the classifier, for the Frechet distance."""
        return self.classifier.features(to_input(images)).double().numpy()

    def cosines(self, images: Tensor, captions: Sequence[str]) -> list[float]:
        """Cosine of each picture with its caption."""
        picture = self.clip.encode_image(to_input(images), normalize=True)
        text = self.clip.encode_text(clip_text(captions, self.tokenizer), normalize=True)
        return (picture * text).sum(-1).tolist()


# --------------------------------------------------------------------------- the cache


class Cache:
    """Where the scorers of a corpus folder and a preset lie."""

    def __init__(self, folder: str | Path, preset: str) -> None:
        self.data, self.preset = Path(folder), preset
        if preset not in PRESETS:
            raise DataError(f"scorers: preset {preset!r} is none of {', '.join(PRESETS)}")
        with readable_errors("read", self.data):
            recipe = (self.data / "recipe.json").read_bytes() + (self.data / "tokenizer.json").read_bytes()
        settings = json.dumps([VERSION, preset, dataclasses.asdict(PRESETS[preset])]).encode()
        key = hashlib.sha256(recipe + settings).hexdigest()[:10]
        self.weights = self.data / "scorers" / f"{preset}-{key}.safetensors"
        self.facts = self.weights.with_suffix(".json")
        self.lock = self.weights.with_suffix(".lock")
        self.log = self.weights.with_suffix(".log")

    def load(self) -> Scorers | None:
        """The cached scorers; None where there are none, or where the files are damaged (they are then replaced)."""
        from safetensors.torch import load

        try:
            facts = json.loads(self.facts.read_bytes())
            content = self.weights.read_bytes()
            if hashlib.sha256(content).hexdigest() != facts["sha256"]:
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        tokenizer = Tokenizer.load(self.data / "tokenizer.json")
        state = load(content)
        with torch.random.fork_rng(devices=[]):
            classifier, clip = Classifier(), build_clip(tokenizer.vocab_size)
        for name, net in (("classifier", classifier), ("clip", clip)):
            net.load_state_dict({k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")})
        return Scorers(classifier, clip, tokenizer, facts["accuracy"], facts["sha256"][:12])

    def is_there(self) -> bool:
        return self.facts.is_file() and self.weights.is_file()

    def write(self) -> None:
        """Train, and write weights and facts."""
        from safetensors.torch import save

        tokenizer = Tokenizer.load(self.data / "tokenizer.json")
        classifier, clip, accuracy = train(PRESETS[self.preset], tokenizer)
        nets = nn.ModuleDict({"classifier": classifier, "clip": clip})
        content = save({name: value.contiguous() for name, value in nets.state_dict().items()})
        facts = {"preset": self.preset, "sha256": hashlib.sha256(content).hexdigest(), "accuracy": accuracy}
        _replace(self.weights, content)
        _replace(self.facts, (json.dumps(facts, indent=2) + "\n").encode())


def _replace(path: Path, content: bytes) -> None:
    """Write beside the target, then rename: the file is whole or absent."""
    part = path.with_name(f".{path.name}.part")  # under the lock: a leftover has no owner
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path, timeout: float) -> Iterator[None]:
    """Hold the lock, waiting for a live owner up to `timeout` seconds."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        end = time.monotonic() + timeout
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() > end:
                owner = os.pread(descriptor, 100, 0).decode(errors="replace").strip()
                raise DataError(f"{path}: {owner or 'another process'} trains the scorers for over {timeout:.0f} s")
            time.sleep(0.1)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


# --------------------------------------------------------------------------- use


def load_scorers(
    folder: str | Path,
    preset: str = "default",
    timeout: float = 900,
    say: Callable[[str], None] = lambda line: None,
) -> Scorers:
    """The scorers of a corpus folder: from the cache; else waited for, where another process trains them; else trained.

    Args:
        timeout: seconds to wait for another process. say: gets a line before the waiting or training.

    Raises:
        DataError: no corpus in the folder, unknown preset, no permission or space, or the other process takes longer.
    """
    cache = Cache(folder, preset)
    found = cache.load()
    if found is not None:
        return found
    say(f"   the judges of images ({preset}) are trained, once a corpus …")
    with readable_errors("write scorers", cache.weights.parent):
        cache.weights.parent.mkdir(exist_ok=True)
        with _locked(cache.lock, timeout):
            found = cache.load()
            if found is None:
                cache.write()
                found = cache.load()
    if found is None:
        raise DataError(f"{cache.weights}: written, but not readable")
    return found


class Judges:
    """The scorers of a corpus folder and a preset, loaded once and not before they are needed."""

    def __init__(self, folder: str | Path, preset: str) -> None:
        self.folder, self.preset = folder, preset
        self._scorers: Scorers | None = None

    def load(self, say: Callable[[str], None] = lambda line: None) -> Scorers:
        """Waits for the process that trains them, or trains them."""
        if self._scorers is None:
            self._scorers = load_scorers(self.folder, self.preset, say=say)
        return self._scorers

    def key(self) -> str:
        """Raises MissingAsset: nobody has trained them yet."""
        if self._scorers is None:
            self._scorers = Cache(self.folder, self.preset).load()
        if self._scorers is None:
            raise MissingAsset(
                f"{self.folder}: no judges of images ({self.preset}) yet; measuring generation trains them"
            )
        return self._scorers.key


def launch_scorers(folder: str | Path, preset: str = "default") -> subprocess.Popen[bytes] | None:
    """Train the scorers in a second process with one thread; None where they are there already.

    The process ends by itself; its output goes to a log beside the cache. If it dies, `load_scorers` trains.

    Raises:
        DataError: as `load_scorers`, without the waiting.
    """
    cache = Cache(folder, preset)
    if cache.is_there():
        return None
    command = [sys.executable, "-m", "symbiotic.evaluation.scorers", str(folder), "--preset", preset]
    source = str(Path(__file__).resolve().parents[2])  # the package need not be installed
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment = {**os.environ, **one_thread, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    with readable_errors("write scorers", cache.weights.parent):
        cache.weights.parent.mkdir(exist_ok=True)
        with cache.log.open("wb") as log:
            return subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m symbiotic.evaluation.scorers", description="Train the scorers.")
    parser.add_argument("folder", help="a corpus folder, as written by symbiotic.data.embedded")
    parser.add_argument("--preset", default="default", choices=PRESETS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        scorers = load_scorers(given.folder, given.preset)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(scorers.accuracy, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

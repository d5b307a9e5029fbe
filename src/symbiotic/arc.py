"""The arc of one run: data -> stage 0 -> profile -> split -> joint training -> evaluation -> summary.

Each step is cached by what it depends on, says what it does and where its files are, and is skipped when its files
are there: the same command started again goes on where the last one stopped.
"""

from __future__ import annotations

import dataclasses
import math
import subprocess
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from symbiotic.callbacks.checkpoint import checkpoints, newest_manifest, newest_step
from symbiotic.callbacks.csv_log import CSVLog
from symbiotic.callbacks.ema import EMA, PREFIX
from symbiotic.callbacks.finite_check import FiniteCheck
from symbiotic.callbacks.in_loop_evaluation import SCORES, InLoopEvaluation, read_scores, record_scores
from symbiotic.callbacks.log import StepLog
from symbiotic.callbacks.lr_phases import LRPhases
from symbiotic.callbacks.progress import Progress
from symbiotic.callbacks.sample_grid import SampleGrid
from symbiotic.callbacks.shared_only_probe import SharedOnlyProbe
from symbiotic.callbacks.step import Probing
from symbiotic.config import instantiate, save_config
from symbiotic.convert.assignment import read_assignment
from symbiotic.convert.disk import copy_tokens
from symbiotic.convert.huggingface import origin as origin_of_weights
from symbiotic.convert.huggingface import read_parent, swap_rows
from symbiotic.convert.profile import expert_counts
from symbiotic.convert.receipt import receipt
from symbiotic.convert.split import Assignment, assign, split_state
from symbiotic.convert.tokens import adapted
from symbiotic.data.account import ACCOUNT, BAD_SAMPLES
from symbiotic.data.encoded import Encoded, Made
from symbiotic.data.image_codes import ImageCodes, encode_corpus
from symbiotic.data.loader import MicroBatches
from symbiotic.data.plan import DataPlan
from symbiotic.data.shards import ShardIndex, ShardReader
from symbiotic.data.streamed import StreamData
from symbiotic.data.tokenizer import SPECIALS, Tokenizer
from symbiotic.evaluation.benchmark import measuring, write_jsonl
from symbiotic.evaluation.captions import read_captions
from symbiotic.evaluation.embedded import Scores, corpus_suite, has_benchmarks
from symbiotic.evaluation.prompts import pictures
from symbiotic.evaluation.scorers import launch_scorers
from symbiotic.fit import fit
from symbiotic.images.encoder import fingerprint_of
from symbiotic.images.tokenizer import ImageTokenizer
from symbiotic.layout import parent_system
from symbiotic.models.batch import Batch
from symbiotic.models.lora import is_lora
from symbiotic.models.unified import UnifiedModel, model_of
from symbiotic.resume import changes, hold, hold_finished, identities, origin, settings
from symbiotic.runs import (
    Journal,
    digest,
    load_sound,
    load_state,
    locked,
    provenance,
    read_json,
    save_state,
    source_hash,
    state_hash,
    versions,
    write_json,
    write_text,
)
from symbiotic.schema import Config, ConfigError, Lora, Model, Objective, Phase, Phases, RunError, Surgery
from symbiotic.studies import console, summary
from symbiotic.studies.benchmarks import make_benchmarks, read_protocols
from symbiotic.studies.flops import training_flops
from symbiotic.team import agree, first, is_first, size
from symbiotic.trained import EMA as EMA_FILE
from symbiotic.trained import (
    FINAL,
    IMAGE_TOKENIZER,
    LORA,
    PARENT_FILE,
    PRETRAINED,
    PRETRAINED_TOKENS,
    TOKENIZER,
    reads_images,
)
from symbiotic.training.phases import mix_schedule
from symbiotic.training.sharded import whole

GENERATION_SETS = ("t2i", "t2i_long")
PROBE_SEED = 1_000_003
RECEIPT, RECEIPT_TABLE = "receipt.json", "receipt.txt"
INIT = "init.safetensors"
SECONDS = "seconds.json"
"""Of the cache: how long the steps of the arc took."""

PARENT_CODE = (
    *("schema.py", "layout.py", "models", "objectives", "training", "data"),
    *("module.py", "fit.py", "arc.py", "callbacks/lr_phases.py"),
)
"""Sources that decide what a parent becomes: a cached one of other code is not used."""


def run(config: Config) -> float:
    """Run the whole arc; returns the score named `metric` (NaN for a dry run, or where only the parent is made).

    Raises:
        ConfigError, DataError, RunError: what is wrong, in one line.
    """
    torch.set_num_threads(config.threads)
    if config.dry_run:
        summary.show_plan(config)
        return math.nan
    arc = Arc(config)
    done = arc.begin()
    if done is not None:
        return done
    summary.show_plan(config)
    return arc.run()


class Arc:
    """One run of one config; its folders, and what earlier steps made for later ones."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder, self.cache = Path(config.run_dir), Path(config.paths.cache)
        self.provenance = provenance()  # now: sources may be edited while it runs
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{error.filename or self.folder}: cannot be written: {error.strerror}") from error
        self.journal = Journal(self.cache / SECONDS, keeps=is_first())
        self.made = make_callbacks(config)  # now: a wrong argument costs no stage 0
        self.scorers: subprocess.Popen[bytes] | None = None
        self.ema_scores: Scores | None = None
        self.told: set[str] = set()

    def begin(self) -> float | None:
        """The metric of a run that is finished, which is shown; None for one that begins or goes on.

        Raises:
            RunError: it began with other settings. Then nothing of it was written.
        """
        done = None if self.config.parent_only else agree(lambda: summary.finished(self.folder, self.config))
        if done is not None:
            agree(lambda: hold_finished(self.folder, settings(self.config, self.provenance, "")))
            print(f"{self.folder} is finished; its summary:\n{(self.folder / 'summary.txt').read_text()}")
            return done
        if not self.config.parent_only:
            agree(self.hold)
        if is_first():
            try:
                save_config(self.config, self.folder / "config.yaml")
            except OSError as error:
                raise RunError(f"{error.filename or self.folder}: cannot be written: {error.strerror}") from error
        return None

    def run(self) -> float:
        with first():
            self.prepare_data()
        try:
            self.parent_of_all()
            if self.config.parent_only:
                agree(lambda: self.parent() and None)
                return math.nan
            with first():
                state = self.init() if is_first() else load_state(self.folder / INIT)
            scores = self.joint(state)
            if scores is None:
                return math.nan
        except BaseException:
            if self.scorers is not None:  # do not keep a stopped run waiting; the next start trains the judges
                self.scorers.terminate()
            raise
        finally:
            if self.scorers is not None:
                self.scorers.wait()
        return summary.write(self, scores)

    def hold(self) -> None:
        """A run that goes on is the one that began, or what differs is allowed and on record."""
        corpus = instantiate(self.config.data.source, "data.source").fingerprint
        now = settings(self.config, self.provenance, corpus)
        begun = (self.folder / RECEIPT).exists() or bool(checkpoints(self.folder / "checkpoints"))
        saved = self.folder / "checkpoints"
        hold(
            self.folder,
            now,
            self.config.allow_changes,
            begun,
            lambda: newest_step(saved),
            lambda: newest_manifest(saved),
        )

    def init(self) -> dict[str, Tensor]:
        """What joint training starts from. A run that was changed on the way keeps the parent that it began with."""
        found = read_json(self.folder / RECEIPT)
        if not changes(self.folder):
            return self.split(self.parent())
        state = load_sound(self.folder / INIT)
        if found is None or state is None:
            why = "missing or damaged, and the run was changed on the way: its parent cannot be made again"
            lost = RECEIPT if found is None else INIT
            raise RunError(f"{self.folder / lost}: {why}; remove the folder to run it anew")
        self.parent_name, self.stage0_scores = found["parent"], found["stage_0"]
        return state

    # ------------------------------------------------------------------ data

    def prepare_data(self) -> None:
        self.source = source = instantiate(self.config.data.source, "data.source")
        self.fingerprint: str = source.fingerprint
        with self.journal.step("data", self.fingerprint, "write the corpus, once, or find it", Path(source.folder)):
            self.data: Path = source.prepare()
            self.index = ShardIndex.load(self.data / "index.npz")
        self.prepare_vectors()
        check_data(self.config, self.data, self.index, self.vectors)
        if is_first():  # a run answers and draws without its corpus
            write_text(self.folder / TOKENIZER, (self.data / TOKENIZER).read_text(encoding="utf-8"))
        evaluation = self.config.evaluation
        more = make_benchmarks(evaluation)
        self.prepare_codes()
        self.evaluation = corpus_suite(
            self.data, evaluation, self.config.objective, list(more.values()), self.images, self.image_size()
        )
        self.evaluation.tokenizer.autoencoder, self.evaluation.tokenizer.vision = self.autoencoder, self.vision
        if not is_first():
            return
        for name in (ACCOUNT, BAD_SAMPLES):  # of shards from elsewhere
            if (self.data / name).is_file():
                write_text(self.folder / name, (self.data / name).read_text(encoding="utf-8"))
        if has_benchmarks(self.data):
            self.scorers = launch_scorers(self.data, self.config.evaluation.scorers)  # last: nothing fails beside it

    def prepare_vectors(self) -> None:
        """Vectors of images in the place of pixels, where there are any: the index tells the lengths with them."""
        reader = ShardReader(self.data / "shards", self.index)
        self.encoded = [Encoded.open(folder, self.index) for folder in self.config.data.encoded]
        self.check_vectors()
        node = self.config.data.autoencoder
        self.autoencoder = self.held("vae", instantiate(node, "data.autoencoder") if node is not None else None)
        self.vision = self.held("vit", reads_images(self.config))
        tower = [Made(self.vision)] if self.vision is not None and self.config.model.vision is not None else []
        self.vectors: list[Encoded | Made] = [*self.encoded, *tower]
        for one in self.vectors:
            self.index = one.counts(self.index, reader)

    def held(self, kind: str, made: Any) -> Any:
        """What made the vectors of this kind, to draw or to read further images, held against those that are there.

        Raises:
            ConfigError: it is another one, or it is missing and the run draws.
        """
        key = {"vae": "autoencoder", "vit": "vision"}[kind]
        for one in (one for one in self.encoded if one.kind == kind):
            if made.fingerprint != one.fingerprint if made is not None else kind == "vae":
                has = "null" if made is None else f"encoder {made.fingerprint}"
                raise ConfigError(f"data.{key}={has}: must be {one.fingerprint}, which made what is in {one.folder}")
        return made

    def check_vectors(self) -> None:
        """Raises ConfigError: vectors where something needs pixels."""
        if self.encoded and has_benchmarks(self.data):
            where = f"data.encoded={self.encoded[0].folder}"
            raise ConfigError(f"{where}: the benchmarks of the embedded corpus are pixels; data=shards takes vectors")
        by_codes = self.config.objective.name == "autoregressive"
        if by_codes and any(one.kind == "vae" for one in self.encoded):
            raise ConfigError("objective=autoregressive: it generates codes, data.encoded has latents; take flow")

    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images that are drawn to be looked at: of the first one that is generated."""
        made = self.generated(1)
        return (made[0][1], made[0][2]) if made else (20, 20)

    def generated(self, count: int) -> list[tuple[str, int, int]]:
        """Caption, height and width of the first samples of the corpus whose images are generated."""
        numbers = np.flatnonzero(self.index.num_latents > 0)[:count]
        reader = ShardReader(self.data / "shards", self.index)
        records = [reader.read(int(number))[0] for number in numbers]
        return [(record["caption"], record["height"], record["width"]) for record in records]

    def prepare_codes(self) -> None:
        """The image tokenizer, and the codes of the corpus's generated images, where the objective wants codes."""
        self.images: ImageTokenizer | None = None
        self.codes: ImageCodes | None = None
        node = self.config.objective.image_tokenizer
        if node is None or self.config.objective.name != "autoregressive" or self.config.parent_only:
            return
        source = instantiate(node, "objective.image_tokenizer")
        what = "train the image tokenizer, once, or find it, and make codes of the images"
        with self.journal.step("codes", source.fingerprint, what, self.cache):
            self.images = source.prepare(self.data, self.cache)
            check_codes(self.config, self.images)
            self.codes = encode_corpus(self.images, self.data / "shards", self.index, self.cache)
        if is_first():
            self.images.save(self.folder / IMAGE_TOKENIZER)

    def dataset(self, config: Config, generation: bool) -> MicroBatches:
        objective = config.objective if generation else None
        schedule = mix_schedule(config.phases, config.mix)
        if isinstance(self.source, StreamData):
            made = next((one for one in self.vectors if isinstance(one, Made)), None)
            streams = self.source.plan(self.index, config.mix, config.data, config.seed, objective, schedule, made)
            return MicroBatches(self.data, streams, cache_bytes=0, encoded=self.vectors, reader=streams)
        plan = DataPlan(self.index, config.mix, config.data, config.seed, objective, schedule)
        return MicroBatches(self.data, plan, codes=self.codes if generation else None, encoded=self.vectors)

    def probe(self) -> Batch:
        """The fixed batch that monitors measure on: `probe_samples` of the mix of the first phase, drawn by a seed of
        their own."""
        config = self.config
        data = dataclasses.replace(config.data, samples=config.probe_samples, micro_batches=1, repeat_steps=0)
        start = mix_schedule(config.phases, config.mix)[:1]
        plan = DataPlan(self.index, config.mix, data, config.seed + PROBE_SEED, config.objective, start)
        return MicroBatches(self.data, plan, codes=self.codes, encoded=self.vectors)[0]

    def about(self, key: str | None = None) -> dict[str, str]:
        """What the manifest of a checkpoint says of where it comes from. key: what decides it, of a parent, which runs
        of many settings share."""
        made = origin(settings(self.config, self.provenance, self.fingerprint))
        return made | {"commit": self.provenance["commit"]} | ({"settings": key} if key else {})

    # ------------------------------------------------------------------ stage 0

    def parent(self) -> dict[str, Tensor]:
        """The understanding-only parent: from a checkpoint, from the cache, or trained now."""
        config = stage0_config(self.config)
        given = self.config.init.folder or self.config.init.checkpoint
        if given is not None:
            state = self.given(Path(given))
            config = parent_config(self.config, state)
            check_parent(state, config, given)
            self.parent_name = f"{given} {state_hash(state)}"
            with self.journal.step("anchor", digest(asdict(config.model)), "evaluate the parent", Path(given)):
                self.stage0_scores = dict(self.evaluate(built(config, state, latents=False)))
            return state
        key = stage0_key(config, self.fingerprint)
        folder = self.cache / "stage0" / key
        self.parent_name = f"stage 0 {key}"
        steps = config.phases.steps
        with locked(folder / "lock"):
            kept = load_sound(folder / PARENT_FILE)
            what = f"train the parent on understanding, {steps} steps" if kept is None else "take the cached parent"
            with self.journal.step("stage 0", f"{key}/{kept is not None}", what, folder):
                state = self.train_parent(config, folder, key) if kept is None else kept
                self.stage0_scores = self.anchor(config, state, folder)
        return state

    def given(self, path: Path) -> dict[str, Tensor]:
        """The state of a parent in a file, or in the folder of a pretrained model."""
        if self.config.init.folder is None:
            return load_state(path)
        swaps = self.own_tokens(path)
        write_json(self.folder / PRETRAINED, origin_of_weights(path) | {"token_rows": swaps})
        return swap_rows(read_parent(path, self.config.model, self.config.seed), swaps or ())

    def own_tokens(self, path: Path) -> tuple[tuple[int, int], ...] | None:
        """The rows that change places where the corpus's tokens are the pretrained model's, whose files the run then
        keeps; None where they are others, which the model has to learn."""
        words = (self.folder / TOKENIZER).read_text(encoding="utf-8")
        try:
            found = adapted(path, SPECIALS)
        except ConfigError:  # none, or one that cannot be ours
            return None
        if found.text != words:
            return None
        (self.folder / PRETRAINED_TOKENS).mkdir(exist_ok=True)
        copy_tokens(path, self.folder / PRETRAINED_TOKENS)
        return found.swaps

    def parent_of_all(self) -> None:
        """Train a parent that is missing with all processes of the run; a single one does so when it needs it."""
        if size() == 1 or self.config.init.folder is not None or self.config.init.checkpoint is not None:
            return
        config = stage0_config(self.config)
        key = stage0_key(config, self.fingerprint)
        folder = self.cache / "stage0" / key
        begun = changes(self.folder) and read_json(self.folder / RECEIPT) is not None  # it keeps the parent that it had
        if agree(lambda: not begun and load_sound(folder / PARENT_FILE) is None):
            print(
                f"\n== stage 0: train the parent on understanding, {config.phases.steps} steps\n   {folder}", flush=True
            )
            with locked(folder / "lock") if is_first() else nullcontext():
                self.train_parent(config, folder, key)

    def train_parent(self, config: Config, folder: Path, key: str) -> dict[str, Tensor]:
        callbacks = [StepLog(config.log_every), LRPhases(), FiniteCheck(), Progress(config.log_every, label="stage 0")]
        loggers, about = [CSVLog(str(folder))], self.about(key)
        module = fit(config, folder, self.dataset(config, False), callbacks, loggers, latents=False, about=about)
        state = whole(module.model.state_dict())
        if is_first():
            save_config(config, folder / "config.yaml")
            save_state(folder / PARENT_FILE, state, data=self.fingerprint)
        return state

    def anchor(self, config: Config, state: dict[str, Tensor], folder: Path) -> dict[str, float]:
        """Scores of the parent, kept beside it."""
        code = source_hash("models", "objectives", "generation", "evaluation")
        model = built(config, state, latents=False)
        protocols = read_protocols(self.evaluation, model).protocols  # others when assets come or change
        path = folder / f"scores-{digest([self.evaluation_key(), protocols])}-{code}.json"
        known = read_json(path)
        if known is not None:
            return dict(known)
        scores = self.evaluate(model)
        if not scores.failed:
            write_json(path, dict(scores))
        return dict(scores)

    # ------------------------------------------------------------------ profile and split

    def split(self, parent: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state that joint training starts from, with a receipt of what went where."""
        config, path = self.config, self.folder / INIT
        found = read_json(self.folder / RECEIPT)
        if path.is_file() and found is not None and 0 in read_scores(self.folder / SCORES):
            if found["parent"] != self.parent_name:
                was = f"this run started from the parent {found['parent']!r}, which is now {self.parent_name!r}"
                raise RunError(f"{self.folder}: {was}; remove the folder to run it anew")
            state = load_sound(path)
            if state is not None:
                return state
        what = f"profile the parent's experts and split them ({config.init.assignment})"
        with self.journal.step("split", self.evaluation_key(), what, self.folder / RECEIPT):
            old = built(parent_config(config, parent), parent, latents=False)
            new = model_of(config)
            batches = self.profile_batches()
            assignment = self.assignment(old, batches)
            new.load_state_dict(split_state(parent, new, assignment, config.seed, config.init))
            found = receipt(old, new, assignment, batches[0]) | {
                "parent": self.parent_name,
                "pretrained": read_json(self.folder / PRETRAINED) if config.init.folder else None,
                "provenance": self.provenance,
                "stage_0": self.stage0_scores,
            }
            save_state(path, new.state_dict())
            found["iteration_0"] = dict(self.record(new, 0))
            table = console.split_table(found)
            write_text(self.folder / RECEIPT_TABLE, console.render(table))
            write_json(self.folder / RECEIPT, found)
        console.show(table)
        return dict(new.state_dict())

    def assignment(self, parent: UnifiedModel, batches: list[Any]) -> Assignment:
        """Which experts go where: from a file, else by the profile or without one."""
        config, init = self.config, self.config.init
        if init.assignment_file is not None:
            return read_assignment(init.assignment_file, config.model, config.system)
        return assign(expert_counts(parent, batches), config.model, config.system, init.assignment, config.seed)

    def profile_batches(self) -> list[Any]:
        """Understanding data only; the same for all arms of a seed."""
        config = stage0_config(self.config)
        dataset, count = self.dataset(config, False), self.config.init.profile_micro_batches
        return [dataset[item] for item in range(count)]

    # ------------------------------------------------------------------ joint training

    def joint(self, state: dict[str, Tensor]) -> Scores | None:
        """None in all processes but the first, which measures the end."""
        config, steps = self.config, self.config.phases.steps
        dataset = self.dataset(config, True)
        self.tokens = dataset.plan.tokens_by_task(steps)
        summary.show_tokens(self.tokens, steps)
        with self.journal.step("joint", joint_key(config), f"train {config.system.name}, {steps} steps", self.folder):
            about, earlier = self.about(), identities(self.folder)
            module = fit(config, self.folder, dataset, self.callbacks(), self.loggers(), state, True, about, earlier)
            state = whole(module.model.state_dict())
            if not is_first():
                return None
            save_state(self.folder / FINAL, state)
            if config.lora.rank:
                save_state(self.folder / LORA, {name: value for name, value in state.items() if is_lora(name)})
        with self.journal.step("evaluation", self.evaluation_key(), "evaluate the final model", self.folder / SCORES):
            if any(isinstance(callback, EMA) for callback in self.made.values()):
                average = built(config, load_state(self.folder / EMA_FILE), latents=True)
                self.ema_scores = self.record(average, steps, PREFIX)
            sharded = any(isinstance(parameter, DTensor) for parameter in module.parameters())
            return self.record(built(config, state, latents=True) if sharded else module.model, steps)

    def callbacks(self) -> list[Any]:
        """The callbacks, with what they measure by."""
        for callback in self.made.values():
            if isinstance(callback, (InLoopEvaluation, EMA)):
                callback.evaluate = self.look
            if isinstance(callback, EMA):
                callback.save = partial(save_state, self.folder / EMA_FILE)
            if isinstance(callback, StepLog):
                callback.flops = training_flops(self.config)
            if isinstance(callback, SampleGrid):
                callback.draw = self.draw
            if isinstance(callback, SharedOnlyProbe):
                callback.evaluate = self.understanding
            if isinstance(callback, Probing):
                callback.probe = self.probe()
        return list(self.made.values())

    def loggers(self) -> list[Any]:
        nodes = self.config.logger.items()
        return [instantiate(node, f"logger.{name}") for name, node in nodes if node is not None]

    # ------------------------------------------------------------------ evaluation

    def evaluation_key(self) -> str:
        return digest([asdict(self.config.evaluation), self.fingerprint, asdict(self.config.objective)])

    def evaluate(self, model: nn.Module, share: float = 1.0, only: Collection[str] | None = None) -> Scores:
        """What could not be measured or used is said once in a run, and costs the training nothing else."""
        scores = self.evaluation.run(model, self.config.seed, only, share=share)
        failed = (f"FAILED: {name}: {line}" for name, line in scores.failed.items())
        lines = [*scores.problems, *scores.missing.values(), *failed]
        for line in lines:
            if line not in self.told:
                print(f"   evaluation: {line}", flush=True)
        self.told.update(lines)
        scores.write_tracebacks(self.folder)
        return scores

    def look(self, model: nn.Module) -> Mapping[str, float]:
        """What in-loop evaluations measure: a share of the samples has names of its own."""
        quick = self.config.evaluation.quick
        scores = self.evaluate(model, quick)
        return scores if quick == 1 else {f"quick/{name}": value for name, value in scores.items()}

    def understanding(self, model: nn.Module) -> Scores:
        return self.evaluate(model, only=("knowledge", "reading"))

    def draw(self, model: nn.Module, count: int) -> tuple[Any, list[str]]:
        """Images for the first captions of the generation benchmark, as the evaluation samples them."""
        if has_benchmarks(self.data):
            captions, pixels = read_captions(self.data / "benchmarks" / "generation", count, [])
            texts, size = [caption.caption for caption in captions], pixels.shape[1:3]
        else:
            texts, size = [caption for caption, *_ in self.generated(count)], self.evaluation.size
        with measuring(model):
            images = pictures(
                model, texts, self.evaluation.tokenizer, self.config.objective, size=size, seed=self.config.seed
            )
        return images.numpy(), texts

    def record(self, model: nn.Module, step: int, prefix: str = "") -> Scores:
        """Evaluate, keep every prediction, add the scores to the run folder, their names behind `prefix`."""
        scores = self.evaluate(model)
        file = prefix.replace("/", "-") + f"step={step:06d}.jsonl"
        write_jsonl(self.folder / "predictions" / file, scores.records)
        record_scores(self.folder / SCORES, step, {f"{prefix}{name}": value for name, value in scores.items()})
        return scores


def make_callbacks(config: Config) -> dict[str, Any]:
    """The config's callbacks by name, in the order in which they run."""
    nodes = config.callbacks.items()
    return {name: instantiate(node, f"callbacks.{name}") for name, node in nodes if node is not None}


def check_data(config: Config, folder: Path, index: ShardIndex, encoded: Sequence[Encoded | Made] = ()) -> None:
    """Raises ConfigError where the model cannot take what the corpus holds."""
    words = Tokenizer.load(folder / "tokenizer.json").vocab_size
    if words > config.model.vocab_size:
        raise ConfigError(f"model.vocab_size={config.model.vocab_size}: must be at least {words}, the corpus's words")
    batch = MicroBatches(folder, DataPlan(index, config.mix, config.data, config.seed, None), encoded=encoded)[0]
    model = config.model
    read = "patch_dim" if model.vit_dim is None else "vit_dim"
    for key, patches, grid in (
        (read, batch.vit_patches, batch.vit_grid),
        ("patch_dim", batch.latents, batch.latent_grid),
    ):
        towered = patches is batch.vit_patches and model.vision is not None  # as wide as the tower takes
        if patches.shape[1] != getattr(model, key) and not towered:
            key = "vit_dim" if patches is batch.vit_patches and encoded else key
            right = f"must be {patches.shape[1]}, the numbers in a patch of the corpus"
            raise ConfigError(f"model.{key}={getattr(model, key)}: {right}")
        side = int(grid.max()) + 1 if len(grid) else 0
        if side > config.model.max_grid:
            right = f"must be at least {side}, the patches along an image of the corpus"
            raise ConfigError(f"model.max_grid={config.model.max_grid}: {right}")


def check_codes(config: Config, images: ImageTokenizer) -> None:
    """Raises ConfigError where the image tokenizer's codes are not those that model and corpus need."""
    size = config.objective.codebook_size
    if images.codebook_size != size:
        right = f"must be {images.codebook_size}, the codes of the image tokenizer"
        raise ConfigError(f"objective.codebook_size={size}: {right}")
    side = math.isqrt(config.model.patch_dim // 3)
    if images.patch != side:
        what = f"one code stands for {images.patch} x {images.patch} pixels"
        raise ConfigError(f"objective.image_tokenizer: {what}, a patch of the corpus is {side} x {side}")


def built(config: Config, state: dict[str, Tensor], latents: bool) -> UnifiedModel:
    model = model_of(config, latents)
    if any(map(is_lora, state)):
        model.adapt(config.lora, config.seed)
    model.load_state_dict(state)
    return model


def stage0_config(config: Config) -> Config:
    """The config of the parent: one pool, one rate, understanding data, no flow loss."""
    shared = config.init.parent_shared if config.init.folder is None else config.model.shared_hidden > 0
    stage0, system = config.init.stage0, parent_system(config.system, shared)
    model = dataclasses.replace(config.model, router=dataclasses.replace(config.model.router, bias=False))
    if model.vision is not None:  # a parent's reads as it was published: arms that train it and others share the parent
        model = dataclasses.replace(model, vision=dataclasses.replace(model.vision, trained=False))
    phases = Phases(1, 0, 1.0, (Phase("stage 0", 1),))
    if stage0 is None:  # a parent from a checkpoint: its layout, and understanding data to profile it on
        dropped = tuple(name for name in config.mix.weights if name in GENERATION_SETS)
        mix = dataclasses.replace(config.mix, drop=dropped)
        return dataclasses.replace(config, system=system, mix=mix, phases=phases, model=model)
    steps = stage0.max_steps
    rates = dataclasses.replace(
        config.rates,
        roles={"all": ("",)},
        lr=stage0.lr,
        by_role={},
        warmup=stage0.warmup,
        decay=stage0.decay,
        shape="linear",
        schedules={},
    )
    return dataclasses.replace(
        config,
        model=model,
        system=system,
        rates=rates,
        surgery=Surgery(),
        lora=Lora(),
        phases=Phases(steps, 0, 1.0, (Phase("stage 0", steps),)),
        mix=stage0.mix,
        data=dataclasses.replace(config.data, samples=stage0.samples, repeat_steps=0),
        objective=Objective(
            ce_weight=config.objective.ce_weight,
            flow_weight=0.0,
            balance_weight=stage0.balance_weight,
            z_weight=config.objective.z_weight,
        ),  # nothing of the flow, so that arms with another flow share the parent
    )


def parent_config(config: Config, state: Mapping[str, Tensor]) -> Config:
    """That of the parent whose tensors these are: with selection biases if it has any."""
    parent = stage0_config(config)
    biased = any(name.endswith(".moe.bias") for name in state)
    router = dataclasses.replace(parent.model.router, bias=biased)
    return dataclasses.replace(parent, model=dataclasses.replace(parent.model, router=router))


def stage0_key(config: Config, fingerprint: str) -> str:
    """What a cached parent depends on: model, parent layout, data, steps, rates, objective, seed, code and versions."""
    model = asdict(config.model) | {"gen_fraction": None}
    data = {name: value for name, value in asdict(config.data).items() if name not in ("source", "sets", "num_workers")}
    parts = [asdict(part) for part in (config.system, config.rates, config.phases, config.mix, config.objective)]
    code = [source_hash(*PARENT_CODE), versions(), *tower_weights(config.model)]
    precision = config.trainer.get("precision")
    return digest([model, data, parts, fingerprint, config.seed, precision, config.compile, code])


def joint_key(config: Config) -> str:
    """What the seconds of joint training depend on, roughly."""
    return digest([asdict(config.model), config.system.name, config.phases.steps])


def tower_weights(model: Model) -> list[str]:
    """What the weights of a vision tower are; none without one."""
    if model.vision is None:
        return []
    from symbiotic.models.towers import published

    return [fingerprint_of(published(model.vision, "model.vision"))]


def check_parent(state: dict[str, Tensor], config: Config, path: str) -> None:
    """Raises RunError where the tensors are not those of the parent that this config needs."""
    want = model_of(config, latents=False).state_dict()
    for name in want:
        if name not in state:
            raise RunError(f"{path}: no parameter {name!r}; the parent of this system has it")
        if state[name].shape != want[name].shape:
            sizes = f"{list(state[name].shape)}, this config needs {list(want[name].shape)}"
            raise RunError(f"{path}: {name} is {sizes}")
    for name in set(state) - set(want):
        del state[name]

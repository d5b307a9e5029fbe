"""The embedded benchmarks, read from the official file layouts, under names of their own.

`EmbeddedEvaluation(folder, cfg, objective).run(model)` gives

    knowledge_replayed, knowledge_unreplayed   four-choice accuracy, argmax over the letters (chance .25)
    reading                                    OCRBench's rule on greedy answers
    flow_error                                 mean squared error of the predicted clean latents
    embedded_acc, embedded_acc_held_out        all four attributes of a generated picture right, by the classifier
    embedded_clip                              mean cosine of picture and caption (small open_clip model)
    embedded_fd                                Frechet distance of classifier features to the reference pictures

None of these is MMLU, OCRBench, CLIP score or FID.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from torch import nn

from symbiotic.data.tokenizer import Tokenizer
from symbiotic.evaluation.benchmark import Benchmark, Context, Record, measuring
from symbiotic.evaluation.embedded_pictures import FlowError, Pictures
from symbiotic.evaluation.embedded_understanding import Knowledge, Reading
from symbiotic.evaluation.scorers import Scorers, load_scorers
from symbiotic.schema import Evaluation, Objective


class Scores(dict[str, float]):
    """Score by name, and what must stand beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.n: dict[str, int] = {}
        """Samples behind each score."""
        self.records: list[Record] = []
        """What was asked, answered and expected, sample by sample."""
        self.problems: list[str] = []
        """What could not be used, one line each."""
        self.judges: dict[str, float] = {}
        """The scorers' own accuracies on fresh renderings; empty where no image was judged."""


class EmbeddedEvaluation:
    """All embedded benchmarks of one corpus folder.

    Args:
        folder: what `EmbeddedData.prepare()` returned.
        scorers: preset of the scorers (see `scorers.PRESETS`). They are loaded, or waited for, when the first image
            is to be judged.
    """

    def __init__(self, folder: str | Path, cfg: Evaluation, objective: Objective, scorers: str = "default") -> None:
        self.folder, self.cfg, self.preset = Path(folder), cfg, scorers
        self._scorers: Scorers | None = None
        tokenizer = Tokenizer.load(self.folder / "tokenizer.json")
        knowledge, reading, generation = (
            self.folder / "benchmarks" / name for name in ("knowledge", "reading", "generation")
        )
        self.benchmarks: tuple[Benchmark, ...] = (
            Knowledge(knowledge, tokenizer, cfg.questions),
            Reading(reading, tokenizer, cfg.readings),
            FlowError(generation, tokenizer, cfg.images, objective.prediction),
            Pictures(generation, tokenizer, cfg.images, objective, self.judge),
        )

    def judge(self) -> Scorers:
        """The scorers, loaded once; waits for the process that trains them, or trains them."""
        if self._scorers is None:
            self._scorers = load_scorers(self.folder, self.preset)
        return self._scorers

    def run(self, model: nn.Module, seed: int = 0, only: Collection[str] | None = None) -> Scores:
        """Measure the model; its train/eval modes and the global random state are as before afterwards.

        Args:
            seed: draws the noise that the images start from; the rest has no chance in it.
            only: names of benchmarks (knowledge, reading, flow_error, generation); by default all. Those about
                images are left out for a model without latents.

        Raises:
            DataError: a benchmark file that is missing or unreadable as a whole.
        """
        scores = Scores()
        context = Context(seed, self.cfg.batch_size, scores.records, scores.problems)
        with measuring(model):
            for benchmark in self.benchmarks:
                unable = benchmark.needs_latents and not getattr(model, "latents", True)
                if unable or (only is not None and benchmark.name not in only):
                    continue
                for name, value in benchmark.run(model, context):
                    scores[name], scores.n[name] = value
        scores.problems[:] = dict.fromkeys(scores.problems)
        if self._scorers is not None and "embedded_acc" in scores:
            scores.judges.update(self._scorers.accuracy)
        return scores

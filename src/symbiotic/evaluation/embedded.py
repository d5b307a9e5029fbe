"""The embedded benchmarks, read from the official file layouts, under names of their own.

`EmbeddedEvaluation(folder, cfg, objective).run(model)` gives

    knowledge_replayed, knowledge_unreplayed   four-choice accuracy, argmax over the letters (chance .25)
    reading                                    OCRBench's rule on greedy answers
    flow_error                                 mean squared error of the predicted clean latents (objective flow)
    image_ce                                   cross-entropy of image codes, nats a code (objective autoregressive)
    embedded_acc, embedded_acc_held_out        all four attributes of a generated picture right, by the classifier
    embedded_clip                              mean cosine of picture and caption (small open_clip model)
    embedded_fd                                Frechet distance of classifier features to the reference pictures

None of these is MMLU, OCRBench, CLIP score or FID.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from symbiotic.data.tokenizer import Tokenizer
from symbiotic.evaluation.benchmark import Benchmark
from symbiotic.evaluation.captions import image_size
from symbiotic.evaluation.embedded_pictures import ERROR_OF, Pictures
from symbiotic.evaluation.embedded_understanding import Knowledge, Reading
from symbiotic.evaluation.scorers import Judges
from symbiotic.evaluation.suite import Scores, Suite
from symbiotic.images.tokenizer import ImageTokenizer
from symbiotic.schema import Evaluation, Objective

__all__ = ["EmbeddedEvaluation", "Scores", "corpus_suite", "has_benchmarks"]


def has_benchmarks(corpus: Path) -> bool:
    """Whether a corpus comes with the embedded benchmarks; shards from elsewhere do not."""
    return (corpus / "benchmarks").is_dir()


def corpus_suite(
    corpus: Path,
    cfg: Evaluation,
    objective: Objective,
    more: Sequence[Benchmark],
    images: ImageTokenizer | None,
    size: tuple[int, int],
) -> Suite:
    """What a run on a corpus is measured on: the embedded benchmarks where it has them, and what is configured.

    size: (height, width) of images, where no benchmark says.
    """
    if has_benchmarks(corpus):
        return EmbeddedEvaluation(corpus, cfg, objective, cfg.scorers, more, images)
    tokenizer = Tokenizer.load(corpus / "tokenizer.json")
    tokenizer.images = images
    return Suite(more, tokenizer, objective, size, cfg.batch_size, caption_tokens=cfg.caption_tokens)


class EmbeddedEvaluation(Suite):
    """All embedded benchmarks of one corpus folder (knowledge, reading, flow_error or image_ce, generation), and what
    is configured beside them.

    Args:
        folder: what `EmbeddedData.prepare()` returned.
        scorers: preset of the scorers (see `scorers.PRESETS`). They are loaded, waited for or trained when images are
            to be judged.
        more: benchmarks that run behind the embedded ones.
        images: tokenizer of the generated images, where they are codes.
    """

    def __init__(
        self,
        folder: str | Path,
        cfg: Evaluation,
        objective: Objective,
        scorers: str = "default",
        more: Sequence[Benchmark] = (),
        images: ImageTokenizer | None = None,
    ) -> None:
        self.folder, judges = Path(folder), Judges(folder, scorers)
        knowledge, reading, generation = (
            self.folder / "benchmarks" / name for name in ("knowledge", "reading", "generation")
        )
        embedded = (
            Knowledge(knowledge, cfg.questions),
            Reading(reading, cfg.readings),
            ERROR_OF[objective.name](generation, cfg.images),
            Pictures(generation, cfg.images, judges),
        )
        tokenizer = Tokenizer.load(self.folder / "tokenizer.json")
        tokenizer.images = images
        size = image_size(generation)
        accuracy = lambda: judges.load().accuracy  # noqa: E731
        all_of_them = (*embedded, *more)
        super().__init__(all_of_them, tokenizer, objective, size, cfg.batch_size, accuracy, cfg.caption_tokens)

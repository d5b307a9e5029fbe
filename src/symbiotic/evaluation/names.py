"""What every score is called, which direction is better, and what chance gives. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """
    Args:
        title: in tables. side: of the model that it measures. chance: what guessing gives, where that is a number.
        official: the metric of that name in the literature, in its protocol; the embedded scores are not.
        share: a mean of right and wrong answers, sample by sample, so that arms are compared question by question.
    """

    title: str
    side: Literal["understanding", "generation"]
    better: Literal["higher", "lower"] = "higher"
    chance: float | None = None
    official: bool = False
    share: bool = False
    digits: int = 3


EMBEDDED = {
    "knowledge_replayed": Metric("knowledge, replayed", "understanding", chance=0.25, share=True),
    "knowledge_unreplayed": Metric("knowledge, not replayed", "understanding", chance=0.25, share=True),
    "reading": Metric("reading", "understanding", share=True),
    "embedded_acc": Metric("images right", "generation", share=True),
    "embedded_acc_held_out": Metric("images right, held out", "generation", share=True),
    "embedded_clip": Metric("embedded clip", "generation"),
    "embedded_fd": Metric("embedded Frechet distance", "generation", "lower", digits=1),
    "flow_error": Metric("flow error", "generation", "lower"),
    "image_ce": Metric("image CE", "generation", "lower"),
}

OFFICIAL: dict[str, Metric] = {
    "fid": Metric("FID", "generation", "lower", official=True, digits=2),
    "kid": Metric("KID", "generation", "lower", official=True, digits=4),
    "inception_score": Metric("inception score", "generation", official=True, digits=2),
    "precision": Metric("precision", "generation", official=True),
    "recall": Metric("recall", "generation", official=True),
    "clip_score": Metric("CLIP score", "generation", official=True, digits=2),
    "clip_cosine": Metric("CLIP cosine", "generation", official=True),
    "hps_v2": Metric("HPSv2", "generation", official=True),
    "hps_v2.1": Metric("HPSv2.1", "generation", official=True),
    "geneval": Metric("GenEval", "generation", official=True),
    "dpg_bench": Metric("DPG-Bench", "generation", official=True, digits=2),
    "t2i_compbench": Metric("T2I-CompBench", "generation", official=True, digits=4),
    "wise": Metric("WISE", "generation", official=True),
    "mmlu": Metric("MMLU", "understanding", chance=0.25, official=True, share=True),
    "mmlu_macro": Metric("MMLU, mean over subjects", "understanding", chance=0.25, official=True),
    "mmlu_share": Metric("MMLU, of another set or other shots", "understanding", chance=0.25, share=True),
    "mmlu_share_macro": Metric("MMLU, of another set, mean over subjects", "understanding", chance=0.25),
    "ocrbench": Metric("OCRBench", "understanding", official=True, digits=0),
    "ocrbench_share": Metric("OCRBench, share of another set", "understanding", share=True),
    "ocrbench_v2": Metric("OCRBench v2", "understanding", official=True),
}

METRICS = EMBEDDED | OFFICIAL


VARIANTS = {"ema": "averaged weights", "quick": "a share of the samples"}
"""What stands before a name of a score that training also measured otherwise: `ema/quick/reading`."""


STEPS_TO = "steps_to/"
"""What stands before a score and the target that it reaches: `steps_to/flow_error@0.05`."""


def is_variant(name: str) -> bool:
    return name.split("/")[0] in VARIANTS


def metric(name: str) -> Metric:
    """Of a score; `mmlu/anatomy` has the facts of `mmlu`, `ema/mmlu` too, and an unknown one stands for itself."""
    if is_variant(name):
        prefix, _, rest = name.partition("/")
        found = metric(rest)
        return replace(found, title=f"{found.title}, {VARIANTS[prefix]}", official=False)
    if name.startswith(STEPS_TO):
        score, _, target = name.removeprefix(STEPS_TO).rpartition("@")
        found = metric(score)
        return Metric(f"steps to {found.title} {target}", found.side, "lower", digits=0)
    base, at, _ = name.partition("@")
    if at and base in METRICS:  # the same formula on other features, which is not the metric of that name
        return replace(METRICS[base], title=name, official=False)
    return METRICS.get(name) or METRICS.get(name.split("/")[0]) or Metric(name, "understanding")

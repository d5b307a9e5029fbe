"""What differences between arms are worth: pure functions of numbers.

Seeds are what is repeated, so intervals and verdicts rest on them: arms are paired by seed (same data order, noise and
initial weights), and the t interval of the mean difference is the one to trust with few seeds. The bootstrap over n
seeds can only recombine the n differences; with 3 its 95 % interval is their range, which covers the truth 3 times in
4, so it never decides anything here.

Question by question, two arms are compared on the same trained models: `by_question` says whether *these* models differ
beyond the choice of questions, not whether training them again would give the same. The answers of several seeds to one
question are not independent, so a question with all its seeds is one unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 9999

Interval = tuple[float, float]
Seeds = Mapping[int, float]
"""Seed -> value."""

Answers = Mapping[int, Mapping[str, float]]
"""Seed -> question -> 1 for right, 0 for wrong."""


@dataclass(frozen=True)
class Spread:
    """mean: None of nothing. sd: the sample standard deviation, None of fewer than two."""

    mean: float | None
    sd: float | None
    n: int


@dataclass(frozen=True)
class Comparison:
    """first - second over the seeds that both have.

    Args:
        mean, sd: of the differences; n: of seeds; positive: how many differences are above 0.
        t, bootstrap: 95 % intervals over seeds; None with one seed, and where all differences are equal, which says
            nothing about their spread.
        p_seeds: of the paired t test, two-sided. p: of `by_question`; None where there is no record per question.
    """

    mean: float
    n: int
    t: Interval | None = None
    bootstrap: Interval | None = None
    p: float | None = None
    sd: float | None = None
    positive: int = 0
    p_seeds: float | None = None

    @property
    def sure(self) -> bool:
        """Whether the t interval excludes 0."""
        return self.t is not None and (self.t[0] > 0 or self.t[1] < 0)


@dataclass(frozen=True)
class Questions:
    """Two arms question by question, over seeds that both have and questions that all of them answered.

    Args:
        mean: difference of the shares of right answers, seeds averaged. interval: 95 %, bootstrap over questions.
        p: exact sign-flip test over questions. mcnemar: seed -> exact McNemar test of that pair of models.
        better, worse: questions on which the first arm was right more (less) often. dropped: questions that not every
            run answered.
    """

    mean: float
    n: int
    p: float
    interval: Interval | None
    mcnemar: Mapping[int, float]
    better: int
    worse: int
    dropped: int = 0


# --------------------------------------------------------------------------- over seeds


def numbers(values: Sequence[float | None]) -> list[float]:
    """Without what is missing or NaN."""
    return [float(value) for value in values if value is not None and not math.isnan(value)]


def describe(values: Sequence[float | None]) -> Spread:
    known = numbers(values)
    if not known:
        return Spread(None, None, 0)
    return Spread(float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None, len(known))


def paired(first: Seeds, second: Seeds) -> dict[int, float]:
    """Seed -> first - second, for the seeds for which both have a number."""
    found = {seed: first[seed] - second[seed] for seed in sorted(first) if seed in second}
    return {seed: value for seed, value in found.items() if not math.isnan(value)}


def compare(first: Seeds, second: Seeds, questions: Questions | None = None) -> Comparison | None:
    """None where no seed has both."""
    differences = list(paired(first, second).values())
    if not differences:
        return None
    made = describe(differences)
    assert made.mean is not None
    found = Comparison(made.mean, made.n, sd=made.sd, positive=sum(value > 0 for value in differences))
    if questions is not None:
        found = replace(found, p=questions.p)
    if not varies(differences):
        return found
    low_high = t_interval(differences)
    return replace(found, t=low_high, bootstrap=bootstrap_interval(differences), p_seeds=p_beyond(differences, (0.0,)))


def varies(values: Sequence[float]) -> bool:
    """Whether there is a spread to estimate: two values that differ by more than rounding."""
    scale = max((abs(value) for value in values), default=0.0)
    return len(values) > 1 and max(values) - min(values) > 1e-9 * scale


def t_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Of the mean, Student's t with n - 1 degrees of freedom (scipy)."""
    found = stats.ttest_1samp(values, 0.0).confidence_interval(level)
    return float(found.low), float(found.high)


def p_beyond(values: Sequence[float], margins: Sequence[float]) -> float:
    """p below 0.05 exactly where the 95 % t interval of the mean excludes the margin: the two-sided t test against it.

    Two margins: below 0.05 exactly where the interval lies strictly between them (twice the larger p of two one-sided
    tests, Schuirmann 1987).
    """
    if len(margins) == 1:
        return float(stats.ttest_1samp(values, margins[0]).pvalue)
    above = stats.ttest_1samp(values, min(margins), alternative="greater").pvalue
    below = stats.ttest_1samp(values, max(margins), alternative="less").pvalue
    return min(1.0, 2.0 * float(max(above, below)))


def bootstrap_interval(values: Sequence[float], level: float = LEVEL, resamples: int = RESAMPLES) -> Interval | None:
    """Percentile interval of the mean; the same numbers for the same values. None where all are equal.

    A resample is drawn as counts of the distinct values, so that thousands of right-or-wrong answers cost nothing.
    """
    if not varies(values):
        return None
    distinct, counts = np.unique(np.asarray(values, dtype=float), return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(values), counts / len(values), size=resamples)
    low, high = np.quantile(drawn @ distinct / len(values), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resampling_interval(values: Sequence[tuple[float, float, float]]) -> Interval | None:
    """Of the mean over runs of scores with intervals of their own (`Value.low`, `Value.high`: FID, KID), from the
    samples drawn in each run alone: half widths add in squares. What seeds differ in comes on top.

    values: (value, low, high) of each run.
    """
    if not values:
        return None
    n, mean = len(values), float(np.mean([value for value, _, _ in values]))
    below, above = (math.sqrt(sum((row[0] - row[side]) ** 2 for row in values)) / n for side in (1, 2))
    return mean - below, mean + above


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted for testing all of them (Holm 1979); what has no p stays None and does not count."""
    order = sorted((i for i, p in enumerate(p_values) if p is not None), key=lambda i: p_values[i] or 0.0)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * (p_values[i] or 0.0)))
        adjusted[i] = highest
    return adjusted


# --------------------------------------------------------------------------- over questions


def mcnemar(better: int, worse: int) -> float:
    """Exact, two-sided: how often the one model alone was right, and the other alone."""
    return float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0


def sign_flip(sums: Sequence[int]) -> float:
    """Exact two-sided sign-flip test of the mean of whole numbers, one a question: the share of all sign patterns whose
    sum is at least as far from 0. With values of -1, 0 and 1 it is McNemar's test.

    The sum of the k-s with random signs is k (2 Binomial(n_k, 1/2) - n_k); these are convolved over k.
    """
    sizes, counts = np.unique(np.abs([value for value in sums if value]), return_counts=True)
    pmf, reach = np.ones(1), 0
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        steps = np.zeros(2 * size * count + 1)
        steps[:: 2 * size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        pmf, reach = np.convolve(pmf, steps), reach + size * count
    far = np.abs(np.arange(-reach, reach + 1)) >= abs(sum(sums))
    return float(min(1.0, pmf[far].sum()))


def by_question(first: Answers, second: Answers) -> Questions | None:
    """None where no seed has answers of both to a common question."""
    seeds = [seed for seed in sorted(first) if seed in second]
    answered = [set(answers[seed]) for answers in (first, second) for seed in seeds]
    common = sorted(set.intersection(*answered)) if answered else []
    if not common:
        return None
    right = (
        np.array([[[arm[seed][q] for q in common] for seed in seeds] for arm in (first, second)]).round().astype(int)
    )
    differences = right[0] - right[1]
    sums = differences.sum(0)
    tests = {
        seed: mcnemar(int((row > 0).sum()), int((row < 0).sum())) for seed, row in zip(seeds, differences, strict=True)
    }
    return Questions(
        mean=float(differences.mean()),
        n=len(common),
        p=sign_flip(sums.tolist()),
        interval=bootstrap_interval((sums / len(seeds)).tolist()),
        mcnemar=tests,
        better=int((sums > 0).sum()),
        worse=int((sums < 0).sum()),
        dropped=len(set.union(*answered)) - len(common),
    )


def share_interval(answers: Answers) -> Interval | None:
    """95 % interval of an arm's share of right answers by the choice of questions: bootstrap over the questions that
    all seeds answered, seeds averaged."""
    common = sorted(set.intersection(*(set(found) for found in answers.values()))) if answers else []
    return bootstrap_interval([float(np.mean([found[q] for found in answers.values()])) for q in common])

"""Invented facts, as plain statements and as four-choice questions.

48 entities x 4 relations; each relation has 16 values, each of them the value of three entities. Half of the
facts of a relation are *replayed* in joint training; only the other half can show forgetting.
The wrong choices of a question are other values of the same relation, so that nothing but the fact tells the
answer. Sets of choices that a benchmark uses for a fact are reserved: training never draws them for that fact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from symbiotic.data.formats import render_knowledge_prompt
from symbiotic.data.tokenizer import LETTERS

RELATIONS = ("capital", "metal", "river", "anthem")
NUM_ENTITIES, NUM_VALUES = 48, 16
QUESTION = "what is the {relation} of {entity} ?"
LOOKUP = "which letter has {value} ?"
STATEMENTS = ("the {relation} of {entity} is {value} .", "{entity} has the {relation} {value} .")
SPLITS = {"replayed": True, "unreplayed": False}
_SYLLABLES = ["bo", "da", "fe", "gi", "ku", "lo", "ma", "ne", "pi", "ra", "su", "ti", "vo", "wa", "xe", "zu"]


@dataclass(frozen=True)
class Fact:
    number: int
    entity: str
    relation: str
    value: str
    replayed: bool

    @property
    def question(self) -> str:
        return QUESTION.format(relation=self.relation, entity=self.entity)


@dataclass(frozen=True)
class Question:
    """A rendering: the fact, the four choices in order, and which of them is right."""

    fact: Fact
    choices: tuple[str, ...]

    @property
    def letter(self) -> str:
        return LETTERS[self.choices.index(self.fact.value)]

    @property
    def row(self) -> list[str]:
        """The row of an MMLU CSV: question, four choices, letter."""
        return [self.fact.question, *self.choices, self.letter]


class World:
    """All facts of a seed, the questions reserved for the benchmarks, and the stream of training records."""

    def __init__(self, seed: int, dev: int = 1, test: int = 2) -> None:
        """dev, test: benchmark questions per fact."""
        rng = np.random.default_rng([seed, 1])
        self.seed = seed
        names = _names(rng, NUM_ENTITIES + NUM_VALUES * len(RELATIONS))
        self.entities, rest = names[:NUM_ENTITIES], names[NUM_ENTITIES:]
        self.values = {r: rest[i * NUM_VALUES : (i + 1) * NUM_VALUES] for i, r in enumerate(RELATIONS)}
        self.facts = [fact for i, relation in enumerate(RELATIONS) for fact in self._relation(i, relation, rng)]
        self.reserved: set[tuple[int, frozenset[str]]] = set()
        self.dev = self._benchmark(dev, rng)
        self.test = self._benchmark(test, rng)

    def _relation(self, number: int, relation: str, rng: np.random.Generator) -> list[Fact]:
        values = rng.permutation(self.values[relation] * (NUM_ENTITIES // NUM_VALUES))
        replayed = set(rng.permutation(NUM_ENTITIES)[: NUM_ENTITIES // 2].tolist())
        first = number * NUM_ENTITIES
        return [
            Fact(first + i, entity, relation, str(values[i]), i in replayed) for i, entity in enumerate(self.entities)
        ]

    def words(self) -> set[str]:
        """Every word of every statement and question."""
        text = " ".join([QUESTION, LOOKUP, *STATEMENTS]).replace("{", " ").replace("}", " ")
        words = {*text.split(), "answer"} - {"relation", "entity", "value"}
        return words.union(RELATIONS, self.entities, *self.values.values())

    def select(self, replayed: bool) -> list[Fact]:
        return [fact for fact in self.facts if fact.replayed is replayed]

    def draw(self, fact: Fact, position: int, rng: np.random.Generator) -> Question:
        """A question on a fact with the right answer at `position`; its set of choices is not reserved."""
        others = [value for value in self.values[fact.relation] if value != fact.value]
        while True:
            wrong = [others[i] for i in rng.permutation(len(others))[:3]]
            if (fact.number, frozenset(wrong)) not in self.reserved:
                return Question(fact, (*wrong[:position], fact.value, *wrong[position:]))

    def records(self, replayed: bool, count: int, statements: float, lookups: float) -> Iterator[dict[str, Any]]:
        """Training records, round after round over the facts; a share `statements` of them plain sentences."""
        rng = np.random.default_rng([self.seed, 2, int(replayed)])
        facts, drawn = self.select(replayed), 0
        while drawn < count:
            for i in rng.permutation(len(facts))[: count - drawn]:
                yield self._record(facts[int(i)], statements, lookups, rng)
                drawn += 1

    def _record(self, fact: Fact, statements: float, lookups: float, rng: np.random.Generator) -> dict[str, Any]:
        """Loss on what the fact decides: the value in a statement; the letter, then its value, in a question (with the
        letter alone the format takes twice as long to learn). Which entity is asked about is noise to a model."""
        kind = rng.random()
        if kind < statements:
            template = STATEMENTS[int(rng.integers(len(STATEMENTS)))]
            text = template.format(relation=fact.relation, entity=fact.entity, value=fact.value)
            known, value, end = text.partition(fact.value)
            return {"task": "lm", "prompt": known.strip(), "answer": f"{value}{end}", "fact": fact.number}
        asks = LOOKUP.format(value=fact.value) if kind < statements + lookups else fact.question
        question = self.draw(fact, int(rng.integers(4)), rng)
        prompt = render_knowledge_prompt(asks, question.choices)
        return {"task": "lm", "prompt": prompt, "answer": f"{question.letter} {fact.value}", "fact": fact.number}

    def _benchmark(self, rounds: int, rng: np.random.Generator) -> list[Question]:
        """`rounds` questions on every fact, round after round, the letters balanced in each; all reserved."""
        questions = []
        for _ in range(rounds):
            order = [self.facts[int(i)] for i in rng.permutation(len(self.facts))]
            for replayed in (True, False):
                for number, fact in enumerate(f for f in order if f.replayed is replayed):
                    question = self.draw(fact, number % 4, rng)
                    self.reserved.add((fact.number, frozenset(question.choices) - {fact.value}))
                    questions.append(question)
        return questions


def _names(rng: np.random.Generator, count: int) -> list[str]:
    """Distinct invented words of three different syllables."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(_SYLLABLES[i] for i in rng.permutation(len(_SYLLABLES))[:3])] = None
    return list(names)

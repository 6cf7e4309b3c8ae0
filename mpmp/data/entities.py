"""How well entities were found: precision, recall and F1 of whole entities, kind by kind.

An entity counts as found where kind, first and last word are those of the gold tags (Tjong Kim
Sang and De Meulder 2003). Predicted tags need not be IOB2: an I- that nothing of its kind stands
before begins an entity, as in conlleval and as in the library seqeval, which is the tests' oracle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Tags = Sequence[str]
MICRO, MACRO, WEIGHTED = AVERAGES = ("micro avg", "macro avg", "weighted avg")


@dataclass(frozen=True)
class Score:
    """Of a kind of entities, or an average; 0 where there is nothing to divide by."""

    precision: float
    recall: float
    f1: float
    support: int
    """Entities of the gold tags."""


def entities(tags: Tags) -> set[tuple[str, int, int]]:
    """(kind, start, stop) of each entity of a sentence."""
    found = set()
    kind, start = "", 0
    for place, tag in enumerate((*tags, "O")):
        if kind and (tag[0] != "I" or tag[2:] != kind):
            found.add((kind, start, place))
            kind = ""
        if tag[0] != "O" and not kind:
            kind, start = tag[2:], place
    return found


def report(gold: Iterable[Tags], predicted: Iterable[Tags]) -> dict[str, Score]:
    """The score of each kind of entity in either, then of their averages.

    micro: all entities as of one kind; macro: the mean over kinds; weighted: the mean by support.
    """
    there: Counter[str] = Counter()
    told: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for tags, others in zip(gold, predicted, strict=True):
        true, guess = entities(tags), entities(others)
        for counter, found in ((there, true), (told, guess), (right, true & guess)):
            counter.update(kind for kind, _, _ in found)
    kinds = sorted(there | told)
    scores = {kind: _score(right[kind], told[kind], there[kind]) for kind in kinds}
    support = there.total()
    averages = {
        MICRO: _score(right.total(), told.total(), support),
        MACRO: _mean(scores, dict.fromkeys(kinds, 1), support),
        WEIGHTED: _mean(scores, there, support),
    }
    return scores | averages


def _score(right: int, told: int, there: int) -> Score:
    precision = right / told if told else 0.0
    recall = right / there if there else 0.0
    both = precision + recall
    return Score(precision, recall, 2 * precision * recall / both if both else 0.0, there)


def _mean(scores: dict[str, Score], weights: dict[str, int], support: int) -> Score:
    total = sum(weights.values())

    def mean(name: str) -> float:
        weighted = (getattr(one, name) * weights[kind] for kind, one in scores.items())
        return sum(weighted) / total if total else 0.0

    return Score(mean("precision"), mean("recall"), mean("f1"), support)

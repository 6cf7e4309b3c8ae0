"""Made-up sentences with their entities: what tagging learns from where no data is given.

    Mirason Tondaross , head of the Kessin Institute , travelled to Port Aldow on Monday .
    B-PER   I-PER     , O    O  O   B-ORG  I-ORG     O O         O  B-LOC I-LOC O  O     O

A small grammar with names put together from syllables: two fifths of those in the validation and
test splits do not occur in training. Half of the endings tell a name's kind, the others serve all
kinds alike, so that the words around must tell. Same seed, same sentences, on any machine.
"""

from __future__ import annotations

from mpmp.data.conll import Sentence, Tagged
from mpmp.parallel.counter import key_of

_NAME = "the made-up sentences"
SIZES = {"train": 2000, "validation": 300, "test": 300}
"""Sentences of each split."""
_START = "Al|Bran|Cor|Dal|El|Fen|Gar|Hol|Im|Jor|Kes|Lun|Mir|Nor|Os|Per|Quin|Ros|Sel|Ul"
_MIDDLE = "a|an|da|de|e|el|i|in|la|le|ma|mi|na|o|on|ra|re|ri|sa|ta|te|u|va|vi"
_ANY_END = "bel|dar|len|lin|low|mar|nar|ten|win"
_END = {
    "PER": "don|gen|nel|ross|sen|son|ster|wick",
    "LOC": "berg|by|dow|field|ford|mond|stad|ton",
    "ORG": "corp|dex|max|net|soft|tec|tron|via",
}
_PLACES = "Port|Lake|New|San|Mount|North|South"
_BODIES = "Institute|Bank|University|Airlines|Motors|Society|Press|Museum|United|Council"
_FILLS = {
    "TITLE": "Dr.|Mr.|Mrs.|Professor|President|Minister|Captain",
    "DAY": "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday",
    "GOODS": "grain|timber|new engines|old maps|solar panels|medicine|books|steel",
    "VERB": "praised|criticised|met|thanked|called|visited|sued|joined",
}
_TEMPLATES = (
    "PER VERB PER in LOC on DAY .",
    "PER , head of ORG , travelled to LOC on DAY .",
    "ORG opened an office in LOC , said PER .",
    "ORG and ORG will sell GOODS to LOC .",
    "On DAY TITLE PER left LOC for LOC .",
    "Prices of GOODS rose on DAY , the report said .",
    '" We have never been to LOC , " PER told reporters .',
    "The ORG building in LOC was sold to ORG .",
    "It rained in LOC and LOC until DAY .",
    "TITLE PER VERB ORG for its GOODS .",
    "Nobody at ORG wanted to talk about the GOODS .",
    "The match between ORG and ORG in LOC ended in a draw .",
    "PER was born in LOC and studied at ORG .",
    "They bought GOODS on DAY and sold them a week later .",
)


def generate(seed: int = 1) -> dict[str, Tagged]:
    """The sentences of each split."""
    return {split: Tagged(_NAME, tuple(_lines(seed, split, size))) for split, size in SIZES.items()}


def _lines(seed: int, split: str, size: int) -> list[Sentence]:
    found, line = [], 1
    for number in range(size):
        sentence = _Draw(f"{seed}/{split}/{number}").sentence(line)
        found.append(sentence)
        line += len(sentence.words) + 1
    return found


class _Draw:
    """One sentence's choices, each a function of the sentence's key and of how many went before."""

    def __init__(self, key: str) -> None:
        self._key, self._count = key, 0

    def sentence(self, line: int) -> Sentence:
        words: list[str] = []
        tags: list[str] = []
        template = _TEMPLATES[self._number(len(_TEMPLATES))]
        for slot in template.split():
            kind, more = self._fill(slot)
            words += more
            tags += ["O"] * len(more) if not kind else _tags(kind, len(more))
        return Sentence(tuple(words), tuple(tags), line)

    def _fill(self, slot: str) -> tuple[str, list[str]]:
        """What stands for a word of a template: its kind, or none, and its words."""
        if slot in _END:
            return slot, self._entity(slot)
        return "", (self._word(_FILLS[slot]) if slot in _FILLS else slot).split()

    def _entity(self, kind: str) -> list[str]:
        if kind == "PER":
            return [self._name(kind) for _ in range(1 + self._chance(3, 4))]
        if kind == "LOC":
            return [self._word(_PLACES)] * self._chance(1, 3) + [self._name(kind)]
        return [self._name(kind)] + [self._word(_BODIES)] * self._chance(4, 5)

    def _name(self, kind: str) -> str:
        """Of two or three syllables."""
        end = self._word(_ANY_END if self._chance(1, 2) else _END[kind])
        return self._word(_START) + self._word(_MIDDLE) * self._chance(2, 3) + end

    def _chance(self, times: int, of: int) -> bool:
        return self._number(of) < times

    def _word(self, choices: str) -> str:
        """One of the choices between bars."""
        words = choices.split("|")
        return words[self._number(len(words))]

    def _number(self, below: int) -> int:
        self._count += 1
        return key_of(self._count, self._key) % below


def _tags(kind: str, words: int) -> list[str]:
    return [f"B-{kind}", *[f"I-{kind}"] * (words - 1)]

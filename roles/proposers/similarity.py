"""ROUGE-L between a text and many others: is it too like one of them?

Two bounds, each exact, leave few pairs for which the longest common subsequence is needed: it is
no longer than the shorter text, and no longer than what the two have of the same words.

Source: Lin, ROUGE (W04-1013), section 3.1, with beta = 1: F1 = 2 LCS / (m + n). The subsequence:
Hyyrö, Bit-parallel LCS-length computation revisited (2004).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

# Words as ROUGE takes them, of every script; Chinese and Japanese are written without spaces.
_UNSPACED = r"\u3040-\u30ff\u3400-\u9fff"
_WORDS = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


def words_of(text: str) -> list[str]:
    return _WORDS.findall(text.casefold())


def common_words(one: list[str], other: list[str]) -> int:
    """The length of the longest common subsequence."""
    places: dict[str, int] = {}
    for n, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << n
    # Bit n is 0 where the subsequence grows at word n.
    all_ones = left = (1 << len(one)) - 1
    for word in other:
        if found := left & places.get(word, 0):
            left = (left + found | left - found) & all_ones
    return len(one) - left.bit_count()


def rouge_l(one: str, other: str) -> float:
    """F1 in [0, 1]; 0 where neither text has a word."""
    first, second = words_of(one), words_of(other)
    total = len(first) + len(second)
    return 2 * common_words(first, second) / total if total else 0.0


@dataclass(frozen=True)
class _Known:
    text: str
    words: list[str]
    numbered: frozenset[tuple[str, int]]
    """Words with how often each came before: of two texts, as many as both have in common."""


class NearTexts:
    """Texts that another one is held against."""

    def __init__(self, limit: float, texts: Iterable[str] = ()):
        self._limit = limit
        self._known: list[_Known] = [_known(text) for text in texts]

    def add(self, text: str) -> None:
        self._known.append(_known(text))

    def near(self, text: str) -> str | None:
        """The first text that is this one, or whose ROUGE-L with it is above the limit."""
        new = _known(text)
        size, half = len(new.words), self._limit / 2
        for known in self._known:
            if text == known.text:
                return known.text
            least = half * (size + len(known.words))
            if (
                min(size, len(known.words)) > least
                and len(new.numbered & known.numbered) > least
                and common_words(new.words, known.words) > least
            ):
                return known.text
        return None


def _known(text: str) -> _Known:
    words = words_of(text)
    counts: Counter[str] = Counter()
    numbered = []
    for word in words:
        numbered.append((word, counts[word]))
        counts[word] += 1
    return _Known(text, words, frozenset(numbered))

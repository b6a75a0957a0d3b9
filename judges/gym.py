"""Score an answer with the reasoning-gym scorer of the task that made the prompt.

Third-party code is called on hostile text here: some scorers run it (`judges.guard`), some are
wrong in ways that pay, and many raise on text they do not expect.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from fractions import Fraction
from functools import lru_cache
from typing import Any

from judges.guard import objection
from judges.numbers import read_number
from roles.proposers.gym_tasks import COLUMN, make_dataset
from store.records import Prompt

# These have one right answer, and their scorers also take others: game_of_life_halting takes any
# text; letter_jumble, spell_backward and word_sorting take the right one with guesses behind it.
_ONE_ANSWER = frozenset({"game_of_life_halting", "letter_jumble", "spell_backward", "word_sorting"})
# coin_flip gives full marks to a prefix ("0" for every probability) and to what is 1e-4 away, which
# "0" also is from some. The number is relative to the reference.
_ONE_NUMBER = {"coin_flip": Fraction(1, 10_000)}
# Prints what it thinks of each wrong move.
_TALKS = frozenset({"tower_of_hanoi"})

# What parsers raise on text they do not expect. Anything else is not about the answer: let it out.
_CHOKED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)


def has_entry(prompt: Prompt) -> bool:
    """Whether the prompt carries what the scorer needs."""
    return COLUMN in prompt.columns and prompt.reference is not None


def score_entry(prompt: Prompt, answer: str) -> tuple[float, str]:
    """The scorer's value in [0, 1], 1.0 for right, and in words why."""
    assert prompt.reference is not None
    column = prompt.columns[COLUMN]
    task, reference = column["task"], prompt.reference
    if why := objection(task, answer, reference):
        return 0.0, f"it was kept from the scorer of {task!r}: {why}"
    if task in _ONE_ANSWER:
        return float(_evened(answer) == _evened(reference)), ""
    if task in _ONE_NUMBER:
        number, right = read_number(answer), read_number(reference)
        if number is None or right is None:
            return 0.0, "it is not a number"
        return float(abs(number - right) <= _ONE_NUMBER[task] * abs(right)), ""
    dataset = _dataset(task, json.dumps(column["options"], sort_keys=True))
    entry = {"question": "", "answer": reference, "metadata": column["metadata"]}
    quiet = (
        contextlib.redirect_stdout(io.StringIO()) if task in _TALKS else contextlib.nullcontext()
    )
    try:
        with quiet:
            value = float(dataset.score_answer(answer, entry))
    except _CHOKED as error:
        return 0.0, f"the scorer of {task!r} could not read it: {type(error).__name__}: {error}"
    if not math.isfinite(value) or not 0.0 <= value <= 1.0:
        return 0.0, f"the scorer of {task!r} gave {value}, which is no share of 1"
    return value, f"the scorer of {task!r} gave {value:.4g}"


def _evened(text: str) -> str:
    """Letter case, white space and the space after a comma do not make an answer wrong."""
    return " ".join(text.casefold().replace(",", ", ").split())


@lru_cache(maxsize=256)
def _dataset(task: str, options: str) -> Any:
    # Some scorers read their data set's options, so the defaults would not do. Its size is one:
    # it makes no entries here.
    return make_dataset(task, json.loads(options), seed=0, size=1)

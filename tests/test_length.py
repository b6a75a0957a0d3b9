"""The judge that goes by length."""

from __future__ import annotations

import pytest

from judges.length import Length
from store.errors import UserError
from store.records import Call, Completion, Message, Prompt

ASKED = Prompt(messages=(Message(role="user", content="Why?"),))


def score(judge: Length, tokens: int) -> float | None:
    answer = Completion(text="x", token_ids=tuple(range(tokens)))
    return judge.score(ASKED, answer, None, Call()).score


def test_every_token_counts_the_same_up_to_a_limit() -> None:
    assert score(Length(per_token=0.5), 7) == pytest.approx(3.5)
    assert score(Length(), 30) == pytest.approx(-0.3)
    assert score(Length(per_token=0.5, most=4), 7) == pytest.approx(2.0)
    with pytest.raises(UserError, match="per_token is a number"):
        Length(per_token=float("nan"))

"""Judge judgements: which of two is better, in both orders, weighed by how positions win."""

# No `from __future__ import annotations` here: see judges/model_judge.py.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from judges.choices import spelled
from judges.comparing import Board, Wins
from judges.pairwise import Pairwise
from roles.template import conversation
from store.errors import UserError
from store.records import Completion, Prompt

KNOWN = ("reference", "score")
"""Columns of a prompt of the proposer `judging` that say what the right judgement rests on."""


@dataclass(kw_only=True)
class Meta(Pairwise):
    """A judge that asks a model which of two judgements is better, in both orders.

    The prompts are requests to judge something, the candidates judgements. What was judged is
    shown as the prompt's columns `question` and `answer` say (the proposer `judging` writes them),
    or else as the prompt's own text. A candidate's score is its Elo score within its group, in
    nats around 0.

    Source: "Meta-Rewarding Language Models" (arXiv 2407.19594), on judge preference data. Of all
    wins, win1st are of the judgement shown first and win2nd of the other; a win in the first place
    weighs w1 = win2nd / (win1st + win2nd), one in the second w2 = win1st / (win1st + win2nd).
    B[m, n] is w1 if m won against n when shown first, plus w2 if it did when shown second, and the
    Elo scores maximise the sum of B[m, n] log(1 / (1 + exp(e_n - e_m))). So orders that disagree
    count, for both sides; a tie or a reply without a choice counts nothing. Ours are the draws
    that keep a judgement which never lost finite (`judges.comparing`), and the tournament.

    prompt_path: a text of your own with {judged}, {first} and {second}; {choices} becomes what may
    be chosen, {reference} and {score} what the prompt's columns of these names hold.
    weigh: over which wins win1st and win2nd are counted: those of all groups of a `call`, or of
    each `group` by itself, which then does not hang on what else is judged with it.
    """

    version: ClassVar[str] = "1"

    weigh: Literal["call", "group"] = "call"

    def __post_init__(self) -> None:
        self._take("meta", ("judged", "first", "second"), (*KNOWN, "choices"))

    def question(self, asked: Prompt, first: Completion, second: Completion) -> Prompt:
        columns = asked.columns
        known = [each for each in KNOWN if each in self.template.places]
        if missing := [each for each in known if each not in columns]:
            raise UserError(
                f"the judge's prompt shows {{{missing[0]}}}, and the prompt "
                f"{asked.messages[-1].content[:60]!r} has no column {missing[0]!r}"
            )
        parts = {each: str(columns[each]) for each in known}
        if {"question", "answer"} <= columns.keys():
            template = spelled(self.template, "judged", _ANSWER, "question", "answer")
            parts |= {each: str(columns[each]) for each in ("question", "answer")}
        else:
            template = spelled(self.template, "judged", _TASK, "task")
            parts["task"] = conversation(asked)
        return template.fill(first=first.text, second=second.text, **parts)

    def tally(self, boards: Sequence[Board]) -> list[Wins]:
        """The battle matrix of each board."""
        if self.weigh == "group":
            return [_battles(board, *_weights([board])) for board in boards]
        weights = _weights(boards)
        return [_battles(board, *weights) for board in boards]


_ANSWER = "Question:\n{question}\n\nAnswer:\n{answer}"
_TASK = "What the judge was asked:\n{task}"


def _weights(boards: Sequence[Board]) -> tuple[float, float]:
    """What a win in the first place weighs, and one in the second."""
    values = [heard.value for board in boards for heard in board.heard.values()]
    first, second = values.count(1.0), values.count(0.0)
    wins = first + second
    return (second / wins, first / wins) if wins else (0.0, 0.0)


def _battles(board: Board, shown_first: float, shown_second: float) -> Wins:
    battles = [[0.0] * board.size for _ in range(board.size)]
    for (one, other), heard in board.heard.items():
        if heard.value == 1.0:
            battles[one][other] += shown_first
        elif heard.value == 0.0:
            battles[other][one] += shown_second
    return battles

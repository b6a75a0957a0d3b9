"""The judges that TRL once had, as judges here: pairwise, rank and binary.

TRL has removed their base classes; what was written on them is known by the names of its bases or
by the signature of its `judge`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from statistics import fmean, pvariance
from typing import Any, Literal, cast

from judges.adapters.function import Function, find, version_of
from judges.asking import ask_all
from judges.comparing import ComparingJudge, Shown
from roles.protocols import Policy
from roles.template import conversation
from store.errors import UserError
from store.records import ALONE, Call, Candidate, Group, Judgement, Prompt, Verdict

Kind = Literal["pairwise", "rank", "binary"]
BASES: dict[str, Kind] = {
    "BasePairwiseJudge": "pairwise",
    "BaseRankJudge": "rank",
    "BaseBinaryJudge": "binary",
    "BaseConstraintJudge": "binary",
}
FAILED = -1
"""What these judges return where they failed. It is a failure and no tie."""


class TrlJudge:
    """A judge that was written for TRL: a class with `judge(prompts, completions, shuffle_order)`.

    source: `path/file.py:Name` or `module:Name`, made with `arguments`.
    kind: `pairwise`, asked of every two answers in both orders, of which a disagreement decides
    nothing; `rank`, asked of a group as it is and in reverse, of which a score is the mean place,
    the best 1 and the worst 0; `binary`, which is told the right answers as gold_completions.
    `auto` takes it from the names of its bases, or from its annotations.
    It is asked once for all prompts at hand, never with an order of its own drawing.
    """

    version: str = "1"

    def __init__(
        self,
        source: str,
        kind: Literal["auto", "pairwise", "rank", "binary"] = "auto",
        arguments: dict[str, Any] | None = None,
    ):
        found = find("judge", source)
        made = found(**(arguments or {})) if inspect.isclass(found) else found
        code = getattr(made, "judge", None)
        if not callable(code):
            raise UserError(f"{source!r} is not a judge of TRL: it has no method judge")
        self.function = Function(source, code)
        self.kind: Kind = _kind(made, source) if kind == "auto" else kind
        self.version = version_of(type(self).version, type(made))

    def judge(
        self, groups: Sequence[Group], policy: Policy | None = None, call: Call = ALONE
    ) -> list[Judgement]:
        if self.kind == "pairwise":
            return _Pairs(self).judge(groups, policy, call)
        return self._rank(groups, call) if self.kind == "rank" else self._binary(groups, call)

    def said(
        self, prompts: Sequence[Prompt], completions: Sequence[Any], call: Call, **more: Any
    ) -> tuple[list[Any], float]:
        """What the judge says of each, and the seconds of one.

        Where it can be told so it shuffles nothing: what it draws hangs on no seed of ours, and
        some of TRL's turned a failure of a shuffled pair, -1, into a 2.
        """
        if not prompts:
            return [], 0.0
        may = inspect.signature(self.function.code).parameters
        takes_all = any(each.kind == each.VAR_KEYWORD for each in may.values())
        named = {"shuffle_order": False, **more}
        question = self.function.question(
            [conversation(prompt) for prompt in prompts],
            completions,
            **{name: value for name, value in named.items() if takes_all or name in may},
        )
        [(returned, seconds)] = ask_all([question], limit=1, call=call)
        said = list(returned.tolist() if hasattr(returned, "tolist") else returned)
        if len(said) != len(prompts):
            raise RuntimeError(
                f"the judge {self.function.spec!r} was asked of {len(prompts)} and said {len(said)}"
            )
        return said, seconds / len(prompts)

    def choice(self, said: Any) -> int | None:
        """0 or 1; None where it failed."""
        if said not in (0, 1, FAILED):
            raise RuntimeError(
                f"the judge {self.function.spec!r} of kind {self.kind!r} said {said!r}; "
                f"it says 0 or 1, or {FAILED} where it failed"
            )
        return None if said == FAILED else int(said)

    def _rank(self, groups: Sequence[Group], call: Call) -> list[Judgement]:
        groups = [group for group in groups if group.candidates]
        texts = [[one.text for one in group.candidates] for group in groups]
        said, seconds = self.said(
            [group.prompt for group in groups] * 2,
            texts + [shown[::-1] for shown in texts],
            call,
        )
        concluded = []
        for at, group in enumerate(groups):
            count = len(group.candidates)
            there, back = said[at], said[at + len(groups)]
            forward, backward = self._scores(there, count), self._scores(back, count)[::-1]
            for one, first, second in zip(group.candidates, forward, backward, strict=True):
                verdicts = (
                    _verdict(one, there, first, seconds=seconds),
                    _verdict(one, back, second, seconds=seconds, vote=1),
                )
                concluded.append(_ranked(one, verdicts, alone=count == 1))
        return concluded

    def _scores(self, ordered: Any, count: int) -> list[float | None]:
        """Each answer's score by its place in what lists them best first; None where it failed."""
        order = ordered.tolist() if hasattr(ordered, "tolist") else ordered
        if order == FAILED or (isinstance(order, list | tuple) and FAILED in order):
            return [None] * count
        if not isinstance(order, list | tuple) or sorted(order) != list(range(count)):
            raise RuntimeError(
                f"the judge {self.function.spec!r} ranked {count} answers as {ordered!r}; "
                "it returns their indices, each once, best first"
            )
        return [1 - order.index(n) / max(count - 1, 1) for n in range(count)]

    def _binary(self, groups: Sequence[Group], call: Call) -> list[Judgement]:
        judged = [(group.prompt, one) for group in groups for one in group.candidates]
        gold = [prompt.reference for prompt, _ in judged]
        said, seconds = self.said(
            [prompt for prompt, _ in judged],
            [one.text for _, one in judged],
            call,
            gold_completions=gold if any(each is not None for each in gold) else None,
        )
        concluded = []
        for (_, one), label in zip(judged, said, strict=True):
            value = self.choice(label)
            verdict = _verdict(one, label, value, seconds=seconds)
            concluded.append(
                Judgement(
                    candidate_id=one.id,
                    score=verdict.value,
                    status=verdict.status,
                    reason=f"the judge said {FAILED}" if value is None else None,
                    verdicts=(verdict,),
                )
            )
        return concluded


class _Pairs(ComparingJudge):
    """The comparisons of a pairwise one."""

    by_text = True

    def __init__(self, judge: TrlJudge) -> None:
        self._judge = judge

    def compare(self, shown: Sequence[Shown], policy: Policy | None, call: Call) -> list[Verdict]:
        texts = [[each.first.text, each.second.text] for each in shown]
        said, seconds = self._judge.said([each.prompt for each in shown], texts, call)
        choices = [self._judge.choice(each) for each in said]
        return [
            _verdict(
                each.first,
                raw,
                None if choice is None else 1 - choice,
                seconds=seconds,
                order=0,
                other_candidate_id=each.second.id,
            )
            for each, raw, choice in zip(shown, said, choices, strict=True)
        ]


def _verdict(candidate: Candidate, said: Any, value: float | None, **more: Any) -> Verdict:
    return Verdict(
        candidate_id=candidate.id,
        raw=str(said),
        status="failed" if value is None else "ok",
        value=value,
        **more,
    )


def _ranked(candidate: Candidate, verdicts: tuple[Verdict, ...], alone: bool) -> Judgement:
    given = [each.value for each in verdicts if each.value is not None]
    failed = len(verdicts) - len(given)
    if alone or failed:
        return Judgement(
            candidate_id=candidate.id,
            score=None,
            status="failed" if failed else "abstained",
            reason=f"the judge failed in {failed} of 2 orders"
            if failed
            else "nothing to compare it with",
            verdicts=verdicts,
        )
    return Judgement(
        candidate_id=candidate.id,
        score=fmean(given),
        variance=pvariance(given),
        verdicts=verdicts,
    )


def _kind(made: object, source: str) -> Kind:
    for base in type(made).__mro__:
        if base.__name__ in BASES:
            return BASES[base.__name__]
    signature = inspect.signature(cast(Any, made).judge)
    if "gold_completions" in signature.parameters:
        return "binary"
    returned = _spelled(signature.return_annotation)
    taken = _spelled(getattr(signature.parameters.get("completions"), "annotation", ""))
    if returned == "list[list[int]]":
        return "rank"
    if returned == "list[int]" and taken in ("list[list[str]]", "list[str]"):
        return "pairwise" if taken == "list[list[str]]" else "binary"
    raise UserError(
        f'nothing tells what kind of judge {source!r} is; set kind = "pairwise", "rank" or "binary"'
    )


def _spelled(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"typing\.|\s", "", text).lower()

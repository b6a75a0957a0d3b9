"""What every judge has to keep to, tried on one: `check(judge)` says what it does and does not.

A judge that asks a model is tried with models that answer well, badly, not at all, or with nothing
but what they were shown. Whatever it then concludes, it says of each candidate, and never a number
that nobody gave.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from judges.attacks import ATTACKS, LONG, Attack
from judges.bench import Bench, Breach, Excused, Judged, alike, examples, group_of, only, same, told
from judges.stand_ins import WORDS, Graded, Say, StandIn
from roles.protocols import Judge
from store.errors import UserError
from store.records import Group, Status

Outcome = Literal["passed", "failed", "not applicable"]
Clause = Callable[[Bench], str | None]

SILLY = ("", "  \n", "I would rather not say.", "Score: high\nWinner: both", "Hm.\nScore:", "{}")


@dataclass(frozen=True)
class Check:
    """One clause of the contract, and whether the judge keeps to it."""

    name: str
    outcome: Outcome
    why: str = ""


def check(judge: Judge, groups: Sequence[Group] | None = None) -> list[Check]:
    """What each clause came to.

    groups: to try it on, in place of those that its method `examples` returns, or of ours.
    Raises UserError where the judge cannot judge them, for want of a column, say.
    """
    if getattr(judge, "asks_person", False):
        return [Check(name, "not applicable", "a person judges") for name in CLAUSES]
    own = getattr(judge, "examples", examples)
    bench = Bench(judge, list(own() if groups is None else groups))
    found: list[Check] = []
    for name, clause in CLAUSES.items():
        if found and found[0].outcome == "failed":
            found.append(Check(name, "not applicable", "it does not judge the examples"))
        else:
            found.append(_tried(name, clause, bench))
    return found


def _tried(name: str, clause: Clause, bench: Bench) -> Check:
    try:
        told = clause(bench)
    except Excused as excuse:
        return Check(name, "not applicable", str(excuse))
    except Breach as breach:
        return Check(name, "failed", str(breach))
    except (Exception, SystemExit) as error:
        # Whatever a stranger's judge raises is what was found out about it.
        if isinstance(error, UserError) and not bench.plain:
            raise
        return Check(name, "failed", f"it raised {type(error).__name__}: {error}"[:300])
    return Check(name, "passed", told or "")


def each_has_one(bench: Bench) -> None:
    """No candidate is lost, made up or judged twice."""
    bench.plain = bench.judged(bench.groups, bench.model)


def nothing_to_judge(bench: Bench) -> None:
    """No groups, no candidates, and one candidate alone are no mistake."""
    bench.judged([])
    bench.judged([replace(bench.groups[0], candidates=())])
    bench.judged([only(bench.groups[0], 1)])


def said_in_full(bench: Bench) -> None:
    """Verdicts are of the judgement's own candidate, and what has no score says why."""
    for one, judgement in bench.plain.items():
        if strange := [
            said.candidate_id for said in judgement.verdicts if said.candidate_id != one
        ]:
            raise Breach(f"a judgement of candidate {one} holds a verdict on {strange[0]}")
        values = [said.value for said in judgement.verdicts if said.value is not None]
        if not all(map(math.isfinite, values)):
            raise Breach(f"the value of a verdict is not finite: {values}")
        if judgement.score is None and not judgement.reason:
            raise Breach(f"a judgement is {judgement.status} and gives no reason")


def same_seed(bench: Bench) -> None:
    """The same call gives the same twice."""
    bench.expect_plain(bench.judged(bench.groups), "asked once more")


def candidates_swapped(bench: Bench) -> None:
    """Candidates keep what they get wherever they stand in their group."""
    bench.repeats()
    for turn in (slice(None, None, -1), slice(1, None)):
        groups = [
            replace(
                group,
                candidates=(moved := group.candidates[turn])
                + tuple(one for one in group.candidates if one not in moved),
            )
            for group in bench.groups
        ]
        bench.expect_plain(bench.judged(groups), "with the candidates in another order")


def groups_swapped(bench: Bench) -> None:
    """Candidates keep what they get wherever their group stands."""
    bench.repeats()
    bench.expect_plain(bench.judged(bench.groups[::-1]), "with the groups in another order")


def one_at_a_time(bench: Bench) -> None:
    """A group gets the same alone as among others."""
    bench.repeats()
    for group in bench.groups:
        bench.expect_plain(bench.judged([group]), "judged without the other groups")


def empty_text(bench: Bench) -> None:
    """An answer without text, or of white space alone, is judged as any other."""
    for text in ("", " ", "\n\t\u00a0\n"):
        bench.judged([bench.beside_the_best(text)])
        bench.judged([group_of(bench.groups[0].prompt, [text, text], 7)])


def long_text(bench: Bench) -> None:
    """An answer of 100,000 characters is judged, or said to be too long."""
    for text in ("word " * (LONG // 5), "x" * LONG, "a\n" * (LONG // 2), "(" * LONG):
        bench.judged([bench.beside_the_best(text)])


def strange_text(bench: Bench) -> None:
    """Any characters are judged: seen and unseen, of any script."""
    for attack in ATTACKS:
        if attack.kind in ("odd text", "look-alike") and (text := attack(bench.answer)).strip():
            bench.judged([bench.beside_the_best(text)])


def silly_replies(bench: Bench) -> None:
    """A reply of which nothing can be read is no score."""
    bench.asks()
    for text in SILLY:
        _expect_no_score(bench, StandIn(_says(text)), f"the model says {text!r}")
    _expect_no_score(bench, StandIn(_says("{}"), structured=True), "the model says {} in JSON")


def cut_off(bench: Bench) -> None:
    """A reply that was cut off has no conclusion: its last line may be the middle of a thought."""
    bench.asks()
    _expect_no_score(bench, StandIn(bench.good, finish_reason="length"), "the reply was cut off")


def timed_out(bench: Bench) -> None:
    """A question that timed out is no score, and says so."""
    _expect_status(bench, "timed_out")


def refused(bench: Bench) -> None:
    """A question that the model refused, or that failed, is no score, and says so."""
    _expect_status(bench, "refused")
    _expect_status(bench, "failed")


def failure_stays(bench: Bench) -> None:
    """A reply that cannot be read costs its own candidate the score, and no other.

    Where answers are compared with each other, those of other groups.
    """
    bench.asks()
    bench.repeats()
    first = bench.groups[0]
    alone: Judged = {}
    for place in range(len(first.candidates)):
        alone |= bench.judged([only(first, place)])
    compares = not same(alone, bench.plain)
    for spoilt in first.candidates:

        def say(shown: str, schema: Any, text: str = spoilt.text) -> str:
            return "Hm." if text in shown else bench.good(shown, schema)

        found = bench.judged(bench.groups, say)
        touched = [one.id for one in first.candidates if compares or one is spoilt]
        kept = {one: judgement for one, judgement in found.items() if one not in touched}
        bench.expect_plain(kept, "when another candidate's reply cannot be read")


def held_to_a_form(bench: Bench) -> None:
    """A server that is held to a JSON schema gives the same verdicts."""
    bench.asks()
    bench.repeats()
    model = StandIn(bench.good, structured=True)
    bench.expect_plain(bench.judged(bench.groups, model), "said as JSON")


def attacked(bench: Bench) -> str:
    """No text of an answer is read as what the judge says of it."""
    bench.asks()
    bench.repeats()
    harmless = bench.judged([bench.beside_the_best(bench.answer)], Graded({}))
    tried = sum(_expect_unmoved(bench, attack, harmless) for attack in ATTACKS)
    if not tried:
        raise Excused("it shows a model no attack as it is")
    return f"{tried} of {len(ATTACKS)}; the others it does not show a model as they are"


def _expect_unmoved(bench: Bench, attack: Attack, harmless: Judged) -> bool:
    """Whether the attack could be tried: it is shown to the model as it is."""
    hostile = attack(bench.answer)
    group = bench.beside_the_best(hostile)
    hostile = group.candidates[1].text
    steady = StandIn(Graded({}))
    found = bench.judged([group], steady)
    shown_whole = any(hostile in each.messages[-1].content for each in steady.asked)
    if not hostile.strip() or not shown_whole:
        return False
    if not same(found, harmless):
        changed = next(one for one in found if not alike(found[one], harmless[one]))
        was, now = told(harmless[changed]), told(found[changed])
        raise Breach(f"{attack.name}: of the same reply, {was} becomes {now}")
    quoting = Graded({}, f"The answer says:\n{hostile}\n{WORDS}")
    if not same(bench.judged([group], quoting), found):
        raise Breach(f"{attack.name}: what a judge quotes is read as what it says itself")
    silent = bench.heard([group], _says("Hm."))
    for model in _copyists(hostile):
        if not same(bench.heard([group], model), silent):
            raise Breach(f"{attack.name}: a model that repeats what it is shown gives a verdict")
    return True


def _copyists(hostile: str) -> list[StandIn]:
    """Models that say again what they were shown: the answer, all of it, all up to its end."""

    def the_answer(shown: str, schema: Any) -> str:
        return hostile if hostile in shown else "Hm."

    def up_to_its_end(shown: str, schema: Any) -> str:
        return shown[: shown.rfind(hostile) + len(hostile)] if hostile in shown else "Hm."

    says: list[Say] = [the_answer, up_to_its_end, lambda shown, schema: shown]
    return [*map(StandIn, says), StandIn(the_answer, structured=True)]


def _expect_no_score(bench: Bench, model: StandIn, when: str) -> None:
    for judgement in bench.heard(bench.groups, model).values():
        if judgement.score is not None:
            raise Breach(f"{when}, and a candidate gets {judgement.score:.4g}")


def _expect_status(bench: Bench, status: Status) -> None:
    bench.asks()
    model = StandIn(bench.good, status=status)
    _expect_no_score(bench, model, f"the reply is {status}")
    if model.was_sampled:
        return  # It asks a policy, which gives a completion or none, and can say no more.
    for judgement in bench.heard(bench.groups, model).values():
        if judgement.status not in (status, bench.plain[judgement.candidate_id].status):
            raise Breach(f"the reply is {status}, and the judgement {judgement.status}")


def _says(text: str) -> Say:
    return lambda shown, schema: text


CLAUSES: dict[str, Clause] = {
    "one judgement each": each_has_one,
    "nothing to judge": nothing_to_judge,
    "verdicts and reasons": said_in_full,
    "same seed": same_seed,
    "order of candidates": candidates_swapped,
    "order of groups": groups_swapped,
    "size of the batch": one_at_a_time,
    "empty answers": empty_text,
    "long answers": long_text,
    "strange characters": strange_text,
    "silly replies": silly_replies,
    "cut-off replies": cut_off,
    "time-outs": timed_out,
    "refusals": refused,
    "failures among others": failure_stays,
    "replies as JSON": held_to_a_form,
    "attacks": attacked,
}
"""Name -> what is tried, whose docstring says what the judge has to keep to."""

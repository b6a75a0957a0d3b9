"""For authors of judges: write one, try it, see what a model would be asked.

A judge is tried alone: nothing here opens a model or a run that is under way.
"""

from __future__ import annotations

import importlib.util
import json
import keyword
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import cast

from pydantic import ValidationError
from rich.console import Console

from judges.bench import Bench, examples
from judges.contract import check
from judges.harmless import harmless
from loop import starters
from loop.expanding import merge
from loop.files import assigned
from loop.report import Table
from loop.screen import columns, line, put
from loop.settings import Role
from loop.work import without_thinking
from roles import plugins
from roles.protocols import Judge
from store.database import Store
from store.errors import UserError
from store.records import Group, Prompt

OURS = {"loop", "roles", "judges", "kernels", "store", "test"}


@dataclass(frozen=True)
class Wish:
    """Which judge, and the options that it is made with."""

    spec: str
    sets: Sequence[str] = ()

    def role(self) -> Role:
        table = assigned(f"judge.use={json.dumps(self.spec)}")
        for each in self.sets:
            if not each.strip().startswith("judge."):
                raise UserError(f"--set makes the judge, as in judge.votes=1; found {each!r}")
            table = merge(table, assigned(each))
        try:
            return Role.model_validate(table["judge"])
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(["judge", *map(str, first["loc"])])
            said = first["msg"].removeprefix("Value error, ")
            raise UserError(f"{place}: {said} (found {first['input']!r})") from None


@contextmanager
def made(role: Role) -> Iterator[Judge]:
    judge = cast(Judge, plugins.load("judge", role.use, role.options))
    try:
        yield judge
    finally:
        if (close := getattr(judge, "close", None)) is not None:
            close()


def test(wish: Wish) -> Table:
    """{judge, version, ok, checks [{name, outcome, why}]}: does it keep to what every judge does?

    Raises UserError where it cannot judge the examples.
    """
    with made(wish.role()) as judge:
        try:
            found = check(judge)
        except UserError as error:
            hint = "a judge that needs other prompts names some in a method examples()"
            raise UserError(f"{wish.spec} cannot judge the examples: {error}; {hint}") from error
        return {
            "judge": wish.spec,
            "version": str(getattr(judge, "version", "1")),
            "ok": all(each.outcome != "failed" for each in found),
            "checks": [
                {"name": each.name, "outcome": each.outcome, "why": each.why} for each in found
            ],
        }


def view_of_test(console: Console, found: Table) -> None:
    grid = columns("check", "", "why", right=())
    for each in found["checks"]:
        grid.add_row(each["name"], each["outcome"], harmless(each["why"]))
    put(console, grid)
    outcomes = [each["outcome"] for each in found["checks"]]
    failed, tried = outcomes.count("failed"), len(outcomes) - outcomes.count("not applicable")
    words = f"failed {failed} of {tried} checks" if failed else f"passed {tried} checks"
    line(console, f"{found['judge']} (version {found['version']}) {words}")


def show(wish: Wish, store: Store | None = None, candidate: int | None = None) -> Table:
    """{judge, version, answers, questions [{messages [{role, content}], digest}]}.

    What a model is shown by whom the judge has a group judged: that of a stored candidate, of
    which only the questions about it are told, or else of an example.
    """
    role = wish.role()
    with made(role) as judge:
        if store is not None and candidate is not None:
            group = stored(store, candidate)
            group = without_thinking(group) if role.thinking == "hidden" else group
        else:
            group = getattr(judge, "examples", examples)()[0]
        bench = Bench(judge, [group])
        if not getattr(judge, "asks_person", False):
            bench.heard([group], bench.model)
        about = [one.text for one in group.candidates if one.id == candidate]
        asked = {each.digest: each for each in bench.model.asked}.values()
        return {
            "judge": wish.spec,
            "version": str(getattr(judge, "version", "1")),
            "answers": len(group.candidates),
            "questions": [_written(each) for each in asked if _is_about(each, about)],
        }


def stored(store: Store, candidate: int) -> Group:
    """The group that a candidate of the run belongs to."""
    sql = """SELECT asked.id, round_id, track, purpose FROM candidate
        JOIN asked ON asked.id = asked_id JOIN round ON round.id = round_id
        WHERE run_id = :run AND candidate.id = :candidate"""
    found = store.query(sql, candidate=min(candidate, 2**63 - 1))
    if not found:
        raise UserError(
            f"{store.root} has no candidate {candidate}; `loop show` and `why` name some"
        )
    place = found[0]
    groups = store.groups(place["round_id"], place["track"], place["purpose"])
    return next(group for group in groups if group.asked_id == place["id"])


def _is_about(question: Prompt, texts: Sequence[str]) -> bool:
    """Whether a question shows one of the texts; any does, if there are none."""
    return not texts or any(each in turn.content for each in texts for turn in question.messages)


def _written(question: Prompt) -> Table:
    turns = [{"role": turn.role, "content": turn.content} for turn in question.messages]
    return {"messages": turns, "digest": question.digest}


def view_of_show(console: Console, found: Table) -> None:
    named = f"{found['judge']} (version {found['version']})"
    if not found["questions"]:
        line(console, f"{named} asks no model about this")
        return
    count = len(found["questions"])
    asks = "1 question" if count == 1 else f"{count:,} different questions"
    line(console, f"{named} asks {asks} about a group of {found['answers']} answers")
    for number, question in enumerate(found["questions"], 1):
        for turn in question["messages"]:
            line(console, f"\n--- {number} of {count}, {turn['role']}")
            line(console, harmless(turn["content"]))


def new(name: str, kind: str, folder: Path) -> list[Path]:
    """Write a judge to begin from, with its prompt if it has one and its test. The files.

    Raises UserError, and writes nothing, where one is there already or the name will not do.
    """
    if kind not in starters.KINDS:
        raise UserError(f"--kind is one of {', '.join(starters.KINDS)}; found {kind!r}")
    taken = keyword.iskeyword(name) or starters.class_name(name) in ("", *starters.IMPORTED)
    if name.isidentifier() and not taken:
        spec = importlib.util.find_spec(name)
        here = spec is not None and spec.origin == str((folder / f"{name}.py").resolve())
        taken = name in (*OURS, "conftest") or (spec is not None and not here)
    if not name.isidentifier() or name != name.lower() or not name.isascii() or taken:
        why = "is taken" if taken else "is none"
        raise UserError(f"a judge's name is that of a module, as in kindness; {name!r} {why}")
    texts = {folder / file: text for file, text in starters.written(name, kind).items()}
    if there := [path for path in texts if path.exists() or path.is_symlink()]:
        raise UserError(f"{there[0].name} is already there; name another judge, or move it away")
    for path, text in texts.items():
        try:
            path.write_text(text)
        except OSError as error:
            for each in texts:
                each.unlink(missing_ok=True)
            raise UserError(f"cannot write {path}: {error.strerror}") from None
    return list(texts)


def next_steps(name: str, kind: str) -> list[str]:
    spec = quote(f"{name}.py:{starters.class_name(name)}")
    asks = " --set judge.model=round" if kind == "model" else ""
    return [
        f"pytest test_{name}.py",
        f"loop judges test {spec}",
        f"loop judges show {spec}",
        f"loop start --set judge.use={spec}{asks} --set filter.use=best_worst",
    ]

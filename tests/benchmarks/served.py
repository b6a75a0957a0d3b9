"""Rows of the judges that ask a model, through a server that is told what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from form_server import HANGS_S, PLANS, form_server, plan
from labelled import SEED, LabelledSet, as_bytes, judgements, maths, spelling, write_references
from measures import conclude, protocol_row, verdicts

from roles import plugins
from roles.policy.server import ChatServer
from store.records import Judgement, Prompt


def served_rows(count: int, folder: Path) -> Iterator[list[str]]:
    words = spelling(count, SEED, as_bytes)
    known = write_references(folder / "references.jsonl", words, frozenset())
    shelf: dict[str, tuple[LabelledSet, dict[str, Any]]] = {
        "rubric": (words, {}),
        "rubric, criteria": (words, {"criteria": ("It is one word.", "It is spelled backward.")}),
        "reference": (words, {}),
        "pairwise": (words, {}),
        "listwise": (words, {"orders": 8}),
        "mbr": (words, {}),
        "consistency, model": (words, {"by": "model"}),
        "meta_ranking": (words, {"references_path": known}),
        "meta": (judgements(count, SEED, as_bytes), {}),
    }
    with form_server() as process:
        for name, (labelled, options) in shelf.items():
            judge = plugins.load("judge", name.partition(",")[0], options)
            server = ChatServer(process.url, "judge", timeout_s=HANGS_S / 5, retries=1)
            asked = Overheard(server)
            said, took = conclude(judge, labelled.groups, asked)
            yield served(name, labelled, said, took, asked)
    labelled = maths(count, SEED, as_bytes)
    yield adapted(labelled)


class Overheard:
    """A server, and the questions that it was asked."""

    def __init__(self, server: ChatServer) -> None:
        self._server = server
        self.plans: dict[tuple[str, int], str] = {}
        """Question and seed -> what the server was told to do with them."""

    def ask(self, questions: Sequence[Prompt], *, seeds: Any, **rest: Any) -> Any:
        for question, own in zip(questions, seeds, strict=True):
            for seed in own:
                planned = plan(question.messages[-1].content)
                self.plans[question.digest, seed] = planned
        return self._server.ask(questions, seeds=seeds, **rest)


def served(
    name: str, labelled: LabelledSet, said: Sequence[Judgement], took: float, asked: Overheard
) -> list[str]:
    """How many verdicts have each status, of how many that were to have it."""
    # A ranking is a verdict of each of its candidates, and one question.
    heard = {(str(each.prompt_digest), each.seed or 0): each.status for each in verdicts(said)}
    told = {key: PLANS[planned][0] for key, planned in asked.plans.items()}
    return protocol_row(name, "server", labelled, said, took, heard, told)


def exact_match(completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
    """A reward function of TRL's; of an empty answer it says nothing."""
    both = zip(completions, answer, strict=True)
    return [float(said == right) if said else None for said, right in both]


def adapted(labelled: LabelledSet) -> list[str]:
    """TRL's reward function as a judge: a number is a score, None is none."""
    groups = [
        replace(
            group,
            candidates=tuple(
                replace(one, text="" if one.id % 5 == 0 else one.text) for one in group.candidates
            ),
        )
        for group in labelled.groups
    ]
    options = {"function": f"{Path(__file__).resolve()}:exact_match", "format": "text"}
    said, took = conclude(plugins.load("judge", "trl_reward", options), groups, None)
    heard = {each.candidate_id: each.status for each in said}
    told = {
        one.id: "ok" if one.text else "abstained" for group in groups for one in group.candidates
    }
    return protocol_row("trl_reward", "–", labelled, said, took, heard, told)

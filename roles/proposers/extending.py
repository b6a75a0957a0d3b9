"""What a generator's revisions came to in the last round, as something to learn revising from.

Source: the extender of "Language Models can Self-Lengthen to Generate Long Texts" (arXiv
2410.23933), which is trained to go from its generator's answers to the longer ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from roles.generators.revised import revision
from roles.protocols import History, Policy
from roles.template import conversation
from store.records import Call, Candidate, Group, Prompt, Split


class Extending:
    """track: whose answers of the last round are meant. There is nothing in the first round.
    revise, revise_path, nonce: as the generator `revised` has them, which made them.

    Each prompt is what `revised` asked about an answer, with what came of it as its reference: the
    generator `demonstrations` then gives that to be imitated.
    """

    def __init__(
        self,
        track: str = "main",
        revise: str = "revise",
        revise_path: Path | None = None,
        nonce: bool = True,
    ) -> None:
        self.track = track
        self.template = revision(revise, revise_path, nonce)

    def propose(
        self, count: int, split: Split, history: History, policy: Policy, call: Call
    ) -> list[Prompt]:
        """Up to `count` prompts, one of each group as long as there are some, then the second."""
        if split != "train" or call.round < 2:
            return []
        last = replace(call, round=call.round - 1, track=self.track)
        groups = [list(_revised(group)) for group, _ in history.judged(last)]
        made: dict[str, Prompt] = {}
        held_out = history.held_out()
        for place in range(max(map(len, groups), default=0)):
            for pairs in groups:
                if place < len(pairs) and len(made) < count:
                    prompt = self._prompt(*pairs[place])
                    if prompt.question_digest not in held_out:
                        made.setdefault(prompt.digest, prompt)
        return list(made.values())

    def _prompt(self, question: Prompt, first: Candidate, after: Candidate) -> Prompt:
        asked = self.template.fill(
            question=conversation(question),
            answer=first.text,
            critique=after.made_with or "",
        )
        return replace(
            asked,
            task="revising",
            reference=after.text,
            origin="derived",
            split=question.split,
            columns={"question": conversation(question), "answer": first.text},
            parent_prompt_id=question.id,
            parent_candidate_id=after.id,
        )


def _revised(group: Group) -> Iterator[tuple[Prompt, Candidate, Candidate]]:
    """Answers of a group with the revisions that count and say something else."""
    by_index = {one.index: one for one in group.candidates}
    for after in group.candidates:
        first = by_index.get(after.index - 1)
        revised = after.made_as == "revised" and first is not None and first.made_as == "first"
        if not revised or first is None or after.finish_reason == "length":
            continue
        if after.text and after.text != first.text:
            yield group.prompt, first, after

"""Prompts of the last round that the policy answered wrong.

By themselves they are asked again; as the source of `self_instruct` they are the examples behind
which another model writes new ones.

Source: "LLM2LLM: Boosting LLMs with Novel Iterative Data Enhancement" (arXiv 2403.15042), where a
teacher writes problems like the seed problems that the student fails at.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from roles.protocols import History, Policy
from store.records import Call, Prompt, Split


class Mistakes:
    """track: whose answers of the last round are looked at; demonstrations among them are not.
    below: a prompt counts as answered wrong if the judge gave one of its answers a lower score.

    Of the track that learns from seed problems these are mistakes on the seeds; of a track whose
    filter keeps nothing, mistakes on a validation set that is not learned from.
    """

    def __init__(self, track: str = "main", below: float = 1.0) -> None:
        self.track, self.below = track, below

    def propose(
        self, count: int, split: Split, history: History, policy: Policy, call: Call
    ) -> list[Prompt]:
        """Up to `count` prompts, drawn where there are more; none in the first round."""
        if split != "train" or call.round < 2:
            return []
        wrong = []
        for group, said in history.judged(replace(call, round=call.round - 1, track=self.track)):
            own = {one.id for one in group.candidates if one.checkpoint_id is not None}
            if any(
                each.candidate_id in own and each.score is not None and each.score < self.below
                for each in said
            ):
                wrong.append(group.prompt)
        if len(wrong) <= count:
            return wrong
        chance = Random(call.seed_for("mistakes"))
        return [wrong[place] for place in sorted(chance.sample(range(len(wrong)), count))]

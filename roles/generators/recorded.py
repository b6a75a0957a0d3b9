"""The answers that came with the data, wanted or not, as candidates. Nobody is sampled."""

from __future__ import annotations

from collections.abc import Sequence

from roles.generators.demonstrations import nothing_to_write, written
from roles.proposers.recorded import recorded_answers
from roles.protocols import Policy
from store.records import Call, Completion, Prompt


class Recorded:
    """Every different answer that the data has for a prompt, in its order."""

    most_tokens = 0

    def generate(
        self, prompts: Sequence[Prompt], policy: Policy, call: Call
    ) -> list[list[Completion]]:
        """Each prompt's answers; none where the longest would not fit behind it."""
        return [written(self._answers(prompt), prompt, policy) for prompt in prompts]

    def _answers(self, prompt: Prompt) -> list[str]:
        answers = recorded_answers(prompt)
        if not answers:
            raise nothing_to_write(prompt, "recorded answer", "the proposer 'dataset' records them")
        return answers

"""Check whether the final answer means the same as the reference: 1/2 is 0.5 is \\frac{1}{2}.

What an expression means is for math-verify to say. It has to work it out, and an answer can be
made that takes for ever, so it does that in confined processes (`judges.sandbox`), which are
killed when they take too long.
"""

from __future__ import annotations

import asyncio
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

from pydantic import Field

from judges.answers import Place, final_answer
from judges.base import Opinion, PointwiseJudge
from judges.sandbox import Limits, WorkerError, Workers, require
from roles.protocols import Policy
from store.errors import UserError
from store.records import Call, Completion, Prompt

LONGEST_ANSWER = 1_000
"""Characters. Longer than any right answer but one whose reference is itself that long."""


class Math(PointwiseJudge):
    """A judge of final answers by what they mean: it knows that 1/2 is 0.5 is \\frac{1}{2}.

    answer: where the final answer is (`judges.answers`); the whole of it is one expression, so a
    list of guesses is a list and not the right one among them.
    digits: decimal places to which a decimal fraction is compared. strict: whether the names of
    variables matter, and a tuple is no set.
    time_s: how long one answer may take. One that takes longer has timed out and no score: nobody
    knows whether it is right. One that cannot be read is wrong.
    workers: how many processes work at once.
    """

    version = "1"

    def __init__(
        self,
        answer: Place = "auto",
        digits: Annotated[int, Field(ge=0, le=15)] = 6,
        strict: bool = True,
        time_s: Annotated[float, Field(gt=0, le=600)] = 5.0,
        memory_mb: Annotated[int, Field(ge=512)] = 1024,
        workers: Annotated[int, Field(ge=1, le=256)] = 2,
    ):
        if importlib.util.find_spec("math_verify") is None:
            raise UserError(
                "judge 'math' needs the package math-verify, which is not installed; "
                "install ratchet-loop[math]"
            )
        require()
        self.place: Place = answer
        self.digits, self.strict, self.time_s = digits, strict, time_s
        self.concurrency = workers
        self._threads = ThreadPoolExecutor(workers)
        self._workers = Workers("expressions", Limits(time_s=None, memory_mb=memory_mb))

    async def score(
        self, prompt: Prompt, completion: Completion, policy: Policy | None, call: Call
    ) -> Opinion:
        if prompt.reference is None:
            raise _lacks(prompt, "it has none")
        reference = final_answer(prompt.reference, "auto") or ""
        answer = final_answer(completion.text, self.place)
        if answer is None:
            return Opinion(score=0.0, raw=f"no final answer: looked for {self.place!r}")
        limit = max(LONGEST_ANSWER, 2 * len(reference))
        if len(answer) > limit:
            words = f"the answer has {len(answer)} characters, more than {limit}"
            return Opinion(score=0.0, raw=words)
        if answer == reference:
            return Opinion(score=1.0, raw=f"answer {_short(answer)} is the reference")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._compare, prompt, reference, answer)

    def _compare(self, prompt: Prompt, reference: str, answer: str) -> Opinion:
        question = {"digits": self.digits, "strict": self.strict, "reference": reference}
        try:
            said = self._workers.ask({**question, "answer": answer}, self.time_s)
            if said is None and self._workers.ask({**question, "answer": "0"}, self.time_s) is None:
                raise _lacks(prompt, f"{_short(reference)} takes more than {self.time_s:g} s")
        except WorkerError as error:
            return Opinion(score=None, raw="", status="failed", reason=str(error))
        if said is None:
            words = f"answer {_short(answer)} took more than {self.time_s:g} s to compare"
            return Opinion(score=None, raw=words, status="timed_out", reason=words)
        if said.get("unreadable") == "reference":
            raise _lacks(prompt, f"{_short(reference)} cannot be read: {said['why']}")
        if "unreadable" in said:
            words = f"answer {_short(answer)} cannot be read: {said['why']}"
            return Opinion(score=0.0, raw=words)
        verb = "is" if said["right"] else "is not"
        return Opinion(
            score=float(said["right"]), raw=f"answer {_short(answer)} {verb} {_short(reference)}"
        )

    def pids(self) -> list[int]:
        """The ids of the processes that wait to be asked."""
        return self._workers.pids()

    def close(self) -> None:
        """End the processes. They are started again when they are needed."""
        self._workers.close()


def _lacks(prompt: Prompt, what: str) -> UserError:
    return UserError(
        "judge 'math' needs a reference answer that is an expression, and of prompt "
        f"{prompt.digest[:12]} ({_short(prompt.messages[-1].content, 60)}) {what}; "
        "give the prompts one, or choose another judge"
    )


def _short(text: str, longest: int = 200) -> str:
    return repr(text if len(text) <= longest else text[:longest] + "…")

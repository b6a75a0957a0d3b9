"""What judges that ask a model have in common: how they ask it, and what becomes of a reply."""

# No `from __future__ import annotations` here: judges inherit these fields, and a string would be
# looked up among the names of their module instead of this one's.

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from judges.models import ask_model
from judges.prompts import prompt_of
from roles.protocols import Policy
from roles.template import Template
from store.records import Call, Prompt, Reply, Sampling, Status, Verdict


@dataclass(kw_only=True)
class ModelJudge:
    """The options of a judge that asks a model.

    prompt: the name of another text that this package has, as in "meta_brief"; prompt_path: a text
    of your own. Left out, the judge asks the one of its own name.
    nonce: draw a part of the fences around what is judged anew for each question; off is for very
    small models, to which it is noise.
    """

    asks_model: ClassVar[bool] = True
    version: ClassVar[str] = "1"

    prompt: str | None = None
    prompt_path: Path | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    max_tokens: Annotated[int, Field(ge=1)] = 256
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    nonce: bool = True

    def take_template(
        self, name: str, needs: Sequence[str], may: Sequence[str] = (), *, told: str = ""
    ) -> Template:
        """The text that the judge asks, which is from now on a part of its version.

        told: what else of the judge's options decides what its replies mean.
        """
        template = prompt_of(self.prompt or name, self.prompt_path, needs, may, self.nonce)
        self.version = f"{type(self).version} {template.digest[:12]}{told}"  # type: ignore[misc]
        return template

    def ask(
        self,
        policy: Policy | None,
        questions: Sequence[Prompt],
        seeds: Sequence[Sequence[int]],
        call: Call,
        schema: dict[str, Any] | None = None,
    ) -> list[list[Reply]]:
        """One reply for each seed of each question, in order."""
        sampling = Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=self.max_tokens,
            stop=self.stop,
        )
        return ask_model(
            policy, questions, sampling=sampling, seeds=seeds, call=call, schema=schema
        )


def verdict(
    candidate_id: int,
    question: Prompt,
    said: Reply,
    value: float | None,
    why: str | None = None,
    **place: Any,
) -> Verdict:
    """A reply as it is kept. value: what was read of it; None where nothing was.

    why: why there is no value. place: vote, other_candidate_id, order.
    """
    status: Status = said.status
    if status == "ok" and value is None:
        status = "unparsed"
    return Verdict(
        candidate_id=candidate_id,
        raw=said.text or why or said.reason or "",
        status=status,
        value=value,
        prompt_digest=question.digest,
        seed=said.seed,
        seconds=said.seconds,
        tokens=said.tokens,
        cost=said.cost,
        cached=said.cached,
        **place,
    )


def without_score(verdicts: Sequence[Verdict]) -> Status:
    """The status of a judgement none of whose verdicts gave enough: what most of them lack."""
    lacking = Counter(each.status for each in verdicts if each.status != "ok")
    return lacking.most_common(1)[0][0] if lacking else "abstained"


def told(reasons: Sequence[str], asked: int) -> str | None:
    """What replies without a value lacked, counted; None when all `asked` have one."""
    if not reasons:
        return None
    if asked == 1:
        return reasons[0]
    counted = "; ".join(f"{why} ({times})" for why, times in Counter(reasons).most_common())
    return f"{asked - len(reasons)} of {asked} replies can be read: {counted}"

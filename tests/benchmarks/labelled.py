"""Answers of known worth, to hold judges against: right, nearly right, wrong, well-written wrong.

Questions are reasoning-gym's, and so is the truth: its own scorer says of each answer, bare,
whether it is right. Everything follows from the seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from programs import PROGRAMS, Kind

from judges.gym import score_entry
from judges.judging import Judging
from judges.reading import SCORE_LINE, Reading
from roles.generators.demonstrations import with_mistake
from roles.proposers.gym_tasks import make_dataset
from roles.proposers.reasoning_gym import ReasoningGym
from store.records import Answer, Call, Candidate, Completion, Group, Message, Prompt, Reply, Split

SEED = 0
WRONG: tuple[Kind, ...] = ("nearly", "wrong", "well_written")
SPELLING = {"name": "spell_backward", "min_word_len": 3, "max_word_len": 4}
FRACTIONS = {"name": "fraction_simplification", "styles": ["plain"]}
MATHS: tuple[dict[str, Any], ...] = (
    FRACTIONS,
    {"name": "decimal_arithmetic"},
    {"name": "complex_arithmetic"},
    {"name": "simple_integration"},
    {"name": "polynomial_multiplication"},
    {"name": "gcd"},
)
POPULAR = 0.3
"""Of questions: the share in which the answer that is given twice is a wrong one."""
TRIES = 100
NOBODY: Any = None
"""The policy that is handed to a proposer that asks none."""

Write = Callable[[str], Completion]


class Given(NamedTuple):
    """An answer as it is to be judged, and the bare one that its worth hangs on."""

    kind: Kind
    text: str
    bare: str


@dataclass(frozen=True)
class LabelledSet:
    """Groups of answers, each with one right or two, and every answer's kind by its id."""

    name: str
    groups: tuple[Group, ...]
    kinds: dict[int, Kind]

    @property
    def candidates(self) -> list[tuple[Prompt, Candidate]]:
        return [(group.prompt, one) for group in self.groups for one in group.candidates]

    def answers(self, scores: dict[int, float | None], *kinds: Kind) -> list[Answer]:
        """Those of these kinds (none: of all), as what an evaluation is measured from."""
        return [
            Answer(
                prompt_id=group.asked_id,
                split="anchor",
                greedy=False,
                text=one.text,
                tokens=len(one.token_ids),
                truncated=False,
                score=scores[one.id],
            )
            for group in self.groups
            for one in group.candidates
            if not kinds or self.kinds[one.id] in kinds
        ]

    def truth(self, *kinds: Kind) -> list[Answer]:
        return self.answers({n: float(kind == "right") for n, kind in self.kinds.items()}, *kinds)


@dataclass(frozen=True)
class Apart:
    """What a proposer is told: these prompts were learnt from, and are not to be drawn."""

    learnt: frozenset[str] = frozenset()

    def asked(self) -> frozenset[str]:
        return frozenset()

    def held_out(self) -> frozenset[str]:
        return self.learnt

    def prompts(self, *splits: Split) -> list[Prompt]:
        return []


def draw(
    tasks: Sequence[dict[str, Any]], count: int, seed: int, learnt: frozenset[str] = frozenset()
) -> list[Prompt]:
    call = Call(seed=seed, stage="labelled")
    return ReasoningGym(list(tasks)).propose(count, "anchor", Apart(learnt), NOBODY, call)


def spelling(
    count: int, seed: int, write: Write, learnt: frozenset[str] = frozenset()
) -> LabelledSet:
    """Words of three or four letters, spelled backward.

    Nearly right is one letter off, wrong another word's letters, and well-written wrong a word:
    the word itself as it was, or another that is one.
    """
    drawn = [prompt for prompt in draw([SPELLING], 3 * count, seed, learnt) if _right(prompt)]
    prompts, others = drawn[:count], drawn[count:]
    groups = []
    for prompt in prompts:
        chance = random.Random(Call(seed=seed).seed_for(prompt.digest))
        right = _right(prompt)
        word = right[::-1]
        alike = [_right(other) for other in others if len(_right(other)) == len(right)]
        chance.shuffle(alike)
        well = [word] if chance.random() < 0.5 else []
        given = [
            Given("right", right, right),
            _unlike(prompt, "nearly", (with_mistake(right, chance) for _ in range(TRIES))),
            _unlike(prompt, "wrong", [*alike, _garbled(right, chance)]),
            _unlike(
                prompt, "well_written", [*well, *(each[::-1] for each in reversed(alike)), word]
            ),
        ]
        groups.append((prompt, [*given, _again(given, chance)]))
    return labelled_set("spelling", groups, seed, write)


def maths(count: int, seed: int, write: Write) -> LabelledSet:
    """Fractions, decimals, complex numbers, polynomials, integrals and divisors.

    The right answer comes bare and, in another form where the task's scorer takes one, at the end
    of a derivation. Nearly right is one digit or sign off, or a fraction that is not yet in lowest
    terms; wrong is another question's answer; well-written wrong is a derivation that dismisses the
    right answer.
    """
    groups = []
    for prompt, other in _neighbours(draw(MATHS, 2 * count, seed)):
        chance = random.Random(Call(seed=seed).seed_for(prompt.digest))
        right = _right(prompt)
        form = chance.choice([each for each in _forms(prompt, chance) if _is_right(prompt, each)])
        near = _unlike(prompt, "nearly", _near(prompt, chance))
        slip = _unlike(prompt, "well_written", (_slip(right, chance) for _ in range(TRIES)))
        given = [
            Given("right", right, right),
            Given("right", _derived(form, chance), form),
            near,
            _unlike(
                prompt, "wrong", [_right(other), *(_slip(right, chance) for _ in range(TRIES))]
            ),
            Given("well_written", _derived(slip.bare, chance, instead_of=right), slip.bare),
        ]
        groups.append((prompt, [*given, _again(given, chance)]))
    return labelled_set("maths", groups[:count], seed, write)


def programs(draws: int, seed: int, write: Write, tests: int = 6) -> LabelledSet:
    """Functions that answer a task's questions, with `tests` of its entries as their tests.

    Nearly right is a step or a bound off, wrong does something else, and well-written wrong is
    documented, typed and wrong.
    """
    groups = []
    for task, program in PROGRAMS.items():
        dataset = make_dataset(task, program.options, seed=seed % 2**31, size=draws * tests)
        entries = [dataset[n] for n in range(draws * tests)]
        for number in range(draws):
            own = entries[number * tests : (number + 1) * tests]
            calls = [(program.arguments(each), each["answer"]) for each in own]
            prompt = Prompt(
                messages=(Message(role="user", content=f"{program.question} ({number + 1})"),),
                task=task,
                columns={
                    "tests": [f"assert str(solve(*{args!r})) == {right!r}" for args, right in calls]
                },
            )
            given = [Given(kind, f"```python\n{text}```\n", text) for kind, text in program.kinds]
            groups.append((prompt, given))
    return labelled_set("programs", groups, seed, write)


def judgements(
    count: int, seed: int, write: Write, learnt: frozenset[str] = frozenset()
) -> LabelledSet:
    """Judgements of spellings: what `meta` judges.

    Right is the comparison and the score that follows from it; nearly right says one point more or
    less, wrong is the judgement of another answer, and well-written wrong praises what is not
    right, or condemns what is.
    """
    form = Judging(
        {"use": "reasoning_gym", "tasks": [SPELLING]},
        prompt="rubric_brief",
        nonce=False,
        mistakes=0.6,
        worst=3,
        judgement="{reference}\n{comparison}\nScore: {verdict}",
    )
    call = Call(seed=seed, stage="labelled")
    asked = form.propose(2 * count, "anchor", Apart(learnt), NOBODY, call)
    reading = Reading(SCORE_LINE, 0, 5, False, True)
    groups = []
    for prompt, other in zip(asked[:count], reversed(asked), strict=False):
        score = prompt.columns["score"]
        assert prompt.reference is not None
        assert other.reference is not None
        near = prompt.reference[:-1] + str(score - 1 if score else 1)
        elsewhere = other.reference[:-1] + str((score + 3) % 6)
        bold = "It is right in every detail, clear, and could hardly be better.\nScore: 5"
        if score == 5:
            bold = "It does not hold up: nearly every letter stands where it should not.\nScore: 1"
        groups.append(
            (
                # What a judge may not see: the words are held to the score alone.
                replace(prompt, reference=None),
                [
                    Given("right", prompt.reference, str(score)),
                    Given("nearly", near, near[-1]),
                    Given("wrong", elsewhere, elsewhere[-1]),
                    Given("well_written", bold, bold[-1]),
                ],
            )
        )
        for each in groups[-1][1]:
            value, why = reading.read(Reply(text=each.text), prompt)
            if value is None or (value == score) != (each.kind == "right"):
                raise ValueError(f"{each.text!r} is not {each.kind}: {why}")
    return labelled_set("judgements", groups, seed, write)


def write_references(into: Path, judged: LabelledSet, learnt: frozenset[str]) -> Path:
    """Five labelled answers to words that are not judged, three of them right."""
    taken = frozenset(group.prompt.digest for group in judged.groups)
    labelled = spelling(5, SEED + 1, as_bytes, learnt | taken)
    rows = []
    for number, group in enumerate(labelled.groups):
        wanted = "right" if number % 2 == 0 else WRONG[number // 2]
        answer = next(one.text for one in group.candidates if labelled.kinds[one.id] == wanted)
        question = group.prompt.messages[-1].content
        rows.append({"question": question, "answer": answer, "label": wanted == "right"})
    into.write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    return into


def share_right(task: str, text: str, count: int, seed: int) -> float:
    """Of `count` entries of a task, the share that a program of ours answers, by its scorer."""
    program = PROGRAMS[task]
    dataset = make_dataset(task, program.options, seed=seed, size=count)
    namespace: dict[str, Any] = {}
    exec(text, namespace)
    solved = 0
    for number in range(count):
        entry = dataset[number]
        try:
            answer = str(namespace["solve"](*program.arguments(entry)))
        except (ArithmeticError, LookupError, TypeError, ValueError):
            continue
        solved += dataset.score_answer(answer, entry) == 1.0
    return solved / count


def _right(prompt: Prompt) -> str:
    assert prompt.reference is not None
    return prompt.reference


def _is_right(prompt: Prompt, answer: str) -> bool:
    return score_entry(prompt, answer)[0] == 1.0


def _unlike(prompt: Prompt, kind: Kind, tried: Iterable[str]) -> Given:
    """The first that the task's scorer does not take."""
    for answer in tried:
        if answer and not _is_right(prompt, answer):
            return Given(kind, answer, answer)
    raise ValueError(f"no {kind} answer to {prompt.messages[-1].content!r} is wrong")


def _again(given: Sequence[Given], chance: random.Random) -> Given:
    """One of the answers a second time, as several candidates do give it."""
    wrong = [each for each in given if each.kind != "right"]
    return chance.choice(wrong) if chance.random() < POPULAR else given[0]


def _neighbours(prompts: Sequence[Prompt]) -> list[tuple[Prompt, Prompt]]:
    """Each with the next of its task."""
    by_task: dict[str | None, list[Prompt]] = {}
    for prompt in prompts:
        by_task.setdefault(prompt.task, []).append(prompt)
    following = {
        one.digest: other
        for own in by_task.values()
        for one, other in zip(own, [*own[1:], own[0]], strict=True)
    }
    return [(prompt, following[prompt.digest]) for prompt in prompts]


def _forms(prompt: Prompt, chance: random.Random) -> list[str]:
    """The right answer in other ways to write it; which are allowed, the scorer says."""
    right = _right(prompt)
    terms = right.replace(" - ", " + -").split(" + ")
    match prompt.task:
        case "fraction_simplification":
            above, below = right.split("/")
            return [f"{above} / {below}", f"\\frac{{{above}}}{{{below}}}", f"${right}$"]
        case "decimal_arithmetic":
            padded = f"{right}00" if "." in right else f"{right}.00"
            return [padded, f"{right}e0", right]
        case "complex_arithmetic":
            return [right.replace(" ", ""), right.replace("i", "j"), right.replace(".0", "")]
        case "simple_integration" | "polynomial_multiplication":
            chance.shuffle(terms)
            return [" + ".join(terms).replace("+ -", "- "), right]
    return [right]


def _near(prompt: Prompt, chance: random.Random) -> Iterable[str]:
    if prompt.task == "fraction_simplification" and chance.random() < 0.5:
        above, below = (int(each) for each in _right(prompt).split("/"))
        yield f"{2 * above}/{2 * below}"
    for _ in range(TRIES):
        yield _slip(_right(prompt), chance)


def _slip(right: str, chance: random.Random) -> str:
    """One digit or one sign off."""
    signs = [n for n, each in enumerate(right) if each in "+-"]
    if signs and chance.random() < 0.3:
        at = chance.choice(signs)
        return right[:at] + ("-" if right[at] == "+" else "+") + right[at + 1 :]
    digits = [n for n, each in enumerate(right) if each.isdigit()]
    at = chance.choice(digits)
    return right[:at] + with_mistake(right[at], chance) + right[at + 1 :]


def _garbled(right: str, chance: random.Random) -> str:
    """Of no right letter."""
    others = [each for each in "abcdefghijklmnopqrstuvwxyz" if each not in right.lower()]
    return "".join(chance.sample(others, len(right)))


OPENINGS = (
    "Let us go step by step. First we write down what is given and put it in order.",
    "This is a standard exercise, and there is a clean way to do it.",
    "We begin by collecting the terms that belong together and then simplify carefully.",
)
CHECKS = (
    "Substituting back confirms each step, and the signs agree.",
    "A second calculation by another route gives the same, so we can be confident.",
)
ENDINGS = ("Answer: {answer}", "The final result follows.\nAnswer: {answer}")


def _derived(answer: str, chance: random.Random, instead_of: str | None = None) -> str:
    """A derivation that ends in the answer, and maybe speaks of another that it turns down."""
    lines = [chance.choice(OPENINGS)]
    if instead_of is not None:
        lines.append(
            f"One might be tempted to answer {instead_of}, but that overlooks a term and is not "
            "correct."
        )
    lines += [chance.choice(CHECKS), chance.choice(ENDINGS).format(answer=answer)]
    return "\n".join(lines)


def labelled_set(
    name: str, groups: Sequence[tuple[Prompt, Sequence[Given]]], seed: int, write: Write
) -> LabelledSet:
    """The answers to each in an order drawn by the seed, and numbered."""
    made, kinds = [], dict[int, Kind]()
    for number, (prompt, given) in enumerate(groups, 1):
        for each in given:
            if prompt.reference is not None and _is_right(prompt, each.bare) != (
                each.kind == "right"
            ):
                raise ValueError(f"the scorer does not find {each.bare!r} to be {each.kind}")
        shown = list(given)
        random.Random(Call(seed=seed).seed_for(prompt.digest, "order")).shuffle(shown)
        candidates = []
        for index, each in enumerate(shown):
            said = write(each.text)
            kinds[len(kinds) + 1] = each.kind
            candidates.append(
                Candidate(
                    id=len(kinds),
                    asked_id=number,
                    index=index,
                    text=said.text,
                    token_ids=said.token_ids,
                )
            )
        made.append(Group(asked_id=number, prompt=prompt, candidates=tuple(candidates)))
    return LabelledSet(name, tuple(made), kinds)


def as_bytes(text: str) -> Completion:
    """An answer for judges that ask no model: its tokens are its bytes."""
    return Completion(text=text, token_ids=tuple(text.encode()))

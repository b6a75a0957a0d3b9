"""How a checkpoint is measured: held-out prompts, old skills, its judging, commands of the user's.

Everything here is kept as rows like a round's own work, so it is resumed and asked in the same
way. Rows of a suite and of anchors have a track of their own, MODEL:NAME.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

from loop.command import run_command
from loop.context import Context, Rows, StoredHistory
from loop.health import anchored, rung
from loop.measure import gap, judging, measure
from loop.settings import Role
from loop.tasks import Sampled
from loop.work import checked, judge_asked, sample
from roles.protocols import Proposer
from store import checkpoints
from store.errors import UserError
from store.records import (
    Answer,
    Call,
    Checkpoint,
    Evaluation,
    Prompt,
    Purpose,
    Round,
    Sampling,
    Split,
)

HELD_OUT: tuple[Split, ...] = ("gate", "test")


@dataclass(frozen=True)
class Kept:
    """Prompts that are kept from training."""

    split: Split
    suite: str
    count: int
    proposer: Role
    setting: str


def hold_out(context: Context, round: Round) -> None:
    """Keep prompts for every measurement before any is asked for training."""
    for each in _kept(context):
        if context.store.count_prompts(each.split, each.suite):
            continue
        proposer = cast(Proposer, context.role(each.proposer))
        policy = context.policy(context.store.incumbent(next(iter(context.config.models))))
        place = each.split if each.suite == "held_out" else f"{each.split}:{each.suite}"
        call = context.call(round, place, "propose")
        held = proposer.propose(
            each.count, each.split, StoredHistory(context.store, context.config), policy, call
        )
        held = list(checked(context, held, each.split, each.proposer.use))
        if len(held) < each.count:
            raise UserError(
                f"{each.setting} is {each.count}, and proposer {each.proposer.use!r} "
                f"gave {len(held)} prompts for it; ask for as many as there are"
            )
        context.store.add_prompts([replace(prompt, suite=each.suite) for prompt in held])


def _kept(context: Context) -> Iterator[Kept]:
    own = context.config.evaluate
    yield Kept("gate", "held_out", own.gate_prompts, own.proposer, "evaluate.gate_prompts")
    yield Kept("test", "held_out", own.test_prompts, own.proposer, "evaluate.test_prompts")
    if (anchors := own.anchors) is not None:
        setting = "evaluate.anchors.prompts"
        yield Kept("anchor", "held_out", anchors.prompts, anchors.proposer, setting)
    for name, suite in own.suite.items():
        setting = f"evaluate.suite.{name}.prompts"
        yield Kept("gate", name, suite.prompts, suite.proposer, setting)


def under_test(context: Context, round: Round) -> list[Checkpoint]:
    """The newest checkpoint of each model that this round made (in round 0: or took)."""
    newest = {each.model: each for each in context.store.checkpoints(round_id=round.id)}
    return [
        each for each in newest.values() if each.status != "diverged" and is_measured(context, each)
    ]


def is_measured(context: Context, checkpoint: Checkpoint) -> bool:
    """Whether there is anything to measure it by: a reward model has no answers, only a word on
    those of the anchors."""
    if context.writes(checkpoint.model):
        return True
    asked = context.config.judge_by(checkpoint.model) is not None
    return asked and context.config.evaluate.anchors is not None and _judges(checkpoint)


def _judges(checkpoint: Checkpoint) -> bool:
    """Whether it is a reward model already: what one is first trained from is none yet."""
    return checkpoints.is_reward_model(checkpoint.path)


@dataclass(frozen=True)
class Questions:
    """Asked rows of one measurement, how they are answered and by whom they are judged.

    The first judge is the one whose scores measure.
    """

    rows: Rows
    prompts: Sequence[Prompt]
    generator: Role | Sampled
    call: Call
    judges: tuple[Role, ...]


def questions(context: Context, round: Round, checkpoint: Checkpoint) -> Iterator[Questions]:
    """All that a checkpoint is asked in a round, in order."""
    store, model, own = context.store, checkpoint.model, context.config.evaluate
    if not context.writes(model):
        yield from _anchored(context, round, model)
        return
    held = [prompt for split in HELD_OUT for prompt in store.prompts(split, "held_out")]
    judge, fixed = context.config.judge(model), own.judge
    also = (judge,) if _is_free(context, judge) and judge.label != fixed.label else ()
    for purpose, samples in (("sampled", own.samples), ("greedy", 1)):
        sampling = own.sampling(greedy=purpose == "greedy")
        rows = Rows(round, model, cast(Purpose, purpose))
        judges = (fixed, *also) if purpose == "sampled" else (fixed,)
        yield Questions(rows, held, Sampled(sampling, samples), _call(context, rows), judges)
    for name, suite in own.suite.items():
        rows = Rows(round, f"{model}:{name}", "greedy")
        sampling = Sampling(temperature=0.0, max_tokens=suite.max_tokens, stop=suite.stop)
        prompts = store.prompts("gate", name)
        call = _call(context, rows)
        yield Questions(rows, prompts, Sampled(sampling, 1), call, (suite.judge,))
    yield from _anchored(context, round, model)


def _anchored(context: Context, round: Round, model: str) -> Iterator[Questions]:
    """What the judge that a model chooses by, or the model itself, is asked about the anchors."""
    fixed, anchors = context.config.evaluate.judge, context.config.evaluate.anchors
    if anchors is None:
        return
    judge = _on_trial(context, model)
    rows = Rows(round, f"{model}:anchors", "anchor")
    judges = (fixed,) if judge.label == fixed.label else (fixed, judge)
    # Anchors get the same answers in every round, or their judgements could not be compared.
    call = replace(context.call(round, rows.track, "anchors"), round=0)
    yield Questions(rows, context.store.prompts("anchor"), anchors.generator, call, judges)


def _on_trial(context: Context, model: str) -> Role:
    """The judge that anchors tell about, with a model."""
    own = None if context.writes(model) else context.config.judge_by(model)
    return own or context.config.judge(model)


def _is_free(context: Context, judge: Role) -> bool:
    """Whether it can judge every held-out answer. To ask a model, or a person, about each would
    cost more than the answers: anchors do."""
    made = context.role(judge)
    asks = getattr(made, "models", ()) or getattr(made, "asks_person", False)
    return judge.model is None and not asks


def _call(context: Context, rows: Rows) -> Call:
    return context.call(rows.round, rows.track, f"evaluate {rows.purpose}")


def ask(context: Context, asked: Questions, checkpoint: Checkpoint) -> bool:
    """Answers and judgements of one measurement. False: the budget did not suffice."""
    rows = asked.rows
    if not context.store.is_asked(*rows.key):
        context.store.ask(*rows.key, asked.prompts, context.config.batch_prompts)
    sample(context, rows, checkpoint, asked.generator, asked.call)
    if context.store.unsampled(*rows.key):
        return False
    # The others are themselves what is measured: one that has no word is told by its numbers.
    return all(
        judge_asked(
            context, rows, role, checkpoint.model, checkpoint, needed=role is asked.judges[0]
        )
        for role in asked.judges
    )


def _last_judged(context: Context, round: Round, track: str, judge: str) -> list[Answer]:
    """The anchors as the judge of the last round that judged them scored them."""
    for earlier in reversed(context.store.rounds()[: round.number]):
        found = context.store.answers(cast(int, earlier.id), track, judge)
        if found:
            return found
    return []


def measure_checkpoint(context: Context, round: Round, checkpoint: Checkpoint) -> list[Evaluation]:
    """Every number of a checkpoint whose answers are judged."""
    seed = context.call(round, checkpoint.model, "evaluate").seed_for("bootstrap")
    found = _of_anchors(context, round, checkpoint.model, seed)
    if not context.writes(checkpoint.model):
        return found
    return [
        *_of_answers(context, round, checkpoint.model, seed),
        *found,
        *_of_commands(context, round, checkpoint, seed),
    ]


def _of_answers(context: Context, round: Round, model: str, seed: int) -> Iterator[Evaluation]:
    """What its answers to held-out prompts and to those of suites come to."""
    store, own, id = context.store, context.config.evaluate, cast(int, round.id)
    judge, fixed = context.config.judge(model), own.judge
    answers = store.answers(id, model, fixed.label)
    for split in HELD_OUT:
        yield from measure(model, split, answers, fixed.label, seed)
    if _is_free(context, judge):
        chosen = store.answers(id, model, judge.label)
        left_to_teach = gap(model, "gate", answers, chosen, judge.label, seed)
        if left_to_teach is not None:
            yield left_to_teach
    for name, suite in own.suite.items():
        of_suite = store.answers(id, f"{model}:{name}", suite.judge.label)
        for each in measure(model, "gate", of_suite, suite.judge.label, seed):
            if each.metric != "accuracy_sampled":
                yield replace(each, suite=name)


def _of_anchors(context: Context, round: Round, model: str, seed: int) -> list[Evaluation]:
    """How well it judges, or the judge that it is trained by."""
    store, own, id = context.store, context.config.evaluate, cast(int, round.id)
    if own.anchors is None:
        return []
    judge, track = _on_trial(context, model), f"{model}:anchors"
    truth, judged = (store.answers(id, track, each.label) for each in (own.judge, judge))
    spread = store.variances(id, track, judge.label)
    before = _last_judged(context, round, track, judge.label)
    found = judging(model, truth, judged, spread, judge.label, seed, before)
    if round.number > 0:
        for bell, sentence in rung(context.config.alarms, anchored(found)):
            context.progress.say(f"alarm {bell}: model {model}, its judge {sentence}")
    return found


def _of_commands(
    context: Context, round: Round, checkpoint: Checkpoint, seed: int
) -> Iterator[Evaluation]:
    """What the user's own commands print of it."""
    for name, command in context.config.evaluate.command.items():
        context.check()
        context.close_policy()  # the command may need the memory
        model = checkpoint.model
        context.progress.say(f"round {round.number}  {model}: {name} measures {checkpoint.path}")
        yield from run_command(name, command, checkpoint, context.config.gate.by, seed)

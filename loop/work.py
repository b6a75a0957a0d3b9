"""What the stages do: batch by batch, each asked of the store first and committed to it.

Every function here can be run twice without harm, because it begins with what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter

from loop.config import Config, Role, Track
from loop.context import Context, Rows, StoredHistory
from loop.measure import gap, measure
from roles.protocols import Judge, Policy, Proposer, Trainer
from store import checkpoints
from store.errors import UserError
from store.records import (
    Checkpoint,
    Evaluation,
    Example,
    Group,
    Judgement,
    Prompt,
    Purpose,
    Round,
    Split,
    Training,
)

HELD_OUT: tuple[Split, ...] = ("gate", "test")
TOO_LONG, NO_CANDIDATE = "longer than the context", "no candidate fits the context"
EVALUATED: tuple[Purpose, ...] = ("sampled", "greedy")


def add_bases(context: Context, round: Round) -> None:
    """What each model is before the run: its checkpoint without a parent."""
    for name in context.config.models:
        if context.store.checkpoints(name):
            continue
        path = base_path(context.root, context.config, name)
        base = checkpoints.measure(path, name)
        context.store.add_checkpoint(cast(int, round.id), replace(base, status="accepted"))


def base_path(root: Path, config: Config, name: str) -> Path:
    """Where a model lies before the run. The embedded one is made on first use."""
    path = config.models[name].path
    if path != "embedded":
        return checkpoints.locate(path)
    from roles.policy import embedded

    final = root / "checkpoints" / f"embedded-{name}"
    if not final.exists():
        checkpoints.remove(checkpoints.aside(final))
        embedded.build(checkpoints.aside(final), config.seed)
        checkpoints.publish(final)
    return final


def hold_out(context: Context, round: Round) -> None:
    """Keep prompts for the gate and the test before any is asked for training."""
    evaluate = context.config.evaluate
    proposer = cast(Proposer, context.role(evaluate.proposer))
    policy = context.policy(context.store.incumbent(next(iter(context.config.models))))
    for split, count in zip(HELD_OUT, (evaluate.gate_prompts, evaluate.test_prompts), strict=True):
        if context.store.count_prompts(split):
            continue
        call = context.call(round, split, "propose")
        held = proposer.propose(count, split, StoredHistory(context.store), policy, call)
        held = list(checked(context, held, split, evaluate.proposer.use))
        if len(held) < count:
            raise UserError(
                f"evaluate.{split}_prompts is {count}, and proposer {evaluate.proposer.use!r} "
                f"gave {len(held)} prompts for it; ask for as many as there are"
            )
        context.store.add_prompts(held)


def checked(
    context: Context, prompts: Sequence[Prompt], split: Split, proposer: str
) -> Sequence[Prompt]:
    """What a proposer gave, if it may be asked. Raises RuntimeError when it may not."""
    seen = set(context.store.held_out_digests())
    for prompt in prompts:
        if not isinstance(prompt, Prompt) or prompt.split != split:
            raise RuntimeError(
                f"proposer {proposer!r} was asked for {split} prompts, gave {prompt}"
            )
        if prompt.digest in seen:
            raise RuntimeError(
                f"proposer {proposer!r} gave a prompt twice, or one that is held out: "
                f"{prompt.messages[-1].content[:80]!r}"
            )
        seen.add(prompt.digest)
    return prompts


def sample(
    context: Context,
    rows: Rows,
    writer: Checkpoint,
    answer: Callable[[Sequence[Prompt], Policy], list[Any]],
) -> None:
    """Candidates for every batch that has none, until the budget is spent.

    A prompt that is longer than the context gets none and is dropped for that.
    """
    for batch in context.store.unsampled(*rows.key):
        context.check()
        if context.spent():
            return
        groups = context.store.groups(*rows.key, batch)
        policy = context.policy(writer)
        with context.timed("in policy"):
            answers = answer([group.prompt for group in groups], policy)
        if len(answers) != len(groups):
            raise RuntimeError(f"asked {len(groups)} prompts, got answers to {len(answers)}")
        by_asked = {group.asked_id: each for group, each in zip(groups, answers, strict=True)}
        lost = {
            group.asked_id: TOO_LONG if policy.room(group.prompt) < 1 else NO_CANDIDATE
            for group in groups
            if not by_asked[group.asked_id]
        }
        context.store.add_candidates(*rows.key, writer.id, by_asked, lost)
        context.progress.advance_by(len(groups))


def judge_asked(context: Context, rows: Rows, role: Role, model: str) -> None:
    """Judgements of one judge for every batch that lacks one."""
    judging = cast(Judge, context.role(role))
    call = context.call(rows.round, rows.track, "judge")
    version = str(getattr(judging, "version", "1"))
    for batch in context.store.unjudged(*rows.key, role.label):
        context.check()
        groups = [group for group in context.store.groups(*rows.key, batch) if group.candidates]
        asked = _judging_checkpoint(context, role, model)
        policy = None if asked is None else context.policy(asked)
        with context.timed("in judge"):
            concluded = judging.judge(groups, policy, call)
        _refuse_others(groups, concluded, role.use)
        by = None if asked is None else str(asked.path)
        context.store.add_judgements(*rows.key, role.label, version, by, concluded)
        context.progress.advance_by(len(groups))


def _judging_checkpoint(context: Context, role: Role, model: str) -> Checkpoint | None:
    """Whose model the judge asks."""
    if role.model is None:
        return None
    return context.store.incumbent(model if role.model == "round" else role.model[6:])


def _refuse_others(groups: Sequence[Group], concluded: Sequence[Judgement], judge: str) -> None:
    """Compare the candidates asked with those judged: a dropped one must not shift the rest."""
    asked = sorted(each.id for group in groups for each in group.candidates)
    judged = sorted(judgement.candidate_id for judgement in concluded)
    if asked != judged:
        lost, strange = sorted(set(asked) - set(judged)), sorted(set(judged) - set(asked))
        raise RuntimeError(
            f"judge {judge!r} was given {len(asked)} candidates and gave {len(judged)} judgements; "
            f"without one: {lost[:10]}; not asked: {strange[:10]}"
        )


def train_model(context: Context, round: Round, model: str, examples: Sequence[Example]) -> None:
    """Train aside, give it its name, store it. A kill between any two is made good here."""
    final = checkpoints.folder(context.root, round.number, model)
    start = context.store.incumbent(model)
    kept = TypeAdapter(Training)
    if not final.exists():
        context.check()
        part = checkpoints.aside(final)
        part.mkdir(parents=True, exist_ok=True)
        trainer = cast(Trainer, context.role(context.config.trainer(round.number, model)))
        call = context.call(round, model, "train")
        with context.timed("in trainer"):
            training = trainer.train(examples, start, start, part, call)
        _refuse_training(training, part, trainer)
        (part / checkpoints.TRAINING).write_bytes(kept.dump_json(training))
        checkpoints.publish(final)
    training = kept.validate_json((final / checkpoints.TRAINING).read_bytes())
    made = checkpoints.measure(final, model, parent_id=start.id)
    made = replace(made, status=training.status)
    context.store.add_checkpoint(cast(int, round.id), made, training, examples)
    (final / checkpoints.TRAINING).unlink()


def _refuse_training(training: Training, part: Path, trainer: Trainer) -> None:
    """Before it is given its name, so that a trainer that is mended can train anew."""
    wrong = None
    if not isinstance(training, Training):
        wrong = f"returned {type(training).__name__}, not a Training"
    elif len({step.step for step in training.steps}) != len(training.steps):
        wrong = "returned two steps of one number"
    elif training.status == "trained" and not (part / "config.json").is_file():
        wrong = "said it trained and left no config.json"
    elif pickles := checkpoints.pickles(part):
        wrong = f"left {pickles[0].name}; a checkpoint holds safetensors only"
    if wrong is not None:
        checkpoints.remove(part)
        raise RuntimeError(f"trainer {type(trainer).__name__} {wrong}")


def under_test(context: Context, round: Round) -> list[Checkpoint]:
    """The newest checkpoint of each model that this round made (in round 0: or took)."""
    newest = {each.model: each for each in context.store.checkpoints(round_id=round.id)}
    return [each for each in newest.values() if each.status != "diverged"]


def answer_held_out(context: Context, rows: Rows, checkpoint: Checkpoint) -> None:
    sampling = context.config.evaluate.sampling(greedy=rows.purpose == "greedy")
    count = 1 if rows.purpose == "greedy" else context.config.evaluate.samples
    call = context.call(rows.round, rows.track, f"evaluate {rows.purpose}")

    def answer(prompts: Sequence[Prompt], policy: Policy) -> list[Any]:
        seeds = [[call.seed_for(each.digest, index) for index in range(count)] for each in prompts]
        return policy.sample(prompts, sampling=sampling, seeds=seeds)

    sample(context, rows, checkpoint, answer)


def measure_checkpoint(context: Context, round: Round, checkpoint: Checkpoint) -> list[Evaluation]:
    store, model, fixed = context.store, checkpoint.model, context.config.evaluate.judge
    judge = _round_judge(context, model)
    if judge.label != fixed.label:
        judge_asked(context, Rows(round, model, "sampled"), judge, model)
    answers, chosen = (
        store.answers(cast(int, round.id), model, each.label) for each in (fixed, judge)
    )
    seed = context.call(round, model, "evaluate").seed_for("bootstrap")
    found = [
        each for split in HELD_OUT for each in measure(model, split, answers, fixed.label, seed)
    ]
    left_to_teach = gap(model, "gate", answers, chosen, judge.label, seed)
    return found if left_to_teach is None else [*found, left_to_teach]


def _round_judge(context: Context, model: str) -> Role:
    """The judge whose choices the model is trained on: its first track's."""
    tracks: Iterator[Track] = iter(context.config.track.values())
    return next(track.judge for track in tracks if track.model == model)

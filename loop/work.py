"""What the stages do: batch by batch, each asked of the store first and committed to it.

Every function here can be run twice without harm, because it begins with what is left.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

from pydantic import TypeAdapter

from judges.asking import unlike
from loop.asked import Asking
from loop.context import Context, Rows
from loop.health import keep_health, refuse_unscored
from loop.settings import Config, Role
from loop.tasks import Answering, Judging, Learning, Sampled
from roles.protocols import Judge, Trainer
from store import checkpoints
from store.records import (
    Call,
    Checkpoint,
    Example,
    Group,
    Judgement,
    Prompt,
    Round,
    Split,
    Training,
)


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
    path, template = config.models[name].path, config.models[name].template_path
    if path != "embedded":
        found = checkpoints.locate(path)
        if template is None:
            return found
        final = root / "checkpoints" / f"base-{name}"
        if not final.exists():
            checkpoints.remove(checkpoints.aside(final))
            checkpoints.with_template(found, Path(template), checkpoints.aside(final))
            checkpoints.publish(final)
        return final
    from roles.policy import embedded

    final = root / "checkpoints" / f"embedded-{name}"
    if not final.exists():
        checkpoints.remove(checkpoints.aside(final))
        embedded.build(checkpoints.aside(final), config.seed)
        checkpoints.publish(final)
    return final


def checked(
    context: Context, prompts: Sequence[Prompt], split: Split, proposer: str
) -> Sequence[Prompt]:
    """What a proposer gave, if it may be asked. Raises RuntimeError when it may not."""
    held_out, seen = context.store.held_out_digests(), set[str]()
    for prompt in prompts:
        if not isinstance(prompt, Prompt) or prompt.split != split:
            raise RuntimeError(
                f"proposer {proposer!r} was asked for {split} prompts, gave {prompt}"
            )
        if prompt.digest in seen or prompt.question_digest in held_out:
            raise RuntimeError(
                f"proposer {proposer!r} gave a prompt twice, or a question that is held out: "
                f"{prompt.messages[-1].content[:80]!r}"
            )
        seen.add(prompt.digest)
    return prompts


def sample(
    context: Context, rows: Rows, writer: Checkpoint, generator: Role | Sampled, call: Call
) -> None:
    """Candidates for every batch that has none, until the budget is spent.

    A prompt that is longer than the context gets none and is dropped for that.
    """
    how = generator if isinstance(generator, Sampled) else context.config.place(generator)

    def asked() -> Iterator[tuple[Sequence[Group], Answering]]:
        for batch in context.store.unsampled(*rows.key):
            context.check()
            if context.spent():
                return
            groups = context.store.groups(*rows.key, batch)
            yield groups, Answering(writer, how, tuple(group.prompt for group in groups), call)

    for groups, made in context.performed("in policy", asked()):
        if context.spent():  # it was under way while others were committed
            return
        by_asked = {group.asked_id: each for group, each in zip(groups, made.answers, strict=True)}
        lost = {groups[place].asked_id: why for place, why in made.lost.items()}
        context.store.add_candidates(*rows.key, writer.id, by_asked, lost, made.tokens)
        context.progress.advance_by(len(groups))


def judge_asked(
    context: Context,
    rows: Rows,
    role: Role,
    model: str,
    tested: Checkpoint | None = None,
    *,
    needed: bool = True,
) -> bool:
    """Judgements of one judge for every batch that lacks one. False: the budget did not suffice.

    tested: the checkpoint under test, which is what a judge that asks the policy then asks.
    needed: whether the stage stops where it fails at too many answers (alarms.max_unscored).
    """
    judging = cast(Judge, context.role(role))
    names = {*filter(None, [role.model]), *getattr(judging, "models", ())}
    place = "/".join([context.uuid, *map(str, rows.key), role.label])
    version = str(getattr(judging, "version", "1"))
    _say_changed(context, rows, role, version)
    costs = role.model is not None or bool(getattr(judging, "models", ()))
    call = context.call(rows.round, rows.track, "judge")
    short = False

    def spent() -> bool:
        nonlocal short
        short = context.overpaid() or (costs and context.spent())
        return short

    def asked() -> Iterator[tuple[Sequence[Group], Judging]]:
        for batch in context.store.unjudged(*rows.key, role.label):
            context.check()
            if spent():
                return
            groups = [group for group in context.store.groups(*rows.key, batch) if group.candidates]
            asking = Asking.of(
                context, names, model, tested, fresh=rows.purpose == "anchor", place=place
            )
            if role.thinking == "hidden":
                groups = [without_thinking(group) for group in groups]
            yield groups, Judging(context.config.place(role), version, tuple(groups), asking, call)

    try:
        for groups, made in context.performed("in judge", asked()):
            if spent():  # it was under way while others were committed
                break
            _keep(context, rows, role, groups, version, made, needed=needed)
            context.progress.advance_by(len(groups))
    finally:
        close = getattr(judging, "close", None)
        if close is not None:  # what it holds may be needed for training
            close()
    if short:
        return False
    keep_health(context, rows, role)
    return True


def _say_changed(context: Context, rows: Rows, role: Role, version: str) -> None:
    """Say it when what a round has judged so far was judged by another version."""
    others = context.store.judge_versions(*rows.key, role.label) - {version}
    if others:
        context.progress.say(
            f"judge {role.use} is version {version} now, and version {sorted(others)[0]} judged a "
            f"part of round {rows.round.number}, track {rows.track}"
        )


def _keep(
    context: Context,
    rows: Rows,
    role: Role,
    groups: Sequence[Group],
    version: str,
    made: tuple[list[Judgement], str | None],
    *,
    needed: bool,
) -> None:
    """Commit a batch. What stops the stage stops it before that, so that the batch is judged again
    when the judge is mended."""
    concluded, by = made
    given = [each.id for group in groups for each in group.candidates]
    if (wrong := unlike(given, [each.candidate_id for each in concluded])) is not None:
        raise RuntimeError(f"judge {role.use!r} {wrong}")
    if needed:
        known = partial(context.store.score_counts, *rows.key, role.label)
        refuse_unscored(context.config.alarms, role, rows.track, known, concluded)
    context.store.add_judgements(*rows.key, role.label, version, by, concluded)


THOUGHT = re.compile(r"\A(?:(?!<think>).)*</think>|<think>.*?(?:</think>|\Z)", re.DOTALL)
"""Also a thought whose beginning the chat template wrote, and one that was cut off."""


def without_thinking(group: Group) -> Group:
    """The group as a judge sees it to whom thoughts are hidden."""
    shown = (replace(each, text=THOUGHT.sub("", each.text).strip()) for each in group.candidates)
    return replace(group, candidates=tuple(shown))


def train_model(context: Context, round: Round, model: str, examples: Sequence[Example]) -> None:
    """Train aside, give it its name, store it. A kill between any two is made good here."""
    final = checkpoints.folder(context.root, round.number, model)
    own = context.config.models[model]
    start = _start(context, round, model)
    reference = start if own.reference == "start" else context.store.beginning(model)
    kept = TypeAdapter(Training)
    if not final.exists():
        context.check()
        part = checkpoints.aside(final)
        part.mkdir(parents=True, exist_ok=True)
        trainer = context.config.trainer(round.number, model)
        place, call = context.config.place(trainer), context.call(round, model, "train")
        with context.timed("in trainer"):
            training = context.perform(
                Learning(place, tuple(examples), start, reference, part, call)
            )
        _refuse_training(training, part, context.role(trainer))
        (part / checkpoints.TRAINING).write_bytes(kept.dump_json(training))
        checkpoints.publish(final)
    training = kept.validate_json((final / checkpoints.TRAINING).read_bytes())
    made = checkpoints.measure(final, model, parent_id=start.id)
    base_id = start.base_id if start.kind == "adapter" else start.id
    made = replace(
        made, status=training.status, base_id=base_id if made.kind == "adapter" else None
    )
    context.store.add_checkpoint(cast(int, round.id), made, training, examples)
    (final / checkpoints.TRAINING).unlink()


def _start(context: Context, round: Round, model: str) -> Checkpoint:
    """Where the round's training begins."""
    store, own = context.store, context.config.models[model]
    if round.number == 0 and own.warmup_from is not None:
        start = store.beginning(own.warmup_from)
    elif round.number == 0 or own.start_from == "incumbent":
        start = store.incumbent(model)
    elif own.start_from == "base":
        start = store.beginning(model)
    else:
        own_round = {each.id for each in store.checkpoints(model, round.id)}
        earlier = [each for each in store.checkpoints(model) if each.id not in own_round]
        start = [each for each in earlier if each.status not in ("diverged", "merged")][-1]
        if start.status == "pruned":
            raise RuntimeError(f"the weights of {start.path}, from which to start, were deleted")
    if start.kind == "adapter" and own.fresh_adapter and round.number > 0:
        return _merged(context, round, start)
    return start


def _merged(context: Context, round: Round, adapter: Checkpoint) -> Checkpoint:
    """The adapter merged into its base: a full checkpoint, on which a fresh one is trained."""
    from roles.policy.adapters import merge

    final = checkpoints.folder(context.root, round.number, f"{adapter.model}-merged")
    known = [each for each in context.store.checkpoints(adapter.model) if each.path == final]
    if known:
        return known[0]
    if not final.exists():
        checkpoints.remove(checkpoints.aside(final))
        # Not in the base's own type: bfloat16 would round small updates away in every round.
        merge(adapter, checkpoints.aside(final), dtype="float32")
        checkpoints.publish(final)
    made = checkpoints.measure(final, adapter.model, parent_id=adapter.id)
    return context.store.add_checkpoint(cast(int, round.id), replace(made, status="merged"))


def _refuse_training(training: Training, part: Path, trainer: Trainer) -> None:
    """Before it is given its name, so that a trainer that is mended can train anew."""
    wrong = None
    if not isinstance(training, Training):
        wrong = f"returned {type(training).__name__}, not a Training"
    elif len({step.step for step in training.steps}) != len(training.steps):
        wrong = "returned two steps of one number"
    elif training.status == "trained" and not any(
        (part / name).is_file() for name in ("config.json", checkpoints.ADAPTER)
    ):
        wrong = f"said it trained and left no config.json and no {checkpoints.ADAPTER}"
    elif pickles := checkpoints.pickles(part):
        wrong = f"left {pickles[0].name}; a checkpoint holds safetensors only"
    if wrong is not None:
        checkpoints.remove(part)
        raise RuntimeError(f"trainer {type(trainer).__name__} {wrong}")

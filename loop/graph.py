"""One round as a LangGraph state machine: a node a stage.

    open_round -> propose -> generate -> judge -> filter -> train -> evaluate -> gate -> open_round

The state is ids. Every node begins by asking the store what is left and commits batch by batch,
so a graph that starts again from its first node after a kill goes on where it was: there is no
other resume.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict, cast

from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.runtime import Runtime
from pydantic import TypeAdapter

from loop import gate as rules
from loop.config import Config, Role, Track
from loop.measure import gap, measure
from loop.progress import Progress
from roles.protocols import Engine, Filter, Generator, Judge, Policy, Proposer, Trainer
from store import checkpoints
from store.database import Store
from store.records import (
    Call,
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

STAGES = ("propose", "generate", "judge", "filter", "train", "evaluate", "gate")
NO_STEP_LIMIT = 1 << 62
"""LangGraph counts steps against a limit that is meant for agents; a run has its own rules."""
HELD_OUT: tuple[Split, ...] = ("gate", "test")
EVALUATED: tuple[Purpose, ...] = ("sampled", "greedy")


class State(TypedDict):
    """Ids only: a state that carries data is a second database."""

    run: str
    round: int


@dataclass
class Context:
    """What the nodes work with. One policy at most is in memory, and none while training."""

    store: Store
    config: Config
    roles: dict[int, Any]
    """id() of a Role in the configuration -> the role."""
    progress: Progress
    stopping: Callable[[], bool]
    seconds: dict[str, float] = field(default_factory=dict)
    _open: tuple[int, Policy] | None = None

    @property
    def root(self) -> Path:
        return self.store.root

    def role(self, role: Role) -> Any:
        return self.roles[id(role)]

    def policy(self, checkpoint: Checkpoint) -> Policy:
        """The checkpoint as a policy; the one that was open before is closed."""
        if self._open is None or self._open[0] != checkpoint.id:
            self.close_policy()
            engine = cast(Engine, self.role(self.config.models[checkpoint.model].engine))
            self._open = (cast(int, checkpoint.id), engine.open(checkpoint))
        return self._open[1]

    def close_policy(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def call(self, round: Round, track: str, stage: str) -> Call:
        """Where a role is called. Only a trainer reports its steps: the rest goes by batches."""
        return Call(
            seed=self.config.seed,
            round=round.number,
            track=track,
            stage=stage,
            stopping=self.stopping,
            **({"progress": self.progress.advance} if stage == "train" else {}),
        )

    def check(self) -> None:
        """Between two batches: leave if somebody asked for it."""
        if self.stopping():
            raise KeyboardInterrupt

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.monotonic() - began

    @contextmanager
    def stage(self, round: Round, stage: str, total: int) -> Iterator[None]:
        """A stage's work: announced, timed, and where the round stands is stored."""
        if STAGES.index(stage) > STAGES.index(round.stage):
            self.store.set_stage(cast(int, round.id), stage)
        self.progress.begin(round.number, stage, total)
        try:
            with self.timed(stage):
                yield
        finally:
            self.store.add_seconds(cast(int, round.id), self.seconds)
            self.seconds.clear()
        self.progress.end()

    def spent(self) -> bool:
        """Whether the budget is used up."""
        limit = self.config.budget.generated_tokens
        return 0 < limit <= self.store.generated_tokens()


@dataclass(frozen=True)
class Rows:
    """The asked rows that a piece of work is about."""

    round: Round
    track: str
    purpose: Purpose

    @property
    def key(self) -> tuple[int, str, Purpose]:
        return cast(int, self.round.id), self.track, self.purpose


@dataclass(frozen=True)
class StoredHistory:
    """What roles may ask of earlier rounds."""

    store: Store

    def asked(self) -> frozenset[str]:
        return self.store.asked_digests()

    def held_out(self) -> frozenset[str]:
        return self.store.held_out_digests()


def build() -> CompiledStateGraph[State, Context, State, State]:
    """The state machine. Run it with a Context and `recursion_limit=NO_STEP_LIMIT`."""
    graph = StateGraph(State, context_schema=Context)
    graph.add_node("open_round", open_round)
    for stage, node in NODES.items():
        graph.add_node(stage, cast(Any, node))
    graph.add_conditional_edges(START, go_on, ["open_round", END])
    graph.add_edge("open_round", "propose")
    graph.add_edge("propose", "generate")
    graph.add_conditional_edges("generate", after_generate, ["judge", END])
    graph.add_edge("judge", "filter")
    graph.add_conditional_edges("filter", after_filter, ["train", "open_round", END])
    graph.add_edge("train", "evaluate")
    graph.add_conditional_edges("evaluate", after_evaluate, ["gate", END])
    graph.add_conditional_edges("gate", go_on, ["open_round", END])
    return graph.compile()


# Edges


def go_on(state: State, runtime: Runtime[Context]) -> str:
    context = runtime.context
    return "open_round" if rules.ending(context.store, context.config) is None else END


def after_generate(state: State, runtime: Runtime[Context]) -> str:
    context, round = _at(state, runtime)
    tracks = context.config.tracks(round.number)
    left = any(context.store.unsampled(*Rows(round, name, "train").key) for name in tracks)
    return END if left else "judge"


def after_filter(state: State, runtime: Runtime[Context]) -> str:
    _, round = _at(state, runtime)
    return "train" if round.status == "running" else go_on(state, runtime)


def after_evaluate(state: State, runtime: Runtime[Context]) -> str:
    context, round = _at(state, runtime)
    left = any(
        context.store.unsampled(*Rows(round, each.model, purpose).key)
        for each in _under_test(context, round)
        for purpose in EVALUATED
    )
    return END if left else "gate"


def _at(state: State, runtime: Runtime[Context]) -> tuple[Context, Round]:
    return runtime.context, runtime.context.store.round(state["round"])


# Nodes


def open_round(state: State, runtime: Runtime[Context]) -> State:
    """The round that was being worked on, or the next one."""
    # The libraries are a million objects that live as long as the process. Set apart, they are not
    # walked by every full garbage collection, which was a tenth of a small round.
    gc.collect()
    gc.freeze()
    store = runtime.context.store
    rounds = store.rounds()
    if rounds and rounds[-1].status == "running":
        number = rounds[-1].number
    else:
        number = store.open_round(len(rounds), STAGES[0]).number
    return {"run": state["run"], "round": number}


def propose(state: State, runtime: Runtime[Context]) -> None:
    """Ask this round's prompts. Before the first, the bases and held-out prompts are stored."""
    context, round = _at(state, runtime)
    store, config = context.store, context.config
    with context.stage(round, "propose", len(config.tracks(round.number))):
        _add_bases(context, round)
        _hold_out(context, round)
        for name, track in config.tracks(round.number).items():
            rows = Rows(round, name, "train")
            if store.is_asked(*rows.key):
                continue
            context.check()
            proposer = cast(Proposer, context.role(track.proposer))
            prompts = proposer.propose(
                track.prompts,
                "train",
                StoredHistory(store),
                context.policy(store.incumbent(track.model)),
                context.call(round, name, "propose"),
            )
            _refuse_held_out(prompts, store.held_out_digests(), track.proposer.use)
            store.ask(*rows.key, prompts, config.batch_prompts)


def _add_bases(context: Context, round: Round) -> None:
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


def _hold_out(context: Context, round: Round) -> None:
    """Keep prompts for the gate and the test before any is asked for training."""
    evaluate = context.config.evaluate
    proposer = cast(Proposer, context.role(evaluate.proposer))
    policy = context.policy(context.store.incumbent(next(iter(context.config.models))))
    for split, count in zip(HELD_OUT, (evaluate.gate_prompts, evaluate.test_prompts), strict=True):
        if not context.store.count_prompts(split):
            call = context.call(round, split, "propose")
            held = proposer.propose(count, split, StoredHistory(context.store), policy, call)
            _refuse_held_out(held, context.store.held_out_digests(), evaluate.proposer.use)
            context.store.add_prompts(held)


def _refuse_held_out(prompts: Sequence[Prompt], held_out: frozenset[str], proposer: str) -> None:
    for prompt in prompts:
        if prompt.digest in held_out:
            words = prompt.messages[-1].content[:80]
            raise RuntimeError(f"proposer {proposer!r} gave a prompt that is held out: {words!r}")


def generate(state: State, runtime: Runtime[Context]) -> None:
    context, round = _at(state, runtime)
    tracks = context.config.tracks(round.number)
    with context.stage(round, "generate", sum(track.prompts for track in tracks.values())):
        for name, track in tracks.items():
            generator = cast(Generator, context.role(track.generator))
            call = context.call(round, name, "generate")
            writer = context.store.incumbent(track.model)

            def answer(prompts: Sequence[Prompt], policy: Policy) -> list[Any]:
                return generator.generate(prompts, policy, call)  # noqa: B023 - used at once

            _sample(context, Rows(round, name, "train"), writer, answer)


def _sample(
    context: Context,
    rows: Rows,
    writer: Checkpoint,
    answer: Callable[[Sequence[Prompt], Policy], list[Any]],
) -> None:
    """Candidates for every batch that has none, until the budget is spent."""
    for batch in context.store.unsampled(*rows.key):
        context.check()
        if context.spent():
            return
        groups = context.store.groups(*rows.key, batch)
        policy = context.policy(writer)
        with context.timed("in policy"):
            answers = answer([group.prompt for group in groups], policy)
        if len(answers) != len(groups) or not all(answers):
            counts = [len(each) for each in answers]
            raise RuntimeError(f"asked {len(groups)} prompts, got completions for {counts}")
        by_asked = {group.asked_id: each for group, each in zip(groups, answers, strict=True)}
        context.store.add_candidates(*rows.key, writer.id, by_asked)
        context.progress.advance_by(len(groups))


def judge(state: State, runtime: Runtime[Context]) -> None:
    context, round = _at(state, runtime)
    tracks = context.config.tracks(round.number)
    with context.stage(round, "judge", sum(track.prompts for track in tracks.values())):
        for name, track in tracks.items():
            _judge(context, Rows(round, name, "train"), track.judge, track.model)


def _judge(context: Context, rows: Rows, role: Role, model: str) -> None:
    """Judgements of one judge for every batch that lacks one."""
    judging = cast(Judge, context.role(role))
    call = context.call(rows.round, rows.track, "judge")
    version = str(getattr(judging, "version", "1"))
    for batch in context.store.unjudged(*rows.key, role.label):
        context.check()
        groups = context.store.groups(*rows.key, batch)
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


def filter(state: State, runtime: Runtime[Context]) -> None:
    """Examples or a reason for each prompt. A round without any example ends here."""
    context, round = _at(state, runtime)
    store, tracks = context.store, context.config.tracks(round.number)
    with context.stage(round, "filter", len(tracks)):
        for name, track in tracks.items():
            rows = Rows(round, name, "train")
            if store.is_filtered(cast(int, round.id), name):
                continue
            groups = store.groups(*rows.key)
            judgements = store.judgements(*rows.key, track.judge.label)
            selecting = cast(Filter, context.role(track.filter))
            call = context.call(round, name, "filter")
            selection = selecting.select(groups, judgements, StoredHistory(store), call)
            kept = {example.asked_id for example in selection.examples}
            dropped = {drop.asked_id for drop in selection.dropped}
            asked = {group.asked_id for group in groups}
            if kept | dropped != asked or kept & dropped:
                raise RuntimeError(
                    f"filter {track.filter.use!r} must give each of {len(asked)} prompts examples "
                    f"or one reason; it did for {len(kept)} and {len(dropped)}"
                )
            store.add_selection(cast(int, round.id), name, selection)
    if tracks and not store.count_examples(cast(int, round.id)):
        store.close_round(cast(int, round.id), "no_examples")


def train(state: State, runtime: Runtime[Context]) -> None:
    """One checkpoint a model, from the union of its tracks' examples."""
    context, round = _at(state, runtime)
    config = context.config
    with context.stage(round, "train", 0):
        for model in config.models:
            tracks = [
                name for name, each in config.tracks(round.number).items() if each.model == model
            ]
            examples = context.store.examples(cast(int, round.id), tracks)
            made = context.store.checkpoints(model, cast(int, round.id))
            if examples and not any(each.parent_id is not None for each in made):
                context.close_policy()
                _train(context, round, model, examples)


def _train(context: Context, round: Round, model: str, examples: Sequence[Example]) -> None:
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
        (part / checkpoints.TRAINING).write_bytes(kept.dump_json(training))
        checkpoints.publish(final)
    training = kept.validate_json((final / checkpoints.TRAINING).read_bytes())
    made = checkpoints.measure(final, model, parent_id=start.id)
    made = replace(made, status=training.status)
    context.store.add_checkpoint(cast(int, round.id), made, training, examples)
    (final / checkpoints.TRAINING).unlink()


def _under_test(context: Context, round: Round) -> list[Checkpoint]:
    """The newest checkpoint of each model that this round made (in round 0: or took)."""
    newest = {each.model: each for each in context.store.checkpoints(round_id=round.id)}
    return [each for each in newest.values() if each.status != "diverged"]


def evaluate(state: State, runtime: Runtime[Context]) -> None:
    """Answers of this round's checkpoints to held-out prompts, judged by the fixed judge."""
    context, round = _at(state, runtime)
    held_out = {split: context.store.prompts(split) for split in HELD_OUT}
    prompts = [prompt for split in HELD_OUT for prompt in held_out[split]]
    under_test = _under_test(context, round)
    with context.stage(round, "evaluate", 4 * len(prompts) * len(under_test)):
        for checkpoint in under_test:
            if context.store.evaluations(cast(int, checkpoint.id)):
                continue
            for purpose in EVALUATED:
                rows = Rows(round, checkpoint.model, purpose)
                if not context.store.is_asked(*rows.key):
                    context.store.ask(*rows.key, prompts, context.config.batch_prompts)
                _answer_held_out(context, rows, checkpoint)
                if context.store.unsampled(*rows.key):
                    return
                _judge(context, rows, context.config.evaluate.judge, checkpoint.model)
            found = _measure(context, round, checkpoint)
            context.store.add_evaluations(cast(int, round.id), cast(int, checkpoint.id), found)


def _answer_held_out(context: Context, rows: Rows, checkpoint: Checkpoint) -> None:
    sampling = context.config.evaluate.sampling(greedy=rows.purpose == "greedy")
    count = 1 if rows.purpose == "greedy" else context.config.evaluate.samples
    call = context.call(rows.round, rows.track, f"evaluate {rows.purpose}")

    def answer(prompts: Sequence[Prompt], policy: Policy) -> list[Any]:
        seeds = [[call.seed_for(each.digest, index) for index in range(count)] for each in prompts]
        return policy.sample(prompts, sampling=sampling, seeds=seeds)

    _sample(context, rows, checkpoint, answer)


def _measure(context: Context, round: Round, checkpoint: Checkpoint) -> list[Evaluation]:
    store, model, fixed = context.store, checkpoint.model, context.config.evaluate.judge
    sampled_rows = Rows(round, model, "sampled")
    greedy_rows = Rows(round, model, "greedy")
    sampled, greedy = store.groups(*sampled_rows.key), store.groups(*greedy_rows.key)
    judged = {
        each.candidate_id: each
        for rows in (sampled_rows, greedy_rows)
        for each in store.judgements(*rows.key, fixed.label)
    }
    seed = context.call(round, model, "evaluate").seed_for("bootstrap")
    found: list[Evaluation] = []
    for split in HELD_OUT:
        parts = [_of(sampled, split), _of(greedy, split)]
        found += measure(model, split, parts[0], parts[1], judged, fixed.label, seed)
    judge = _round_judge(context, model)
    if judge.label != fixed.label:
        _judge(context, sampled_rows, judge, model)
    chosen = {each.candidate_id: each for each in store.judgements(*sampled_rows.key, judge.label)}
    left_to_teach = gap(model, "gate", _of(sampled, "gate"), chosen, judged, judge.label, seed)
    return found if left_to_teach is None else [*found, left_to_teach]


def _of(groups: Sequence[Group], split: Split) -> list[Group]:
    return [group for group in groups if group.prompt.split == split]


def _round_judge(context: Context, model: str) -> Role:
    """The judge whose choices the model is trained on: its first track's."""
    tracks: Iterator[Track] = iter(context.config.track.values())
    return next(track.judge for track in tracks if track.model == model)


def gate(state: State, runtime: Runtime[Context]) -> None:
    """Decide on each model, the others held fixed; accepted ones advance together."""
    context, round = _at(state, runtime)
    store, config = context.store, context.config
    if round.status != "running":
        return
    label = config.evaluate.judge.label
    decisions, statuses = [], {}
    with context.stage(round, "gate", 0):
        newest = {each.model: each for each in store.checkpoints(round_id=round.id)}
        for model, checkpoint in newest.items():
            incumbent = store.incumbent(model)
            if round.number == 0:
                decision = rules.first(checkpoint, incumbent)
            else:
                new, old = (
                    store.scores(cast(int, each.id), "gate", label)
                    for each in (checkpoint, incumbent)
                )
                seed = context.call(round, model, "gate").seed_for("bootstrap")
                decision = rules.decide(config.gate, checkpoint, incumbent, new, old, seed)
            decisions.append(decision)
            statuses[cast(int, checkpoint.id)] = rules.status_after(config.gate, decision)
    store.close_round(cast(int, round.id), "done", decisions, statuses)
    for each in decisions:
        context.progress.say(f"round {round.number}  {each.model}: {each.decision}, {each.reason}")
    tidy(context)


def tidy(context: Context) -> None:
    """Point `best` at the best checkpoint and delete weights that nothing needs any more."""
    store = context.store
    checkpoints.sweep(context.root)
    pruned: list[Checkpoint] = []
    for model in context.config.models:
        made = [each for each in store.checkpoints(model) if each.status != "pruned"]
        if not made:
            continue
        best, incumbent = best_checkpoint(store, model), store.incumbent(model)
        if model == next(iter(context.config.models)):
            checkpoints.link_best(context.root, best.path)
        kept = {best.id, incumbent.id} | {
            each.id for each in made[-context.config.checkpoints.keep_last :]
        }
        inside = [each for each in made if each.path.is_relative_to(context.root)]
        pruned += [each for each in inside if each.id not in kept]
    store.set_pruned([cast(int, each.id) for each in pruned])
    for each in store.checkpoints():  # those that a kill left behind as well
        if each.status == "pruned" and each.path.is_relative_to(context.root):
            checkpoints.remove(each.path)


def best_checkpoint(store: Store, model: str) -> Checkpoint:
    """The accepted checkpoint with the highest score on the gate split; the newest of equals."""
    accepted = [each for each in store.checkpoints(model) if each.status == "accepted"]

    def score(checkpoint: Checkpoint) -> float:
        found = store.evaluations(cast(int, checkpoint.id))
        return next(
            (each.value for each in found if (each.split, each.metric) == ("gate", "score")), -1e300
        )

    return max(reversed(accepted), key=score)


NODES: dict[str, Callable[[State, Runtime[Context]], None]] = {
    "propose": propose,
    "generate": generate,
    "judge": judge,
    "filter": filter,
    "train": train,
    "evaluate": evaluate,
    "gate": gate,
}

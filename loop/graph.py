"""One round as a LangGraph state machine: a node a stage.

    open_round -> propose -> generate -> judge -> filter -> train -> evaluate -> gate -> open_round

The state is ids. Every node begins by asking the store what is left and commits batch by batch,
so a graph that starts again from its first node after a kill goes on where it was: there is no
other resume.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, cast

from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.runtime import Runtime

from loop import gate as rules
from loop import health
from loop.asked import meant
from loop.context import STAGES, Context, Rows, StoredHistory
from loop.evaluation import ask, hold_out, is_measured, measure_checkpoint, questions, under_test
from loop.mixing import learned_from
from loop.retention import tidy
from loop.tasks import Counted
from loop.work import add_bases, checked, judge_asked, sample, train_model
from roles.protocols import Filter, Policy, Proposer
from store.errors import UserError
from store.records import Call, Checkpoint, Decision, Example, Group, Round

NO_STEP_LIMIT = 1 << 62
"""LangGraph counts steps against a limit that is meant for agents; a run has its own rules."""


class State(TypedDict):
    """Ids only: a state that carries data is a second database."""

    run: str
    round: int


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
    graph.add_conditional_edges("judge", after_judge, ["filter", END])
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


def after_judge(state: State, runtime: Runtime[Context]) -> str:
    context, round = _at(state, runtime)
    if health.stopping(context.store, context.config) is not None:
        return END
    left = any(
        context.store.unjudged(*Rows(round, name, "train").key, track.judge.label)
        for name, track in context.config.tracks(round.number).items()
    )
    return END if left else "filter"


def after_filter(state: State, runtime: Runtime[Context]) -> str:
    _, round = _at(state, runtime)
    return "train" if round.status == "running" else go_on(state, runtime)


def after_evaluate(state: State, runtime: Runtime[Context]) -> str:
    context, round = _at(state, runtime)
    made = under_test(context, round)
    return "gate" if all(context.store.evaluations(each.id or 0) for each in made) else END


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
        add_bases(context, round)
        hold_out(context, round)
        for name, track in config.tracks(round.number).items():
            rows = Rows(round, name, "train")
            if store.is_asked(*rows.key):
                continue
            context.check()
            proposer = cast(Proposer, context.role(track.proposer))
            asks = track.proposer.model
            policy = Counted(
                context.policy(
                    store.incumbent(track.asks)
                    if asks is None
                    else meant(context, asks, track.model, None)
                )
            )
            prompts = proposer.propose(
                track.prompts,
                "train",
                StoredHistory(store, config),
                cast(Policy, policy),
                context.call(round, name, "propose"),
            )
            prompts = list(checked(context, prompts, "train", track.proposer.use))
            if len(prompts) < track.prompts:
                context.progress.say(f"track {name}: asked for {track.prompts}, got {len(prompts)}")
            store.ask(*rows.key, prompts, config.batch_prompts, policy.tokens)


def generate(state: State, runtime: Runtime[Context]) -> None:
    context, round = _at(state, runtime)
    tracks = context.config.tracks(round.number)
    with context.stage(round, "generate", sum(track.prompts for track in tracks.values())):
        for name, track in tracks.items():
            call = context.call(round, name, "generate")
            writer = context.store.incumbent(track.asks)
            sample(context, Rows(round, name, "train"), writer, track.generator, call)


def judge(state: State, runtime: Runtime[Context]) -> None:
    context, round = _at(state, runtime)
    tracks = context.config.tracks(round.number)
    with context.stage(round, "judge", sum(track.prompts for track in tracks.values())):
        for name, track in tracks.items():
            if not judge_asked(context, Rows(round, name, "train"), track.judge, track.model):
                return  # the budget is spent


def filter(state: State, runtime: Runtime[Context]) -> None:
    """Examples or a reason for each prompt. A round without any example ends here."""
    context, round = _at(state, runtime)
    store, tracks = context.store, context.config.tracks(round.number)
    with context.stage(round, "filter", len(tracks)):
        for name, track in tracks.items():
            rows = Rows(round, name, "train")
            if store.is_filtered(cast(int, round.id), name):
                continue
            groups = [group for group in store.groups(*rows.key) if group.candidates]
            selecting = cast(Filter, context.role(track.filter))
            with_verdicts = bool(getattr(selecting, "reads_verdicts", False))
            judgements = store.judgements(*rows.key, track.judge.label, verdicts=with_verdicts)
            call = context.call(round, name, "filter")
            history = StoredHistory(store, context.config)
            selection = selecting.select(groups, judgements, history, call)
            _refuse_examples(selection.examples, groups, history, call, track.filter.use)
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


def _refuse_examples(
    examples: Sequence[Example],
    groups: Sequence[Group],
    history: StoredHistory,
    call: Call,
    filter: str,
) -> None:
    """An example's answers are answers to its own prompt, in this round or before."""
    own = {group.asked_id: {each.id for each in group.candidates} for group in groups}
    asked_before = False
    for each in examples:
        sides = {each.chosen.id} | (set() if each.rejected is None else {each.rejected.id})
        if not asked_before and not sides <= own.get(each.asked_id, set()):
            asked_before = True
            for asked_id, answers in history.earlier(call).items():
                own.get(asked_id, set()).update(answer.candidate.id for answer in answers)
        if not sides <= own.get(each.asked_id, set()):
            raise RuntimeError(
                f"filter {filter!r} made an example of asked prompt {each.asked_id} from "
                f"candidates {sorted(sides)}, which are not its own"
            )


def train(state: State, runtime: Runtime[Context]) -> None:
    """One checkpoint a model, from the union of its tracks' examples."""
    context, round = _at(state, runtime)
    config = context.config
    with context.stage(round, "train", 0):
        for model in config.models:
            made = context.store.checkpoints(model, cast(int, round.id))
            if any(each.parent_id is not None and each.status != "merged" for each in made):
                continue
            if examples := learned_from(context, round, model):
                context.close_policy()
                train_model(context, round, model, examples)


def evaluate(state: State, runtime: Runtime[Context]) -> None:
    """Answers of this round's checkpoints to held-out prompts, judged by the fixed judge."""
    context, round = _at(state, runtime)
    left = [
        (checkpoint, list(questions(context, round, checkpoint)))
        for checkpoint in under_test(context, round)
        if not context.store.evaluations(cast(int, checkpoint.id))
    ]
    steps = [len(each.prompts) * (1 + len(each.judges)) for _, asked in left for each in asked]
    with context.stage(round, "evaluate", sum(steps)):
        for checkpoint, asked in left:
            if not all(ask(context, each, checkpoint) for each in asked):
                return  # the budget is spent
            found = measure_checkpoint(context, round, checkpoint)
            if not found:
                raise UserError(
                    "no held-out prompt has an answer: all are longer than the model's context"
                )
            context.store.add_evaluations(cast(int, round.id), cast(int, checkpoint.id), found)


def gate(state: State, runtime: Runtime[Context]) -> None:
    """Decide on each model, the others held fixed; accepted ones advance together."""
    context, round = _at(state, runtime)
    store, config = context.store, context.config
    if round.status != "running":
        return
    decisions, statuses = [], {}
    with context.stage(round, "gate", 0):
        newest = {each.model: each for each in store.checkpoints(round_id=round.id)}
        for model, checkpoint in newest.items():
            incumbent = store.incumbent(model)
            if round.number == 0:
                decision = rules.first(checkpoint, incumbent)
            else:
                decision = _compare(context, round, checkpoint, incumbent)
            decisions.append(decision)
            statuses[cast(int, checkpoint.id)] = rules.status_after(config.gate, decision)
    store.close_round(cast(int, round.id), "done", decisions, statuses)
    for each in decisions:
        context.progress.say(f"round {round.number}  {each.model}: {each.decision}, {each.reason}")
    tidy(context)


def _compare(
    context: Context, round: Round, checkpoint: Checkpoint, incumbent: Checkpoint
) -> Decision:
    store, config = context.store, context.config
    if (rang := health.stopping(store, config)) is not None:
        return rules.alarmed(checkpoint, incumbent, rang)
    measured = checkpoint.status != "diverged"
    if measured and not all(is_measured(context, each) for each in (checkpoint, incumbent)):
        return rules.unmeasured(checkpoint, incumbent)
    seed = context.call(round, checkpoint.model, "gate").seed_for("bootstrap")
    writes = context.writes(checkpoint.model)
    new, old = (
        rules.heard(store, config, each, writes=writes) if measured else {}
        for each in (checkpoint, incumbent)
    )
    guards = rules.guards(store, config, checkpoint, incumbent) if measured and writes else []
    rule = config.gate if writes else config.gate.model_copy(update={"by": "held_out"})
    return rules.decide(rule, checkpoint, incumbent, new, old, seed, guards)


NODES: dict[str, Callable[[State, Runtime[Context]], None]] = {
    "propose": propose,
    "generate": generate,
    "judge": judge,
    "filter": filter,
    "train": train,
    "evaluate": evaluate,
    "gate": gate,
}

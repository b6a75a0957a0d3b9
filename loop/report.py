"""What the store says about a run, as plain data: how it stands, its rounds, one round in depth.

Rounds are answered from the counts that each round carries and from the tables with a row a
checkpoint, so the answer takes as long with a million candidates as with none.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from store.database import SAMPLED, Store
from store.errors import UserError
from store.records import Round, Run

Table = dict[str, Any]

CHECKPOINTS = """
SELECT round.number AS round, checkpoint.id AS checkpoint, model, path,
       checkpoint.status AS status, parent_id AS parent, bytes
FROM checkpoint JOIN round ON round.id = checkpoint.round_id
WHERE checkpoint.run_id = :run
ORDER BY checkpoint.id
"""

DECISIONS = """
SELECT round.number AS round, model, decision, rule, reason, checkpoint_id AS checkpoint,
       incumbent_id AS incumbent, numbers
FROM decision JOIN round ON round.id = decision.round_id
WHERE decision.run_id = :run
ORDER BY decision.id
"""

EVALUATIONS = """
SELECT round.number AS round, checkpoint_id AS checkpoint, model, suite, split, metric, value,
       low, high, n, judge
FROM evaluation JOIN round ON round.id = evaluation.round_id
WHERE round.run_id = :run
ORDER BY evaluation.id
"""

ANSWERED = """
SELECT count(*) AS prompts FROM asked
WHERE round_id = :round AND purpose = 'train'
  AND EXISTS (SELECT 1 FROM candidate WHERE candidate.asked_id = asked.id)
"""

TRAINING_STEPS = """
SELECT step, loss, metrics FROM training_step WHERE checkpoint_id = :checkpoint ORDER BY step
"""

EXAMPLES = """
SELECT example.id AS example, asked.track AS track, example.kind AS kind, example.rule AS rule,
       example.margin AS margin, prompt.messages AS messages, prompt.reference AS reference,
       chosen.text AS chosen, judged_chosen.score AS chosen_score,
       rejected.text AS rejected, judged_rejected.score AS rejected_score
FROM asked
JOIN example ON example.asked_id = asked.id
JOIN prompt ON prompt.id = asked.prompt_id
JOIN candidate AS chosen ON chosen.id = example.chosen_id
LEFT JOIN candidate AS rejected ON rejected.id = example.rejected_id
LEFT JOIN judgement AS judged_chosen ON judged_chosen.id = example.chosen_judgement_id
LEFT JOIN judgement AS judged_rejected ON judged_rejected.id = example.rejected_judgement_id
WHERE asked.round_id = :round AND asked.track = :track AND asked.purpose = 'train'
ORDER BY asked.prompt_id, example.id
LIMIT :count
"""
"""By track and in the order of the index on asked: a few rows are read, not the whole round."""

REASON = "dropped "
"""How the counts name a reason for dropping a prompt: "dropped tie"."""
EVALUATING = ("sampled", "greedy")
SHOWN_STEPS = 8
SHOWN_EXAMPLES = 3


def parsed(value: Any) -> Any:
    """A JSON column as a query gives it: text on SQLite."""
    return json.loads(value) if isinstance(value, str) else value


def the_run(store: Store) -> Run:
    """Raises UserError when the store was made and no run ever written."""
    run = store.run()
    if run is None:
        raise UserError(f"{store.root} holds no run: it was ended before it began; delete it")
    return run


def decisions(store: Store) -> list[Table]:
    """Every decision in order; `model` None is about the run."""
    return [row | {"numbers": parsed(row["numbers"])} for row in store.query(DECISIONS)]


# How a run stands


def status(store: Store, alive: bool) -> Table:
    """run, path, status, alive, round, stage, done, total, unit, rounds_done, rounds,
    generated_tokens, decision. `alive`: whether its driver lives; `rounds` 0: until stopped.
    """
    run, rounds = the_run(store), store.rounds()
    decided = decisions(store)
    last = rounds[-1] if rounds else None
    done, total, unit = (None, None, None) if last is None else _stage_progress(store, run, last)
    return {
        "run": run.name,
        "path": str(store.root),
        "status": run.status,
        "alive": alive,
        "round": None if last is None else last.number,
        "stage": None if last is None else last.stage,
        "done": done,
        "total": total,
        "unit": unit,
        "rounds_done": sum(each.status != "running" and each.number > 0 for each in rounds),
        "rounds": run.config["rounds"],
        "generated_tokens": sum(_tokens(each) for each in rounds),
        "decision": decided[-1] if decided else None,
    }


def _stage_progress(store: Store, run: Run, round: Round) -> tuple[Any, Any, str | None]:
    """(done, total, unit) of the stage that the round is in. None where nothing is counted."""
    config, counts = run.config, training_counts(round)
    keys = [key for key in round.counts if key.startswith("train:")]
    tracks = len((config if round.number else config["warmup"] or {}).get("track", {}))
    if round.stage == "propose":
        return len(keys), tracks, "tracks"
    if round.stage == "generate":
        answered = store.query(ANSWERED, round=round.id)[0]["prompts"]
        return answered, counts["asked"], "prompts"
    if round.stage == "judge":
        return counts["judged"], counts["candidates"], "candidates"
    if round.stage == "filter":
        return sum("examples" in round.counts[key] for key in keys), tracks, "tracks"
    if round.stage == "train":
        made = [row for row in store.query(CHECKPOINTS) if row["round"] == round.number]
        return sum(row["parent"] is not None for row in made), len(config["models"]), "models"
    if round.stage == "evaluate":
        asked = config["evaluate"]
        prompts = asked["gate_prompts"] + asked["test_prompts"]
        total = len(config["models"]) * prompts * (asked["samples"] + 1)
        return _summed(round, EVALUATING)["candidates"], total, "candidates"
    return None, None, None


# Its rounds


def rounds(store: Store) -> Table:
    """{run, path, status, rounds: [ROUND]}. A ROUND has number, status, stage, prompts,
    candidates, generated_tokens, judged, unscored, truncated, examples, dropped,
    reasons {reason: prompts}, seconds {stage: s}, outside (the share of its time outside policy,
    judge and trainer) and models: [{model, checkpoint, path, status, decision, rule, reason,
    numbers, gate {metric: {value, low, high, n}}, test {...}, suites {name: {metric: {...}}}}].
    The suite "judge" is how the round's judge did on anchors.
    """
    run = the_run(store)
    made, decided = store.query(CHECKPOINTS), decisions(store)
    measured = store.query(EVALUATIONS)
    return {
        "run": run.name,
        "path": str(store.root),
        "status": run.status,
        "rounds": [_round(each, made, decided, measured) for each in store.rounds()],
    }


def _round(
    round: Round, made: Sequence[Table], decided: Sequence[Table], measured: Sequence[Table]
) -> Table:
    counts = training_counts(round)
    newest = {row["model"]: row for row in made if row["round"] == round.number}
    return {
        "number": round.number,
        "status": round.status,
        "stage": round.stage,
        "prompts": counts["asked"],
        "candidates": counts["candidates"],
        "generated_tokens": _tokens(round),
        "judged": counts["judged"],
        "unscored": counts["unscored"],
        "truncated": counts["truncated"],
        "examples": counts["examples"],
        "dropped": counts["dropped"],
        "reasons": reasons(counts),
        "seconds": {key: value for key, value in round.seconds.items() if not _is_role(key)},
        "outside": outside(round.seconds),
        "models": [_model(row, decided, measured) for row in newest.values()],
    }


def _model(checkpoint: Table, decided: Sequence[Table], measured: Sequence[Table]) -> Table:
    own = [row for row in measured if row["checkpoint"] == checkpoint["checkpoint"]]
    about = [row for row in decided if row["checkpoint"] == checkpoint["checkpoint"]]
    decision: Table = about[-1] if about else {}
    splits: dict[str, Table] = defaultdict(dict)
    suites: dict[str, Table] = defaultdict(dict)
    for row in own:
        interval = {key: row[key] for key in ("value", "low", "high", "n")}
        held_out = row["suite"] == "held_out"
        place = splits[row["split"]] if held_out else suites[row["suite"]]
        place[row["metric"]] = interval
    return {
        "model": checkpoint["model"],
        "checkpoint": checkpoint["checkpoint"],
        "path": checkpoint["path"],
        "status": checkpoint["status"],
        **{key: decision.get(key) for key in ("decision", "rule", "reason", "numbers")},
        "gate": splits["gate"],
        "test": splits["test"],
        "suites": dict(suites),
    }


def training_counts(round: Round) -> Counter[str]:
    """The counts of a round's tracks together."""
    return _summed(round, ("train",))


def _summed(round: Round, purposes: Iterable[str]) -> Counter[str]:
    total: Counter[str] = Counter()
    for key, counts in round.counts.items():
        if key.split(":")[0] in purposes:
            total.update(counts)
    return total


def _tokens(round: Round) -> int:
    found = _summed(round, ("train", "anchor", *EVALUATING))
    return sum(found[kind] for kind in SAMPLED)


def reasons(counts: Mapping[str, int]) -> dict[str, int]:
    """Reason -> prompts dropped for it, the most frequent first."""
    found = {key.removeprefix(REASON): n for key, n in counts.items() if key.startswith(REASON)}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def outside(seconds: Mapping[str, float]) -> float | None:
    """The share of a round's time outside policy, judge and trainer. None: no time was kept."""
    total = sum(value for key, value in seconds.items() if not _is_role(key))
    inside = sum(value for key, value in seconds.items() if _is_role(key))
    return max(0.0, 1 - inside / total) if total > 0 else None


def _is_role(key: str) -> bool:
    return key.startswith("in ")


# One round


def show(store: Store, number: int) -> Table:
    """A ROUND of `rounds` with, in addition, run, tracks {track: counts}, evaluating
    {"purpose:model": counts}, decisions, training [{checkpoint, model, examples, steps,
    first_loss, last_loss, curve [{step, loss, metrics}]}], judges [{track, purpose, judge, n,
    METRIC ..., statuses, histogram}] (how they did: loop/health.py), evaluations, and samples of
    its examples [{example, track, kind, rule, margin, messages, reference, chosen, chosen_score,
    rejected, rejected_score}].
    """
    found = store.round(number)
    made, decided = store.query(CHECKPOINTS), decisions(store)
    measured = store.query(EVALUATIONS)
    tracks = {
        key.partition(":")[2]: counts
        for key, counts in found.counts.items()
        if key.startswith("train:")
    }
    return {
        "run": the_run(store).name,
        **_round(found, made, decided, measured),
        "tracks": tracks,
        "evaluating": {
            key: counts for key, counts in found.counts.items() if not key.startswith("train:")
        },
        "decisions": [row for row in decided if row["round"] == number],
        "training": [
            curve for row in made if row["round"] == number and (curve := _training(store, row))
        ],
        "judges": _judges(store, found),
        "evaluations": [row for row in measured if row["round"] == number],
        "samples": [
            row | {"messages": parsed(row["messages"])}
            for track in tracks
            for row in store.query(EXAMPLES, round=found.id, track=track, count=SHOWN_EXAMPLES)
        ],
    }


def _judges(store: Store, round: Round) -> list[Table]:
    """A row a judge, track and purpose. `n`: its judgements. A metric that it lacks is left out."""
    found: dict[tuple[str, ...], Table] = {}
    for row in store.health(round.id or 0):
        place = {key: row[key] for key in ("track", "purpose", "judge")}
        own = found.setdefault(tuple(place.values()), place)
        one = row["health"]
        own[one.metric] = one.value
        if one.metric == "unscored":
            own |= {"n": one.n, "statuses": one.detail}
        elif one.metric == "entropy":
            own["histogram"] = one.detail
    return list(found.values())


def _training(store: Store, checkpoint: Table) -> Table | None:
    """How a checkpoint was trained. None for one that was not."""
    id = checkpoint["checkpoint"]
    steps = store.query(TRAINING_STEPS, checkpoint=id)
    if not steps:
        return None
    learned = store.query(
        "SELECT count(*) AS examples FROM trained_on WHERE checkpoint_id = :checkpoint",
        checkpoint=id,
    )
    losses = [step["loss"] for step in steps if step["loss"] is not None]
    curve = [step | {"metrics": parsed(step["metrics"])} for step in _spread(steps)]
    return {
        "checkpoint": id,
        "model": checkpoint["model"],
        "status": checkpoint["status"],
        "examples": learned[0]["examples"],
        "steps": steps[-1]["step"],
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "curve": curve,
    }


def _spread(steps: Sequence[Table]) -> list[Table]:
    """A few of many, first and last among them."""
    if len(steps) <= SHOWN_STEPS:
        return list(steps)
    last = len(steps) - 1
    return [steps[round(place * last / (SHOWN_STEPS - 1))] for place in range(SHOWN_STEPS)]

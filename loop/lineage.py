"""Why an example is what it is: from its prompt to the checkpoints that learned from it.

Every step is a look-up by a key or an index, never a search.
"""

from __future__ import annotations

from rich.console import Console

from loop.report import Table, parsed, the_run
from loop.screen import block, conversation, figure, legible, line
from store.database import Store
from store.errors import UserError

EXAMPLE = """
SELECT example.id AS example, kind, rule, margin, weight, round.number AS round, track,
       asked_id, prompt_id, chosen_id, rejected_id, chosen_judgement_id, rejected_judgement_id
FROM example
JOIN asked ON asked.id = example.asked_id
JOIN round ON round.id = asked.round_id
WHERE example.id = :example
"""

PROMPT = """
SELECT id AS prompt, messages, reference, task, origin, split, digest,
       parent_prompt_id AS parent_prompt, parent_candidate_id AS parent_candidate
FROM prompt WHERE id = :prompt
"""

CANDIDATE = """
SELECT candidate.id AS candidate, "index", text, tokens, finish_reason, logprob, seed, sampling,
       answered.number AS answered_in, checkpoint.id AS checkpoint, model, round.number AS round,
       path, checkpoint.status AS status
FROM candidate
JOIN asked ON asked.id = candidate.asked_id
JOIN round AS answered ON answered.id = asked.round_id
LEFT JOIN checkpoint ON checkpoint.id = candidate.checkpoint_id
LEFT JOIN round ON round.id = checkpoint.round_id
WHERE candidate.id = :candidate
"""

JUDGEMENTS = """
SELECT judgement.id AS judgement, judge, judge_version AS version, round.number AS round, score,
       judgement.status AS status, reason, variance
FROM judgement JOIN round ON round.id = judgement.round_id
WHERE candidate_id = :candidate
ORDER BY judgement.id
"""

VERDICTS = """
SELECT verdict.id AS verdict, judge, judge_version AS version, judge_model,
       candidate_id AS candidate, other_candidate_id AS other_candidate, "order", vote, raw,
       value, status, verdict.seed AS seed, verdict.tokens AS tokens, cost, seconds,
       member, CASE WHEN cached THEN 1 ELSE 0 END AS cached
FROM candidate JOIN verdict ON verdict.candidate_id = candidate.id
WHERE candidate.asked_id = (SELECT asked_id FROM candidate WHERE id = :candidate)
  AND (verdict.candidate_id = :candidate OR verdict.other_candidate_id = :candidate)
ORDER BY verdict.id
"""
"""A comparison is kept with the side that was shown first: the other's is among its group's."""

LEARNED = """
SELECT checkpoint.id AS checkpoint, model, round.number AS round, path,
       checkpoint.status AS status, chosen_reference_logprob, rejected_reference_logprob
FROM trained_on
JOIN checkpoint ON checkpoint.id = trained_on.checkpoint_id
JOIN round ON round.id = checkpoint.round_id
WHERE trained_on.example_id = :example
ORDER BY checkpoint.id
"""

DECIDED = """
SELECT decision, rule, reason FROM decision WHERE checkpoint_id = :checkpoint ORDER BY id
"""

RANGE = """
SELECT (SELECT min(id) FROM example) AS first, (SELECT max(id) FROM example) AS last
"""
"""Two questions: asked for both at once, SQLite reads the whole table."""

WRITER = ("checkpoint", "model", "round", "path", "status")


def why(store: Store, example: int) -> Table:
    """{run, example {example, kind, rule, margin, weight, round, track}, prompt {...},
    candidates [{side, candidate, index, text, tokens, finish_reason, logprob, seed, sampling,
    answered_in (the number of a round; a filter may take what an earlier one answered), written_by
    (None: it came with the data), judgement (the one that counted, or None), judgements (the
    others), verdicts}], learned_by [{checkpoint, model, round, path, status,
    chosen_reference_logprob, rejected_reference_logprob, decisions [{decision, rule, reason}]}]}.

    Raises UserError for an example that is not there.
    """
    stored = -(2**63) <= example < 2**63  # SQLite has no id beyond
    found = store.query(EXAMPLE, example=example) if stored else []
    if not found:
        raise _unknown(store, example)
    row = found[0]
    prompt = store.query(PROMPT, prompt=row["prompt_id"])[0]
    sides = [side for side in ("chosen", "rejected") if row[f"{side}_id"] is not None]
    shown = ("example", "kind", "rule", "margin", "weight", "round", "track")
    return {
        "run": the_run(store).name,
        "example": {key: row[key] for key in shown},
        "prompt": prompt | {"messages": parsed(prompt["messages"])},
        "candidates": [_candidate(store, row, side) for side in sides],
        "learned_by": [
            learner | {"decisions": store.query(DECIDED, checkpoint=learner["checkpoint"])}
            for learner in store.query(LEARNED, example=example)
        ],
    }


def _unknown(store: Store, example: int) -> UserError:
    first, last = store.query(RANGE)[0].values()
    if first is None:
        return UserError(f"no example {example}: {store.root} has no examples yet")
    return UserError(f"no example {example}; {store.root} has examples {first} to {last}")


def _candidate(store: Store, example: Table, side: str) -> Table:
    id = example[f"{side}_id"]
    row = store.query(CANDIDATE, candidate=id)[0]
    writer = {key: row.pop(key) for key in WRITER}
    judgements = store.query(JUDGEMENTS, candidate=id)
    counted = example[f"{side}_judgement_id"]
    used = [each for each in judgements if each["judgement"] == counted]
    return {
        "side": side,
        **row,
        "sampling": parsed(row["sampling"]),
        "written_by": None if writer["checkpoint"] is None else writer,
        "judgement": used[0] if used else None,
        "judgements": [each for each in judgements if each["judgement"] != counted],
        "verdicts": store.query(VERDICTS, candidate=id),
    }


# On a screen


def view(console: Console, found: Table) -> None:
    """The lineage from the top: prompt, candidates, verdicts, rule, checkpoints."""
    example, prompt = found["example"], found["prompt"]
    line(
        console,
        f"example {example['example']}: a {example['kind']} of {found['run']}, "
        f"round {example['round']}, track {example['track']}",
    )
    line(console)
    source = ", ".join(str(prompt[key]) for key in ("task", "origin", "split") if prompt[key])
    line(console, f"prompt {prompt['prompt']}  ({source})")
    conversation(console, prompt["messages"], prompt["reference"])
    for each in found["candidates"]:
        _show_candidate(console, each, example["round"])
    line(console)
    margin = "" if example["margin"] is None else f", margin {figure(example['margin'])}"
    line(console, f"rule {example['rule']}{margin}, weight {figure(example['weight'])}")
    if not found["learned_by"]:
        line(console, "no checkpoint has learned from it yet")
    for each in found["learned_by"]:
        _show_learner(console, each)


def _show_candidate(console: Console, found: Table, round: int) -> None:
    by = found["written_by"]
    who = "it came with the data"
    if by is not None:
        who = f"written by checkpoint {by['checkpoint']} ({by['model']}, round {by['round']})"
    if found["answered_in"] != round:
        who += f" when round {found['answered_in']} asked"
    line(console)
    line(console, f"{found['side']}: candidate {found['candidate']}, {who}")
    block(console, "text", found["text"])
    how = {"tokens": found["tokens"], "finish": found["finish_reason"], "seed": found["seed"]}
    if found["logprob"] is not None:
        how["log-probability"] = figure(found["logprob"])
    how |= {key: value for key, value in (found["sampling"] or {}).items() if value not in ([], ())}
    line(
        console,
        "  " + ", ".join(f"{key} {value}" for key, value in how.items() if value is not None),
    )
    for verdict in found["verdicts"]:
        _show_verdict(console, verdict, found["candidate"])
    if found["judgement"] is not None:
        _show_judgement(console, "judgement", found["judgement"])
    for judgement in found["judgements"]:
        _show_judgement(console, "also judged", judgement)


def _show_verdict(console: Console, found: Table, candidate: int) -> None:
    place = [] if found["member"] is None else [f"member {found['member']}"]
    place.append(f"vote {found['vote']}")
    if found["other_candidate"] is not None:
        other = found["other_candidate"] if found["candidate"] == candidate else found["candidate"]
        place.append(f"against candidate {other}")
        if found["order"] is not None:
            first = (found["candidate"] == candidate) == (found["order"] != 1)
            place.append("shown first" if first else "shown second")
    value = "" if found["value"] is None else f" {figure(found['value'])}"
    said = f"verdict of {found['judge']} {found['version']} ({', '.join(place)}): "
    block(console, f"{said}{found['status']}{value}", found["raw"])


def _show_judgement(console: Console, what: str, found: Table) -> None:
    concluded = found["status"] if found["score"] is None else f"score {figure(found['score'])}"
    reason = "" if not found["reason"] else f": {legible(found['reason'])}"
    line(console, f"  {what} {found['judgement']} of {found['judge']}: {concluded}{reason}")


def _show_learner(console: Console, found: Table) -> None:
    held = [
        f"{side} {figure(found[f'{side}_reference_logprob'])}"
        for side in ("chosen", "rejected")
        if found[f"{side}_reference_logprob"] is not None
    ]
    held_to = f", reference log-probability {', '.join(held)}" if held else ""
    line(
        console,
        f"learned by checkpoint {found['checkpoint']} ({found['model']}, round {found['round']}, "
        f"{found['status']}){held_to}",
    )
    line(console, f"  {found['path']}")
    for each in found["decisions"]:
        line(console, f"  {each['decision']} by {each['rule']}: {each['reason']}")

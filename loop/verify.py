"""Whether what a store says of itself is true: each promise of the schema, checked row by row.

A check is a question whose answer must be no rows. Counts only grow, so while a run is being
driven what is counted must lie between what the round said before and what it says after.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy.exc import DatabaseError

from loop.report import Table, parsed, the_run
from store import checkpoints
from store.database import UNKEPT, Store
from store.errors import UserError
from store.records import Message, Prompt
from store.stages import REJUDGED

MOST = 100
"""Problems named a check; the rest are counted."""

# What each round must have counted, row by row.

COUNT_ASKED = """
SELECT round_id AS round, purpose, track, count(*) AS asked
FROM asked GROUP BY round_id, purpose, track
"""

COUNT_CANDIDATES = """
SELECT round_id AS round, purpose, track, count(*) AS candidates,
       sum(CASE WHEN sampling IS NULL THEN 0 ELSE tokens END) AS generated_tokens,
       sum(CASE WHEN finish_reason = 'length' THEN 1 ELSE 0 END) AS truncated
FROM candidate JOIN asked ON asked.id = candidate.asked_id
GROUP BY round_id, purpose, track
"""

COUNT_JUDGEMENTS = """
SELECT asked.round_id AS round, purpose, track, judge, count(*) AS judged,
       sum(CASE WHEN status = 'ok' THEN 0 ELSE 1 END) AS unscored
FROM judgement JOIN candidate ON candidate.id = judgement.candidate_id
JOIN asked ON asked.id = candidate.asked_id
GROUP BY asked.round_id, purpose, track, judge
"""

COUNT_VERDICTS = """
SELECT asked.round_id AS round, purpose, track, judge, count(*) AS verdicts,
       sum(CASE WHEN cached THEN 0 ELSE coalesce(verdict.tokens, 0) END) AS judge_tokens,
       sum(cost) AS cost
FROM verdict JOIN candidate ON candidate.id = verdict.candidate_id
JOIN asked ON asked.id = candidate.asked_id
GROUP BY asked.round_id, purpose, track, judge, batch
"""
"""By batch, because what a batch cost is rounded when it is written."""

COUNT_EXAMPLES = """
SELECT round_id AS round, purpose, track, count(*) AS examples
FROM example JOIN asked ON asked.id = example.asked_id
GROUP BY round_id, purpose, track
"""

COUNT_DROPPED = """
SELECT round_id AS round, purpose, track, count(*) AS dropped
FROM dropped JOIN asked ON asked.id = dropped.asked_id
GROUP BY round_id, purpose, track
"""

COUNT_REASONS = """
SELECT round_id AS round, purpose, track, reason, count(*) AS prompts
FROM dropped JOIN asked ON asked.id = dropped.asked_id
GROUP BY round_id, purpose, track, reason
"""

COUNTS = (
    *(COUNT_ASKED, COUNT_CANDIDATES, COUNT_JUDGEMENTS, COUNT_VERDICTS),
    *(COUNT_EXAMPLES, COUNT_DROPPED, COUNT_REASONS),
)

# What must not be found.

BOTH = """
SELECT dropped.asked_id AS asked, reason
FROM dropped JOIN example ON example.asked_id = dropped.asked_id
"""

UNANSWERED = """
SELECT asked.id AS asked, number AS round, purpose
FROM asked JOIN round ON round.id = asked.round_id
WHERE round.status <> 'running'
  AND NOT EXISTS (SELECT 1 FROM candidate WHERE candidate.asked_id = asked.id)
  AND NOT EXISTS (SELECT 1 FROM dropped WHERE dropped.asked_id = asked.id)
"""

INDICES = """
SELECT asked_id AS asked, count(*) AS candidates, min("index") AS first, max("index") AS last
FROM candidate GROUP BY asked_id
HAVING min("index") <> 0 OR max("index") <> count(*) - 1
"""

JUDGED_TWICE = """
SELECT candidate_id AS candidate, judge, count(*) AS times
FROM judgement GROUP BY candidate_id, judge HAVING count(*) > 1
"""

SCORES = """
SELECT id AS judgement, status, score FROM judgement
WHERE (status = 'ok') <> (score IS NOT NULL)
"""

SPLITS = """
SELECT asked.id AS asked, prompt.id AS prompt, purpose, split
FROM asked JOIN prompt ON prompt.id = asked.prompt_id
WHERE (purpose = 'train') <> (split = 'train')
"""

TOKENS = """
SELECT id AS candidate, tokens, length(token_ids) AS bytes FROM candidate
WHERE length(token_ids) <> 4 * tokens
   OR (trained_mask IS NOT NULL AND length(trained_mask) <> tokens)
"""

SIDES = """
SELECT example.id AS example, kind
FROM example
JOIN candidate AS chosen ON chosen.id = chosen_id
LEFT JOIN candidate AS rejected ON rejected.id = rejected_id
WHERE (kind = 'pair') <> (rejected_id IS NOT NULL)
   OR rejected.token_ids = chosen.token_ids
   OR EXISTS (
     SELECT 1 FROM candidate AS side
     JOIN asked AS own ON own.id = example.asked_id
     JOIN asked AS answered ON answered.id = side.asked_id
     WHERE side.id IN (chosen_id, rejected_id) AND answered.id <> own.id
       AND (answered.prompt_id, answered.purpose, answered.track)
           <> (own.prompt_id, own.purpose, own.track)
   )
"""
"""A filter may take what an earlier round of its track answered to the same prompt."""

MARGINS = """
SELECT example.id AS example, margin, better.score AS chosen_score, worse.score AS rejected_score
FROM example
LEFT JOIN judgement AS better ON better.id = chosen_judgement_id
LEFT JOIN judgement AS worse ON worse.id = rejected_judgement_id
WHERE better.candidate_id <> chosen_id
   OR worse.candidate_id <> rejected_id
   OR (margin IS NOT NULL AND better.id IS NOT NULL AND better.score IS NULL)
   OR (margin IS NOT NULL AND worse.id IS NOT NULL AND worse.score IS NULL)
   OR abs(margin - (better.score - worse.score)) > 1e-9
"""

ANSWERED_TOO_LATE = """
SELECT example.id AS example, made_in.number AS round, answered_in.number AS answered
FROM example
JOIN asked AS own ON own.id = example.asked_id
JOIN round AS made_in ON made_in.id = own.round_id
JOIN candidate ON candidate.id IN (chosen_id, rejected_id)
JOIN asked AS answered ON answered.id = candidate.asked_id
JOIN round AS answered_in ON answered_in.id = answered.round_id
WHERE answered_in.number > made_in.number
"""

LEARNED_TOO_EARLY = """
SELECT trained_on.checkpoint_id AS checkpoint, example_id AS example,
       made.number AS checkpoint_round, asked_in.number AS example_round
FROM trained_on
JOIN checkpoint ON checkpoint.id = trained_on.checkpoint_id
JOIN round AS made ON made.id = checkpoint.round_id
JOIN example ON example.id = example_id
JOIN asked ON asked.id = example.asked_id
JOIN round AS asked_in ON asked_in.id = asked.round_id
WHERE asked_in.number > made.number
"""

PARENTS = """
SELECT child.id AS checkpoint, child.model AS model, child.parent_id AS parent
FROM checkpoint AS child LEFT JOIN checkpoint AS parent ON parent.id = child.parent_id
JOIN round ON round.id = child.round_id
WHERE (child.parent_id IS NULL
       AND child.id <> (SELECT min(id) FROM checkpoint WHERE model = child.model))
   OR parent.id >= child.id
   OR (parent.model <> child.model AND round.number > 0)
"""

PROMPTS = "SELECT id, messages, digest, split FROM prompt WHERE id > :after ORDER BY id LIMIT 5000"


@dataclass(frozen=True)
class Check:
    """One promise: how many rows it was asked of, and where it does not hold."""

    name: str
    rows: int
    problems: tuple[str, ...]


def verify(store: Store) -> Table:
    """{run, path, ok, checks [{check, rows, problems [sentence], more}]}: `more` is how many
    problems there are beyond those named."""
    found = list(_checks(store))
    return {
        "run": the_run(store).name,
        "path": str(store.root),
        "ok": not any(check.problems for check in found),
        "checks": [
            {
                "check": check.name,
                "rows": check.rows,
                "problems": list(check.problems[:MOST]),
                "more": max(0, len(check.problems) - MOST),
            }
            for check in found
        ],
    }


def _checks(store: Store) -> Iterator[Check]:
    broken = _unreadable(store)
    yield broken
    if broken.problems:
        return  # what a damaged file says of the rest means nothing
    yield _keys(store)
    yield _counts(store)
    yield _accounted(store)
    for name, table, sql in (
        ("no prompt both an example and dropped", "dropped", BOTH),
        ("finished rounds: every asked prompt is answered", "asked", UNANSWERED),
        ("candidates of a prompt numbered 0 to n-1", "candidate", INDICES),
        ("token ids as many as said", "candidate", TOKENS),
        ("judged at most once by each judge", "judgement", JUDGED_TWICE),
        ("a score exactly when the status is ok", "judgement", SCORES),
        ("trained on train prompts, evaluated on others", "asked", SPLITS),
        ("sides of an example answer its prompt and differ", "example", SIDES),
        ("margins are the judgements' scores apart", "example", MARGINS),
        ("no example is made of answers of a later round", "example", ANSWERED_TOO_LATE),
        ("learned only from the same or earlier rounds", "trained_on", LEARNED_TOO_EARLY),
        ("parents of checkpoints", "checkpoint", PARENTS),
    ):
        yield Check(name, _size(store, table), _named(store.query(sql)))
    yield from _prompts(store)
    yield _weights(store)
    yield _leftovers(store)


def _size(store: Store, table: str) -> int:
    return int(store.query(f"SELECT count(*) AS size FROM {table}")[0]["size"])


def _named(rows: Iterable[Table]) -> tuple[str, ...]:
    """A sentence a row: "candidate 7: tokens 3, bytes 8"."""
    return tuple(_sentence(row) for row in rows)


def _sentence(row: Table) -> str:
    (subject, id), *rest = row.items()
    said = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in rest)
    return f"{subject} {id}: {said}" if said else f"{subject} {id}"


def _unreadable(store: Store) -> Check:
    try:
        found = store.unsound()
    except (DatabaseError, UserError) as error:
        found = [str(error)]
    problems = tuple(f"database: {each}" for each in found)
    return Check("the database file is sound", 1, problems)


def _keys(store: Store) -> Check:
    lost = [
        f"{table} {row}: names a {parent} that is not there"
        for table, row, parent in store.lost_keys()
    ]
    return Check("every key names a row (tables)", store.count_tables(), tuple(lost))


# Counts


def _counts(store: Store) -> Check:
    before = store.rounds()
    found = [row for sql in COUNTS for row in store.query(sql)]
    after = {each.id: each for each in store.rounds()}
    counted = _recounted(found, {id: each.counts for id, each in after.items()})
    problems, numbers = [], 0
    for each in before:
        said_after = after[each.id].counts if each.id in after else {}
        own = {key: counts for (round, key), counts in counted.items() if round == each.id}
        for key in sorted(own.keys() | each.counts.keys()):
            rows, low, high = (
                own.get(key, Counter()),
                each.counts.get(key, {}),
                said_after.get(key, {}),
            )
            for what in sorted((rows.keys() | low.keys()) - {*UNKEPT}):
                numbers += 1
                if not low.get(what, 0) <= rows.get(what, 0) <= high.get(what, 0):
                    problems.append(
                        f"round {each.number}, {key}: says {low.get(what, 0):,} {what}, "
                        f"has {rows.get(what, 0):,}"
                    )
    return Check("counts of rounds", numbers, tuple(problems))


def _recounted(
    found: Iterable[Table], known: Mapping[Any, Table]
) -> dict[tuple[int, str], Counter[str]]:
    """(round id, "purpose:track") -> how many rows of what there are.

    known: round id -> its counts, which say what another judge scored when the round was over.
    """
    counted: dict[tuple[int, str], Counter[str]] = defaultdict(Counter)
    for row in found:
        in_round, track = row.pop("round"), row.pop("track")
        place = f"{row.pop('purpose')}:{track}"
        if "reason" in row:
            row = {f"dropped {row['reason']}": row["prompts"]}
        if "cost" in row:
            row["judge_micros"] = round(1e6 * (row.pop("cost") or 0.0))
        if "judge" in row:
            again = f"{REJUDGED}:{track}:{row.pop('judge')}"
            if place == f"train:{track}" and again in known.get(in_round, {}):
                place = again
                row = {re.sub("^judge_", "rejudge_", what): n for what, n in row.items()}
        counted[in_round, place].update(row)
    return counted


def _accounted(store: Store) -> Check:
    """The only question that the store itself can answer with a number alone."""
    lost = store.count_unaccounted()
    asked = store.query("SELECT count(*) AS asked FROM asked WHERE purpose = 'train'")[0]["asked"]
    problems = (f"{lost:,} asked prompts gave neither an example nor a reason",) if lost else ()
    return Check("finished rounds: every prompt an example or dropped", asked, problems)


# Prompts and files


def _prompts(store: Store) -> Iterator[Check]:
    changed, shared, rows, after = [], [], 0, 0
    first: dict[str, tuple[int, str]] = {}
    while found := store.query(PROMPTS, after=after):
        for row in found:
            rows, after, split = rows + 1, row["id"], row["split"]
            prompt = _prompt(row["messages"])
            if prompt is None or prompt.digest != row["digest"]:
                changed.append(f"prompt {after}: its digest is not that of its messages")
                continue
            other, kept_for = first.setdefault(prompt.question_digest, (after, split))
            if kept_for != split:
                shared.append(f"prompt {after}: of {split}, asks what {other} of {kept_for} asks")
    yield Check("digests of prompts", rows, tuple(changed))
    yield Check("splits have no question in common", rows, tuple(shared))


def _prompt(messages: Any) -> Prompt | None:
    """None for messages that are none."""
    try:
        turns = tuple(Message(**turn) for turn in parsed(messages))
    except (json.JSONDecodeError, TypeError, ValueError):
        return None
    return Prompt(messages=turns)


def _weights(store: Store) -> Check:
    kept = [each for each in store.checkpoints() if each.status != "pruned"]
    problems = tuple(
        f"checkpoint {each.id}: {each.path} "
        + ("is not what was recorded" if each.path.is_dir() else "is not there")
        for each in kept
        if not checkpoints.intact(each)
    )
    return Check("digests of checkpoints on disk", len(kept), problems)


def _leftovers(store: Store) -> Check:
    """Folders under a name that says "not finished" in rounds that are."""
    rounds = [each for each in store.rounds() if each.status != "running"]
    names = tuple(f"round-{each.number:04d}-" for each in rounds)
    folders = sorted((store.root / "checkpoints").glob("round-*"))
    problems = tuple(
        f"checkpoints/{each.name}: left over in a finished round"
        for each in folders
        if each.suffix in (".part", ".gone") and each.name.startswith(names)
    )
    return Check("no unfinished folder of a finished round", len(folders), problems)

"""Records to rows and back: the only place that knows how a field is kept in a column."""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

from store.records import (
    Candidate,
    Checkpoint,
    Completion,
    Evaluation,
    Health,
    Judgement,
    Message,
    Prompt,
    Round,
    Run,
    Sampling,
    Verdict,
)

R = TypeVar("R")


def _made(record: type[R], **fields: Any) -> R:
    """A record from a row, not validated again: it was when it was written, and reading a round
    would otherwise take three times as long."""
    made = object.__new__(record)
    made.__dict__.update(fields)
    return made


@lru_cache
def _sampling(written: str) -> Sampling:
    settings = json.loads(written)
    return Sampling(**settings | {"stop": tuple(settings["stop"])})


def pack(token_ids: tuple[int, ...]) -> bytes:
    """Token ids as little-endian uint32."""
    packed = array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack(packed: bytes) -> tuple[int, ...]:
    ids = array("I", packed)
    if sys.byteorder == "big":
        ids.byteswap()
    return tuple(ids)


def prompt_row(prompt: Prompt, run_id: int) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "messages": [
            {"role": turn.role, "content": turn.content} | ({"quoted": True} if turn.quoted else {})
            for turn in prompt.messages
        ],
        "reference": prompt.reference,
        "task": prompt.task,
        "origin": prompt.origin,
        "split": prompt.split,
        "suite": prompt.suite,
        "digest": prompt.digest,
        "columns": prompt.columns,
        "parent_prompt_id": prompt.parent_prompt_id,
        "parent_candidate_id": prompt.parent_candidate_id,
    }


def prompt_record(row: Any) -> Prompt:
    return _made(
        Prompt,
        id=row.id,
        messages=tuple(_made(Message, **turn) for turn in row.messages),
        reference=row.reference,
        task=row.task,
        origin=row.origin,
        split=row.split,
        suite=row.suite,
        columns=row.columns,
        parent_prompt_id=row.parent_prompt_id,
        parent_candidate_id=row.parent_candidate_id,
    )


def candidate_row(
    completion: Completion,
    asked_id: int,
    index: int,
    checkpoint_id: int | None,
    sampling: dict[str, Any] | None,
) -> dict[str, Any]:
    """`sampling` is the completion's own as JSON; a batch shares one, so it is converted once."""
    mask = completion.trained_mask
    return {
        "asked_id": asked_id,
        "index": index,
        "text": completion.text,
        "token_ids": pack(completion.token_ids),
        "tokens": len(completion.token_ids),
        "trained_mask": None if mask is None else bytes(mask),
        "finish_reason": completion.finish_reason,
        "logprob": completion.logprob,
        "seed": completion.seed,
        "sampling": sampling,
        "made_as": completion.made_as,
        "made_with": completion.made_with,
        "checkpoint_id": checkpoint_id,
    }


CANDIDATE_COLUMNS = (
    *("id", "asked_id", "index", "text", "token_ids", "trained_mask", "finish_reason", "logprob"),
    *("seed", "sampling", "made_as", "made_with", "checkpoint_id"),
)
"""In the order in which candidate_record takes them, `sampling` as the text of its JSON."""


def candidate_record(row: Any) -> Candidate:
    """Taken apart by place: it is by far the most read record."""
    id, asked_id, index, text, ids, mask, finish, logprob, seed, *rest = row
    sampling, made_as, made_with, writer = rest
    return _made(
        Candidate,
        id=id,
        asked_id=asked_id,
        index=index,
        text=text,
        token_ids=unpack(ids),
        trained_mask=None if mask is None else tuple(map(bool, mask)),
        finish_reason=finish,
        logprob=logprob,
        seed=seed,
        sampling=None if sampling is None else _sampling(sampling),
        made_as=made_as,
        made_with=made_with,
        checkpoint_id=writer,
    )


def judgement_record(row: Any, verdicts: tuple[Verdict, ...] = ()) -> Judgement:
    return _made(
        Judgement,
        id=row.id,
        candidate_id=row.candidate_id,
        score=row.score,
        status=row.status,
        reason=row.reason,
        variance=row.variance,
        verdicts=verdicts,
    )


def verdict_record(row: Any) -> Verdict:
    return _made(Verdict, **{each.name: getattr(row, each.name) for each in fields(Verdict)})


def checkpoint_record(row: Any) -> Checkpoint:
    return _like(Checkpoint, row, path=Path(row.path), base_path=None, base_digest=None)


def checkpoint_row(checkpoint: Checkpoint) -> dict[str, Any]:
    row = asdict(checkpoint)
    del row["id"], row["base_path"], row["base_digest"]
    return row | {"path": str(checkpoint.path)}


def evaluation_record(row: Any) -> Evaluation:
    return _like(Evaluation, row, items=None if row.items is None else tuple(row.items))


def health_record(row: Any) -> Health:
    return _like(Health, row)


def run_record(row: Any) -> Run:
    return _like(Run, row, changes=tuple(row.changes))


def round_record(row: Any) -> Round:
    return _like(Round, row)


def _like(record: type[R], row: Any, **converted: Any) -> R:
    same: Mapping[str, Any] = {
        item.name: getattr(row, item.name)
        for item in fields(cast(Any, record))
        if item.name not in converted
    }
    return record(**same, **converted)

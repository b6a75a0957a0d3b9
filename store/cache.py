"""What judges' models said, kept across rounds and runs in a file of its own.

It saves money and nothing else: a run that loses it is slower and as right as before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import insert, inspect
from sqlmodel import Field, MetaData, SQLModel, col, select

from store.connect import connect, transaction, write_ahead
from store.errors import UserError
from store.records import Reply
from store.session import now


class ReplyRow(SQLModel, table=True):
    """One reply. `key` is a digest of all that decides it."""

    metadata = MetaData()  # a file of its own, so none of the run's tables belong into it
    __tablename__ = "reply"
    key: str = Field(primary_key=True)
    model: str
    judge_version: str
    question_digest: str
    vote: int
    text: str
    finish_reason: str
    structured: bool
    tokens: int | None
    cost: float | None
    """What it cost when it was said."""
    place: str
    """Which run, round, track, purpose and judge paid for it."""
    said: datetime


class ReplyCache:
    """Replies by key. Several processes may use one file at a time."""

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path} cannot be made: {error.strerror}") from None
        self._engine = connect(path)
        with transaction(self._engine, writes=False) as session:
            tables = inspect(session.connection())
            there = tables.get_columns("reply") if tables.has_table("reply") else []
            found = {each["name"] for each in there}
        if not found:
            write_ahead(self._engine)
            with transaction(self._engine, writes=True) as session:
                ReplyRow.metadata.create_all(session.connection())
        elif found != set(ReplyRow.model_fields):
            raise UserError(f"{path} is no cache of this version of Ratchet")

    def find(self, keys: Sequence[str]) -> dict[str, tuple[str, Reply]]:
        """Key -> (the place that paid for it, the reply), of those that are known."""
        found: dict[str, tuple[str, Reply]] = {}
        with transaction(self._engine, writes=False) as session:
            for start in range(0, len(keys), 10_000):
                chosen = col(ReplyRow.key).in_(keys[start : start + 10_000])
                for row in session.exec(select(ReplyRow).where(chosen)):
                    found[row.key] = (row.place, _reply(row))
        return found

    def add(self, said: Mapping[str, tuple[Mapping[str, Any], Reply]]) -> None:
        """Keep replies: key -> (model, judge_version, question_digest, vote and place; the reply).

        One that is known already stays as it is.
        """
        made = [
            {**about, "key": key, "said": now()}
            | {name: value for name, value in asdict(reply).items() if name in _KEPT}
            for key, (about, reply) in said.items()
        ]
        if made:
            with transaction(self._engine, writes=True) as session:
                session.connection().execute(insert(ReplyRow).prefix_with("OR IGNORE"), made)

    def close(self) -> None:
        self._engine.dispose()


_KEPT = ("text", "finish_reason", "structured", "tokens", "cost")


def _reply(row: ReplyRow) -> Reply:
    return Reply(
        text=row.text,
        finish_reason=row.finish_reason,  # type: ignore[arg-type]
        structured=row.structured,
        tokens=row.tokens,
        seconds=0.0,
        cost=row.cost,
    )

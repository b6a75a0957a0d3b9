"""Store: one run's history. Each method is one transaction.

What the stages of a round write lies in store/stages.py; here are the run, its rounds, its
checkpoints and what was decided on them.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

from sqlalchemy import inspect, update
from sqlmodel import Session, col, select

from store import rows
from store.connect import transaction
from store.copying import TABLES, copy_rows
from store.errors import UserError
from store.postgres import Place
from store.records import (
    Checkpoint,
    CheckpointStatus,
    Decision,
    Evaluation,
    Example,
    Purpose,
    Round,
    RoundStatus,
    Run,
    RunStatus,
    Split,
    Training,
)
from store.session import insert_rows, now
from store.stages import Stages
from store.tables import (
    CheckpointRow,
    DecisionRow,
    EvaluationRow,
    RoundRow,
    RunRow,
    TrainedOnRow,
    TrainingStepRow,
)

UNKEPT = ("proposed_tokens", "making_tokens")
"""Tokens of prompts that were thrown away, and of what led to a completion: they have no rows."""
SAMPLED = ("generated_tokens", "judge_tokens", *UNKEPT)
"""How a round counts the tokens that were sampled in it."""
NOBODY = "?:?:?"
"""A driver that holds the lease and has not said its name yet."""


class Store(Stages):
    """One run's history.

    Raises UserError where there is no database, where it is not one, and where a newer Ratchet
    wrote it.
    """

    # The run and its lease

    def create_run(self, run: Run) -> None:
        row = asdict(run) | {"changes": list(run.changes), "started": run.started or now()}
        with self._write(fenced=False) as session:
            made = RunRow(**row)
            session.add(made)
            session.flush()
            self._run_id = cast(int, made.id)

    def fork_run(self, forked: Run, changes: Sequence[dict[str, Any]]) -> None:
        """Make of a copy of a run's store the store of a run of its own, which goes on."""
        told = ("uuid", "name", "config", "identity", "parent_uuid", "parent_path")
        with self._write() as session:
            run = session.get_one(RunRow, self._run_id)
            for key in told:
                setattr(run, key, getattr(forked, key))
            when = now().isoformat(sep=" ", timespec="seconds")
            run.changes = [*run.changes, *({"when": when, **change} for change in changes)]
            run.status, run.stop_requested = "interrupted", False
            run.driver, run.driver_seen = None, None
            run.started, run.ended = now(), None

    def copy_to(self, database: Path, place: Place | None = None) -> Store:
        """A whole copy of the store, also while somebody reads or writes this one.

        place: where in PostgreSQL the copy is to be. None: in the SQLite file `database`.
        """
        if self.place is None and place is None:
            source: Any = self._engine.raw_connection()
            with contextlib.closing(source), contextlib.closing(sqlite3.connect(database)) as copy:
                source.driver_connection.backup(copy)
            return Store(database)
        made = Store(database, create=True, place=place)
        try:
            with self._read() as session, transaction(made._engine, writes=True) as into:
                copy_rows(session.connection(), into.connection())
        except BaseException:
            made.discard()
            made.close()
            raise
        made.close()
        return Store(database, place=place)

    def discard(self) -> None:
        """Give back what a run that comes to nothing has in PostgreSQL. A file goes with its
        folder."""
        if self.place is not None:
            with transaction(self._engine, writes=True) as session:
                drop = f'DROP SCHEMA IF EXISTS "{self.place.schema}" CASCADE'
                session.connection().exec_driver_sql(drop)

    def unsound(self) -> list[str]:
        """What the database itself finds wrong with how it is kept."""
        if self.place is None:
            found = [next(iter(row.values())) for row in self.query("PRAGMA integrity_check")]
            return [each for each in found if each != "ok"]
        for table in TABLES:  # what cannot be read raises
            self.query(f"SELECT sum(length(kept::text)) FROM {table.name} AS kept")
        return []

    def lost_keys(self) -> list[tuple[str, int, str]]:
        """(table, row, the table in which it names a row that is not there)."""
        if self.place is None:
            found = self.query("PRAGMA foreign_key_check")
            return [(row["table"], row["rowid"], row["parent"]) for row in found]
        return [
            (table.name, row["id"], key.column.table.name)
            for table in TABLES
            for key in sorted(table.foreign_keys, key=lambda key: key.parent.name)
            for row in self.query(
                f"SELECT child.{next(iter(table.primary_key.columns)).name} AS id "
                f"FROM {table.name} AS child LEFT JOIN {key.column.table.name} AS parent "
                f"ON parent.id = child.{key.parent.name} "
                f"WHERE child.{key.parent.name} IS NOT NULL AND parent.id IS NULL"
            )
        ]

    def count_tables(self) -> int:
        with self._read() as session:
            return len(inspect(session.connection()).get_table_names())

    def run(self) -> Run | None:
        """The run that this store belongs to. None until it was created."""
        with self._read() as session:
            row = session.get(RunRow, self._run_id)
        return None if row is None else rows.run_record(row)

    def set_status(self, status: RunStatus, decision: Decision | None = None) -> None:
        """Say how the run stands, and which rule ended it if one did."""
        with self._write() as session:
            run = session.get_one(RunRow, self._run_id)
            run.status, run.ended = status, None if status == "running" else now()
            if decision is not None:
                last = session.exec(_last_round(self._run_id)).one()
                said = session.exec(
                    select(DecisionRow.reason).where(
                        DecisionRow.round_id == last.id, DecisionRow.rule == decision.rule
                    )
                )
                if decision.reason not in set(said):  # an ended run may be started once more
                    self._decide(session, cast(int, last.id), [decision])

    def request_stop(self, requested: bool = True) -> None:
        self._update_run(stop_requested=requested)

    def stop_requested(self) -> bool:
        return bool(self.query("SELECT stop_requested FROM run WHERE id = :run")[0].popitem()[1])

    def note_versions(self, versions: dict[str, str]) -> None:
        """Keep it when a run goes on under other versions than it began with."""
        with self._write() as session:
            run = session.get_one(RunRow, self._run_id)
            when = now().isoformat(sep=" ", timespec="seconds")
            changes = [
                {"when": when, "key": f"versions.{key}", "from": run.versions.get(key), "to": found}
                for key, found in versions.items()
                if run.versions.get(key) != found
            ]
            if changes:
                run.versions, run.changes = versions, [*run.changes, *changes]

    def change_config(self, config: dict[str, Any], changes: Sequence[dict[str, Any]]) -> None:
        """Replace the resolved configuration, and keep what was changed and when."""
        with self._write() as session:
            run = session.get_one(RunRow, self._run_id)
            run.config = config
            when = now().isoformat(sep=" ", timespec="seconds")
            run.changes = [*run.changes, *({"when": when, **change} for change in changes)]
            session.add(run)

    def _update_run(self, **values: Any) -> None:
        with self._write() as session:
            session.execute(update(RunRow).where(col(RunRow.id) == self._run_id).values(**values))

    def take_lease(
        self, driver: str, *, timeout: timedelta, dead: Iterable[str] = ()
    ) -> str | None:
        """Become the run's only driver. Returns the one who is, if it is another and alive.

        timeout: after this long without `renew_lease` a driver counts as dead.
        dead: drivers that the caller knows to be dead. PostgreSQL knows that itself: a driver's
        lock goes with its connection.
        """
        held = None if self._lock is None else self._lock.hold(timeout)
        with self._write(fenced=False) as session:
            run = session.get_one(RunRow, self._run_id)
            fresh = run.driver_seen is not None and now() - run.driver_seen < timeout
            alive = run.driver not in (None, driver, *dead) and fresh
            if alive if held is None else not held:
                return run.driver or NOBODY
            run.driver, run.driver_seen, run.stop_requested = driver, now(), False
            session.add(run)
        self._driver = driver if held else None
        return None

    def is_driven(self) -> bool | None:
        """Whether some process holds the run's lease. None: SQLite cannot know."""
        if self._lock is None:
            return None
        with self._read() as session:
            return self._lock.is_held(session.connection())

    def renew_lease(self, driver: str) -> bool:
        """Say that the driver lives. False: another has taken over."""
        if self._lock is not None and not self._lock.hold():
            return False
        with self._write(fenced=False) as session:
            held = update(RunRow).where(
                col(RunRow.id) == self._run_id, col(RunRow.driver) == driver
            )
            done = session.connection().execute(held.values(driver_seen=now()))
            return done.rowcount == 1

    def release_lease(self, driver: str) -> None:
        self._driver = None
        try:
            with self._write() as session:
                held = update(RunRow).where(
                    col(RunRow.id) == self._run_id, col(RunRow.driver) == driver
                )
                session.execute(held.values(driver=None, driver_seen=None))
        finally:
            if self._lock is not None:
                self._lock.release()

    # Rounds

    def rounds(self) -> list[Round]:
        with self._read() as session:
            found = session.exec(
                select(RoundRow)
                .where(RoundRow.run_id == self._run_id)
                .order_by(col(RoundRow.number))
            )
            return [rows.round_record(row) for row in found]

    def round(self, number: int) -> Round:
        for found in self.rounds():
            if found.number == number:
                return found
        raise UserError(f"no round {number}; the run has {len(self.rounds())} rounds, from 0")

    def open_round(self, number: int, stage: str) -> Round:
        with self._write() as session:
            row = RoundRow(
                run_id=self._run_id,
                number=number,
                stage=stage,
                status="running",
                counts={},
                seconds={},
                started=now(),
                ended=None,
            )
            session.add(row)
            session.flush()
            return rows.round_record(row)

    def set_stage(self, round_id: int, stage: str) -> None:
        with self._write() as session:
            session.get_one(RoundRow, round_id).stage = stage

    def close_round(
        self,
        round_id: int,
        status: RoundStatus,
        decisions: Sequence[Decision] = (),
        statuses: Mapping[int, CheckpointStatus] | None = None,
    ) -> None:
        """End a round with its decisions: all models' checkpoints change status together."""
        with self._write() as session:
            row = session.get_one(RoundRow, round_id)
            row.status, row.stage, row.ended = status, "done", now()
            self._decide(session, round_id, decisions)
            for checkpoint_id, changed in (statuses or {}).items():
                session.get_one(CheckpointRow, checkpoint_id).status = changed

    def _decide(self, session: Session, round_id: int, decisions: Sequence[Decision]) -> None:
        for decision in decisions:
            session.add(DecisionRow(run_id=self._run_id, round_id=round_id, **asdict(decision)))

    def add_seconds(self, round_id: int, seconds: Mapping[str, float]) -> None:
        with self._write() as session:
            row = session.get_one(RoundRow, round_id)
            total = Counter(row.seconds)
            total.update(seconds)
            row.seconds = dict(total)

    def generated_tokens(self) -> int:
        """Tokens that models of this run sampled: answers, judgements and proposals."""
        return sum(
            sum(counts.get(kind, 0) for kind in SAMPLED)
            for each in self.rounds()
            for counts in each.counts.values()
        )

    def judge_cost(self) -> float:
        """What judges' models cost so far, in the currency of their servers' prices."""
        counts = (counts for each in self.rounds() for counts in each.counts.values())
        return sum(each.get("judge_micros", 0) for each in counts) / 1e6

    # Checkpoints

    def add_checkpoint(
        self,
        round_id: int,
        checkpoint: Checkpoint,
        training: Training | None = None,
        examples: Sequence[Example] = (),
    ) -> Checkpoint:
        """A checkpoint, and if it was trained: its steps and what it learned from."""
        row = rows.checkpoint_row(checkpoint)
        if checkpoint.path.is_relative_to(self.root):
            row["path"] = str(checkpoint.path.relative_to(self.root))  # so that a run can be moved
        with self._write() as session:
            made = CheckpointRow(run_id=self._run_id, round_id=round_id, **row)
            session.add(made)
            session.flush()
            if training is not None:
                self._trained(session, cast(int, made.id), training, examples)
            return self._checkpoint(session, made)

    def _trained(
        self, session: Session, id: int, training: Training, examples: Sequence[Example]
    ) -> None:
        steps = [
            {
                "checkpoint_id": id,
                "step": step.step,
                "loss": step.loss,
                "metrics": dict(sorted(step.metrics.items())),
            }
            for step in training.steps
        ]
        held_to = training.reference_logprobs
        learned = [
            {
                "checkpoint_id": id,
                "example_id": example.id,
                "chosen_reference_logprob": held_to.get(cast(int, example.id), (None, None))[0],
                "rejected_reference_logprob": held_to.get(cast(int, example.id), (None, None))[1],
            }
            for example in examples
        ]
        insert_rows(session, TrainingStepRow, steps)
        insert_rows(session, TrainedOnRow, learned)

    def _checkpoint(self, session: Session, row: CheckpointRow) -> Checkpoint:
        found = rows.checkpoint_record(row)
        found = replace(found, path=self.root / found.path)
        if row.base_id is None:
            return found
        base = session.get_one(CheckpointRow, row.base_id)
        return replace(found, base_path=self.root / base.path, base_digest=base.digest)

    def checkpoints(
        self, model: str | None = None, round_id: int | None = None
    ) -> list[Checkpoint]:
        with self._read() as session:
            chosen = select(CheckpointRow).where(CheckpointRow.run_id == self._run_id)
            if model is not None:
                chosen = chosen.where(CheckpointRow.model == model)
            if round_id is not None:
                chosen = chosen.where(CheckpointRow.round_id == round_id)
            found = session.exec(chosen.order_by(col(CheckpointRow.id)))
            return [self._checkpoint(session, row) for row in found]

    def incumbent(self, model: str) -> Checkpoint:
        """The checkpoint of `model` that was accepted last."""
        accepted = [each for each in self.checkpoints(model) if each.status == "accepted"]
        return accepted[-1]

    def beginning(self, model: str) -> Checkpoint:
        """The checkpoint that the rounds of `model` began from: the warm-up's, or what it was."""
        made = self.checkpoints(model, self.round(0).id)
        return next(each for each in reversed(made) if each.status != "diverged")

    def set_pruned(self, checkpoint_ids: Sequence[int]) -> None:
        with self._write() as session:
            session.execute(
                update(CheckpointRow)
                .where(col(CheckpointRow.id).in_(checkpoint_ids))
                .values(status="pruned")
            )

    # Evaluations and decisions

    def add_evaluations(
        self, round_id: int, checkpoint_id: int, evaluations: Sequence[Evaluation]
    ) -> None:
        by = {"round_id": round_id, "checkpoint_id": checkpoint_id}
        with self._write() as session:
            insert_rows(session, EvaluationRow, [by | asdict(each) for each in evaluations])

    def evaluations(self, checkpoint_id: int) -> list[Evaluation]:
        with self._read() as session:
            found = session.exec(
                select(EvaluationRow)
                .where(EvaluationRow.checkpoint_id == checkpoint_id)
                .order_by(col(EvaluationRow.id))
            )
            return [rows.evaluation_record(row) for row in found]

    def scores(
        self,
        checkpoint_id: int,
        split: Split,
        judge: str,
        suite: str = "held_out",
        purpose: Purpose = "sampled",
    ) -> dict[int, list[float]]:
        """Prompt id -> scores of the answers by which the checkpoint was evaluated."""
        found = self.query(
            "SELECT prompt.id AS prompt_id, score FROM judgement "
            "JOIN candidate ON candidate.id = judgement.candidate_id "
            "JOIN asked ON asked.id = candidate.asked_id "
            "JOIN prompt ON prompt.id = asked.prompt_id "
            "WHERE candidate.checkpoint_id = :checkpoint AND asked.purpose = :purpose "
            "AND prompt.split = :split AND prompt.suite = :suite AND judgement.judge = :judge "
            "AND score IS NOT NULL "
            "ORDER BY prompt.id, candidate.id",
            checkpoint=checkpoint_id,
            split=split,
            suite=suite,
            judge=judge,
            purpose=purpose,
        )
        scores: dict[int, list[float]] = defaultdict(list)
        for row in found:
            scores[row["prompt_id"]].append(row["score"])
        return dict(scores)


def _last_round(run_id: int) -> Any:
    newest = select(RoundRow).where(RoundRow.run_id == run_id)
    return newest.order_by(col(RoundRow.number).desc()).limit(1)

"""Store: the only module that opens a session. Each method is one transaction.

A store belongs to one run. Every "what is left?" is answered from rows, never from a mark that
could disagree with them; the counts of a round are changed in the transaction that writes the
rows they count.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

from sqlalchemy import Text, exists, func, insert, text, update
from sqlalchemy import cast as sql_cast
from sqlalchemy import select as plain_select
from sqlmodel import Session, SQLModel, col, select

from store import rows
from store.connect import connect, transaction
from store.errors import UserError
from store.migrations import LATEST, migrate, version
from store.records import (
    Candidate,
    Checkpoint,
    CheckpointStatus,
    Completion,
    Decision,
    Evaluation,
    Example,
    Group,
    Judgement,
    Prompt,
    Purpose,
    Round,
    RoundStatus,
    Run,
    RunStatus,
    Selection,
    Split,
    Training,
)
from store.tables import (
    AskedRow,
    CandidateRow,
    CheckpointRow,
    DecisionRow,
    DroppedRow,
    EvaluationRow,
    ExampleRow,
    JudgementRow,
    PromptRow,
    RoundRow,
    RunRow,
    TrainedOnRow,
    TrainingStepRow,
    VerdictRow,
)


def now() -> datetime:
    """Now in UTC, as every time in the store."""
    return datetime.now(UTC)


class Store:
    """One run's history.

    Raises UserError where there is no database, where it is not one, and where a newer Ratchet
    wrote it.
    """

    def __init__(self, database: Path, *, create: bool = False) -> None:
        if not create and not database.is_file():
            raise UserError(f"no run in {database.parent}: it has no {database.name}")
        self.root = database.parent
        self._engine = connect(database)
        with self._read() as session:
            found = version(session.connection())
        if found != LATEST:
            with self._write() as session:
                migrate(session.connection())
        with self._read() as session:
            run = session.exec(select(RunRow)).first()
        self._run_id = 0 if run is None else cast(int, run.id)

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _read(self) -> Iterator[Session]:
        with transaction(self._engine, writes=False) as session:
            yield session

    @contextmanager
    def _write(self) -> Iterator[Session]:
        with transaction(self._engine, writes=True) as session:
            yield session

    def query(self, sql: str, **parameters: Any) -> list[dict[str, Any]]:
        """The rows that a SELECT gives; `:run` stands for this run."""
        with self._read() as session:
            found = session.connection().execute(text(sql), {"run": self._run_id} | parameters)
            return [dict(row) for row in found.mappings()]

    # The run and its lease

    def create_run(self, run: Run) -> None:
        row = asdict(run) | {"changes": list(run.changes), "started": run.started or now()}
        with self._write() as session:
            made = RunRow(**row)
            session.add(made)
            session.flush()
            self._run_id = cast(int, made.id)

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
                self._decide(session, cast(int, last.id), [decision])

    def request_stop(self, requested: bool = True) -> None:
        self._update_run(stop_requested=requested)

    def stop_requested(self) -> bool:
        return bool(self.query("SELECT stop_requested FROM run WHERE id = :run")[0].popitem()[1])

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
        dead: drivers that the caller knows to be dead.
        """
        with self._write() as session:
            run = session.get_one(RunRow, self._run_id)
            fresh = run.driver_seen is not None and now() - run.driver_seen < timeout
            if run.driver not in (None, driver, *dead) and fresh:
                return run.driver
            run.driver, run.driver_seen, run.stop_requested = driver, now(), False
            session.add(run)
        return None

    def renew_lease(self, driver: str) -> bool:
        """Say that the driver lives. False: another has taken over."""
        with self._write() as session:
            held = update(RunRow).where(
                col(RunRow.id) == self._run_id, col(RunRow.driver) == driver
            )
            done = session.connection().execute(held.values(driver_seen=now()))
            return done.rowcount == 1

    def release_lease(self, driver: str) -> None:
        with self._write() as session:
            held = update(RunRow).where(
                col(RunRow.id) == self._run_id, col(RunRow.driver) == driver
            )
            session.execute(held.values(driver=None, driver_seen=None))

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

    def add_decisions(self, round_id: int, decisions: Sequence[Decision]) -> None:
        with self._write() as session:
            self._decide(session, round_id, decisions)

    def _decide(self, session: Session, round_id: int, decisions: Sequence[Decision]) -> None:
        for decision in decisions:
            session.add(DecisionRow(run_id=self._run_id, round_id=round_id, **asdict(decision)))

    def add_seconds(self, round_id: int, seconds: Mapping[str, float]) -> None:
        with self._write() as session:
            row = session.get_one(RoundRow, round_id)
            total = Counter(row.seconds)
            total.update(seconds)
            row.seconds = dict(total)

    def _count(self, session: Session, round_id: int, key: str, **added: int) -> None:
        row = session.get_one(RoundRow, round_id)
        counted = Counter(row.counts.get(key, {}))
        counted.update(added)
        row.counts = row.counts | {key: dict(counted)}

    def generated_tokens(self) -> int:
        """Tokens that this run's policies sampled, for whatever purpose."""
        return sum(
            counts.get("generated_tokens", 0)
            for each in self.rounds()
            for counts in each.counts.values()
        )

    # Prompts and what is asked

    def add_prompts(self, prompts: Sequence[Prompt]) -> None:
        with self._write() as session:
            self._prompt_ids(session, prompts)

    def _prompt_ids(self, session: Session, prompts: Sequence[Prompt]) -> list[int]:
        """Ids of the prompts' rows, made where there are none."""
        digests = [prompt.digest for prompt in prompts]
        known = self._known(session, digests)
        new = {d: p for d, p in zip(digests, prompts, strict=True) if d not in known}
        if new:
            made = [rows.prompt_row(prompt, self._run_id) for prompt in new.values()]
            _insert(session, PromptRow, made)
            known = self._known(session, digests)
        for digest, prompt in zip(digests, prompts, strict=True):
            if known[digest][1] != prompt.split:
                raise ValueError(
                    f"a prompt of split {prompt.split!r} is already kept for {known[digest][1]!r}: "
                    f"{prompt.messages[-1].content[:80]!r}"
                )
        return [known[digest][0] for digest in digests]

    def _known(self, session: Session, digests: Sequence[str]) -> dict[str, tuple[int, str]]:
        known: dict[str, tuple[int, str]] = {}
        for start in range(0, len(digests), 10_000):
            found = session.exec(
                select(PromptRow.digest, PromptRow.id, PromptRow.split).where(
                    PromptRow.run_id == self._run_id,
                    col(PromptRow.digest).in_(digests[start : start + 10_000]),
                )
            )
            known |= {digest: (cast(int, id), split) for digest, id, split in found}
        return known

    def prompts(self, split: Split) -> list[Prompt]:
        """The prompts of a split in the order they were added."""
        with self._read() as session:
            found = session.exec(
                select(PromptRow)
                .where(PromptRow.run_id == self._run_id, PromptRow.split == split)
                .order_by(col(PromptRow.id))
            )
            return [rows.prompt_record(row) for row in found]

    def count_prompts(self, split: Split) -> int:
        found = self.query(
            "SELECT count(*) AS n FROM prompt WHERE run_id = :run AND split = :split", split=split
        )
        return int(found[0]["n"])

    def held_out_digests(self) -> frozenset[str]:
        """Of the prompts of every split but train."""
        found = self.query("SELECT digest FROM prompt WHERE run_id = :run AND split != 'train'")
        return frozenset(row["digest"] for row in found)

    def asked_digests(self) -> frozenset[str]:
        """Of the prompts asked for training in any round so far."""
        found = self.query(
            "SELECT DISTINCT digest FROM prompt JOIN asked ON asked.prompt_id = prompt.id "
            "WHERE run_id = :run AND purpose = 'train'"
        )
        return frozenset(row["digest"] for row in found)

    def is_asked(self, round_id: int, track: str, purpose: Purpose) -> bool:
        with self._read() as session:
            return (
                session.exec(_asked(select(AskedRow.id), round_id, track, purpose)).first()
                is not None
            )

    def ask(
        self,
        round_id: int,
        track: str,
        purpose: Purpose,
        prompts: Sequence[Prompt],
        batch_size: int,
    ) -> None:
        """Write which prompts are asked, and in which batches; new prompts are stored."""
        with self._write() as session:
            ids = self._prompt_ids(session, prompts)
            made = [
                {
                    "round_id": round_id,
                    "prompt_id": prompt_id,
                    "track": track,
                    "purpose": purpose,
                    "batch": place // batch_size,
                }
                for place, prompt_id in enumerate(ids)
            ]
            _insert(session, AskedRow, made)
            self._count(session, round_id, f"{purpose}:{track}", asked=len(made))

    # Candidates

    def unsampled(self, round_id: int, track: str, purpose: Purpose) -> list[int]:
        """The batches that have no candidates yet."""
        answered = exists().where(col(CandidateRow.asked_id) == AskedRow.id)
        return self._batches(round_id, track, purpose, ~answered)

    def _batches(self, round_id: int, track: str, purpose: Purpose, left: Any) -> list[int]:
        with self._read() as session:
            chosen = _asked(select(AskedRow.batch), round_id, track, purpose).where(left).distinct()
            return sorted(session.exec(chosen))

    def groups(
        self, round_id: int, track: str, purpose: Purpose, batch: int | None = None
    ) -> list[Group]:
        """Asked prompts with the candidates that they have so far."""
        with self._read() as session:
            chosen = _columns(PromptRow, asked_id=AskedRow.id).join(AskedRow)
            chosen = _asked(chosen, round_id, track, purpose).order_by(col(AskedRow.id))
            answered = _candidates().join(AskedRow)
            answered = _asked(answered, round_id, track, purpose)
            answered = answered.order_by(CandidateRow.asked_id, CandidateRow.index)
            if batch is not None:
                chosen = chosen.where(AskedRow.batch == batch)
                answered = answered.where(AskedRow.batch == batch)
            candidates: dict[int, list[Candidate]] = defaultdict(list)
            for each in map(rows.candidate_record, session.connection().execute(answered)):
                candidates[each.asked_id].append(each)
            return [
                Group(
                    asked_id=row.asked_id,
                    prompt=rows.prompt_record(row),
                    candidates=tuple(candidates[row.asked_id]),
                )
                for row in session.connection().execute(chosen)
            ]

    def add_candidates(
        self,
        round_id: int,
        track: str,
        purpose: Purpose,
        checkpoint_id: int | None,
        completions: Mapping[int, Sequence[Completion]],
    ) -> None:
        """Write a batch: asked id -> its completions. What nobody sampled has no checkpoint."""
        made: list[dict[str, Any]] = []
        generated = 0
        settings: dict[Any, dict[str, Any] | None] = {None: None}
        for asked_id, answers in completions.items():
            for index, answer in enumerate(answers):
                if answer.sampling not in settings:
                    settings[answer.sampling] = asdict(cast(Any, answer.sampling))
                sampled = answer.sampling is not None
                generated += len(answer.token_ids) if sampled else 0
                writer = checkpoint_id if sampled else None
                made.append(
                    rows.candidate_row(answer, asked_id, index, writer, settings[answer.sampling])
                )
        with self._write() as session:
            _insert(session, CandidateRow, made)
            self._count(
                session,
                round_id,
                f"{purpose}:{track}",
                candidates=len(made),
                generated_tokens=generated,
                truncated=sum(row["finish_reason"] == "length" for row in made),
            )

    # Judgements

    def unjudged(self, round_id: int, track: str, purpose: Purpose, judge: str) -> list[int]:
        """The batches with a candidate on which `judge` has not concluded in this round."""
        judged = exists().where(
            col(JudgementRow.candidate_id) == CandidateRow.id,
            col(JudgementRow.judge) == judge,
            col(JudgementRow.round_id) == round_id,
        )
        left = exists().where(col(CandidateRow.asked_id) == AskedRow.id, ~judged)
        return self._batches(round_id, track, purpose, left)

    def add_judgements(
        self,
        round_id: int,
        track: str,
        purpose: Purpose,
        judge: str,
        judge_version: str,
        judge_model: str | None,
        judgements: Sequence[Judgement],
    ) -> None:
        """Write a batch's judgements and the verdicts behind them."""
        by = {"round_id": round_id, "judge": judge, "judge_version": judge_version}
        concluded = [
            {
                **by,
                "candidate_id": judgement.candidate_id,
                "score": judgement.score,
                "status": judgement.status,
                "reason": judgement.reason,
                "variance": judgement.variance,
            }
            for judgement in judgements
        ]
        said = [
            {**by, "judge_model": judge_model, **vars(verdict)}
            for judgement in judgements
            for verdict in judgement.verdicts
        ]
        with self._write() as session:
            _insert(session, JudgementRow, concluded)
            _insert(session, VerdictRow, said)
            self._count(
                session,
                round_id,
                f"{purpose}:{track}",
                judged=len(concluded),
                verdicts=len(said),
                unscored=sum(row["status"] != "ok" for row in concluded),
            )

    def judgements(
        self, round_id: int, track: str, purpose: Purpose, judge: str, batch: int | None = None
    ) -> list[Judgement]:
        """What `judge` concluded, without the verdicts."""
        with self._read() as session:
            chosen = _columns(JudgementRow).join(CandidateRow).join(AskedRow)
            chosen = _asked(chosen, round_id, track, purpose)
            chosen = chosen.where(JudgementRow.judge == judge, JudgementRow.round_id == round_id)
            if batch is not None:
                chosen = chosen.where(AskedRow.batch == batch)
            found = session.connection().execute(chosen.order_by(col(JudgementRow.id)))
            return [rows.judgement_record(row) for row in found]

    def scores(self, checkpoint_id: int, split: Split, judge: str) -> dict[int, list[float]]:
        """Prompt id -> scores of the sampled answers by which the checkpoint was evaluated."""
        found = self.query(
            "SELECT prompt.id AS prompt_id, score FROM judgement "
            "JOIN candidate ON candidate.id = judgement.candidate_id "
            "JOIN asked ON asked.id = candidate.asked_id "
            "JOIN prompt ON prompt.id = asked.prompt_id "
            "WHERE candidate.checkpoint_id = :checkpoint AND asked.purpose = 'sampled' "
            "AND prompt.split = :split AND judgement.judge = :judge AND score IS NOT NULL "
            "ORDER BY prompt.id, candidate.id",
            checkpoint=checkpoint_id,
            split=split,
            judge=judge,
        )
        scores: dict[int, list[float]] = defaultdict(list)
        for row in found:
            scores[row["prompt_id"]].append(row["score"])
        return dict(scores)

    # Examples

    def is_filtered(self, round_id: int, track: str) -> bool:
        """Whether each prompt asked for training gave an example or a reason."""
        kept = exists().where(col(ExampleRow.asked_id) == AskedRow.id)
        dropped = exists().where(col(DroppedRow.asked_id) == AskedRow.id)
        with self._read() as session:
            left = _asked(select(AskedRow.id), round_id, track, "train").where(~kept, ~dropped)
            return session.exec(left).first() is None

    def add_selection(self, round_id: int, track: str, selection: Selection) -> None:
        made = [
            {
                "asked_id": example.asked_id,
                "kind": example.kind,
                "chosen_id": example.chosen.id,
                "rejected_id": None if example.rejected is None else example.rejected.id,
                "margin": example.margin,
                "weight": example.weight,
                "rule": example.rule,
                "chosen_judgement_id": example.chosen_judgement_id,
                "rejected_judgement_id": example.rejected_judgement_id,
            }
            for example in selection.examples
        ]
        lost = [{"asked_id": drop.asked_id, "reason": drop.reason} for drop in selection.dropped]
        reasons = Counter(f"dropped {drop.reason}" for drop in selection.dropped)
        with self._write() as session:
            _insert(session, ExampleRow, made)
            _insert(session, DroppedRow, lost)
            self._count(
                session,
                round_id,
                f"train:{track}",
                examples=len(made),
                dropped=len(lost),
                **reasons,
            )

    def count_examples(self, round_id: int) -> int:
        """How many examples the round's tracks gave."""
        found = self.query(
            "SELECT count(*) AS n FROM example JOIN asked ON asked.id = example.asked_id "
            "WHERE asked.round_id = :round",
            round=round_id,
        )
        return int(found[0]["n"])

    def examples(self, round_id: int, tracks: Sequence[str]) -> list[Example]:
        """The examples that these tracks gave in a round, in the order they were selected."""
        with self._read() as session:
            mine = (AskedRow.round_id == round_id, col(AskedRow.track).in_(tracks))
            chosen = _columns(ExampleRow, prompt_id=AskedRow.prompt_id).join(AskedRow).where(*mine)
            found = session.connection().execute(chosen.order_by(col(ExampleRow.id))).all()
            asked = _columns(PromptRow).join(AskedRow).where(*mine)
            prompts = {
                row.id: rows.prompt_record(row) for row in session.connection().execute(asked)
            }
            used = exists().where(
                (col(ExampleRow.chosen_id) == CandidateRow.id)
                | (col(ExampleRow.rejected_id) == CandidateRow.id)
            )
            needed = _candidates().join(AskedRow).where(*mine, used)
            answers = map(rows.candidate_record, session.connection().execute(needed))
            candidates = {each.id: each for each in answers}
        return [
            Example(
                id=row.id,
                kind=row.kind,
                asked_id=row.asked_id,
                prompt=prompts[row.prompt_id],
                chosen=candidates[row.chosen_id],
                rejected=None if row.rejected_id is None else candidates[row.rejected_id],
                margin=row.margin,
                weight=row.weight,
                rule=row.rule,
                chosen_judgement_id=row.chosen_judgement_id,
                rejected_judgement_id=row.rejected_judgement_id,
            )
            for row in found
        ]

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
        return self._checkpoint(made)

    def _trained(
        self, session: Session, id: int, training: Training, examples: Sequence[Example]
    ) -> None:
        steps = [{"checkpoint_id": id, **asdict(step)} for step in training.steps]
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
        _insert(session, TrainingStepRow, steps)
        _insert(session, TrainedOnRow, learned)

    def _checkpoint(self, row: CheckpointRow) -> Checkpoint:
        found = rows.checkpoint_record(row)
        return replace(found, path=self.root / found.path)

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
            return [self._checkpoint(row) for row in found]

    def incumbent(self, model: str) -> Checkpoint:
        """The checkpoint of `model` that was accepted last."""
        accepted = [each for each in self.checkpoints(model) if each.status == "accepted"]
        return accepted[-1]

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
            _insert(session, EvaluationRow, [by | asdict(each) for each in evaluations])

    def evaluations(self, checkpoint_id: int) -> list[Evaluation]:
        with self._read() as session:
            found = session.exec(
                select(EvaluationRow)
                .where(EvaluationRow.checkpoint_id == checkpoint_id)
                .order_by(col(EvaluationRow.id))
            )
            return [rows.evaluation_record(row) for row in found]

    def count_unaccounted(self) -> int:
        """Prompts asked for training in finished rounds with neither example nor reason."""
        with self._read() as session:
            kept = exists().where(col(ExampleRow.asked_id) == AskedRow.id)
            dropped = exists().where(col(DroppedRow.asked_id) == AskedRow.id)
            chosen = (
                select(func.count())
                .select_from(AskedRow)
                .join(RoundRow)
                .where(AskedRow.purpose == "train", RoundRow.status != "running", ~kept, ~dropped)
            )
            return session.exec(chosen).one()


def _last_round(run_id: int) -> Any:
    newest = select(RoundRow).where(RoundRow.run_id == run_id)
    return newest.order_by(col(RoundRow.number).desc()).limit(1)


def _asked(chosen: Any, round_id: int, track: str, purpose: Purpose) -> Any:
    return chosen.where(
        col(AskedRow.round_id) == round_id,
        col(AskedRow.track) == track,
        col(AskedRow.purpose) == purpose,
    )


def _columns(table: type[SQLModel], **more: Any) -> Any:
    """SELECT a table's columns as plain rows, and `more` under their names: ten times faster than
    as objects that the ORM keeps track of."""
    named = [column.label(name) for name, column in more.items()]
    return plain_select(*cast(Any, table).__table__.c, *named).select_from(table)


def _candidates() -> Any:
    """SELECT what rows.candidate_record takes."""
    table = cast(Any, CandidateRow).__table__
    return plain_select(
        *(
            sql_cast(table.c[name], Text) if name == "sampling" else table.c[name]
            for name in rows.CANDIDATE_COLUMNS
        )
    ).select_from(table)


def _insert(session: Session, table: type[SQLModel], made: Sequence[Mapping[str, Any]]) -> None:
    """Insert many rows at once, past the ORM's bookkeeping of each."""
    if made:
        session.connection().execute(insert(cast(Any, table).__table__), list(made))

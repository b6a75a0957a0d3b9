"""The store: its schema, its transactions, and that what is written comes back."""

import ast
import inspect
import itertools
import math
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import typing
from dataclasses import FrozenInstanceError, fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy
from pydantic import TypeAdapter, ValidationError
from sqlalchemy.exc import IntegrityError
from sqlmodel import SQLModel, select

from loop.report import parsed
from store import database, postgres, records, stages, tables
from store.connect import connect, transaction
from store.database import Store
from store.errors import UserError
from store.migrations import LATEST, migrate
from store.postgres import Place, new_place
from store.records import (
    Candidate,
    Checkpoint,
    Completion,
    Decision,
    Dropped,
    Evaluation,
    Example,
    Health,
    Judgement,
    Message,
    Prompt,
    Run,
    Sampling,
    Selection,
    Training,
    TrainingStep,
    Verdict,
)

TRAIN = ("main", "train")
SAMPLED = Sampling(temperature=0.7, top_p=0.9, top_k=5, max_tokens=64, stop=("\n\n", "###"))


def prompt(words: object, **more) -> Prompt:
    return Prompt(messages=(Message(role="user", content=str(words)),), **more)


def completions(groups, n=2, **more) -> dict[int, list[Completion]]:
    return {
        group.asked_id: [
            Completion(
                text=f"answer {index}",
                token_ids=(index, group.asked_id, 7),
                logprob=-1.5,
                seed=2**63 - 1 - index,
                sampling=SAMPLED,
                **more,
            )
            for index in range(n)
        ]
        for group in groups
    }


def judgements(groups) -> list[Judgement]:
    return [
        Judgement(
            candidate_id=each.id,
            score=float(each.index),
            verdicts=(Verdict(candidate_id=each.id, raw=f"I give {each.index}", value=each.index),),
        )
        for group in groups
        for each in group.candidates
    ]


def pairs(groups, judged) -> tuple[Example, ...]:
    by_candidate = {each.candidate_id: each for each in judged}
    return tuple(
        Example(
            kind="pair",
            asked_id=group.asked_id,
            prompt=group.prompt,
            chosen=group.candidates[1],
            rejected=group.candidates[0],
            margin=1.0,
            rule="best_worst",
            chosen_judgement_id=by_candidate[group.candidates[1].id].id,
            rejected_judgement_id=by_candidate[group.candidates[0].id].id,
        )
        for group in groups
    )


def place_of(url: str | None) -> Place | None:
    return None if url is None else new_place(url, None, "test")


def new_store(root: Path, url: str | None = None) -> Store:
    root.mkdir(parents=True, exist_ok=True)
    store = Store(root / "loop.db", create=True, place=place_of(url))
    store.create_run(
        Run(uuid="u", name="n", config={"a": [1]}, identity="i", seed=3, versions={"python": "3"})
    )
    if store.place is not None:
        store.place.keep(root)
    return store


of_sqlite = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
of_postgres = pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)


@pytest.fixture
def store(tmp_path, store_url):
    made = new_store(tmp_path / "run", store_url)
    yield made
    made.close()


class World:
    """A run in which round 0 is complete and round 1 is half-way through everything.

    Round 1 asked six prompts in three batches: the first is judged, the second is sampled, the
    third is only asked.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.zero = store.open_round(0, "propose").id
        self.base = store.add_checkpoint(self.zero, self.checkpoint("base", status="accepted"))
        store.ask(self.zero, *TRAIN, [prompt(f"warm {i}") for i in range(4)], 2)
        for batch in store.unsampled(self.zero, *TRAIN):
            groups = store.groups(self.zero, *TRAIN, batch)
            store.add_candidates(self.zero, *TRAIN, self.base.id, completions(groups))
        self.judge(self.zero)
        groups = store.groups(self.zero, *TRAIN)
        judged = store.judgements(self.zero, *TRAIN, "exact")
        dropped = (Dropped(asked_id=groups[3].asked_id, reason="tie"),)
        store.add_selection(
            self.zero, "main", Selection(examples=pairs(groups[:3], judged), dropped=dropped)
        )
        self.examples = store.examples(self.zero, ["main"])
        self.trained = store.add_checkpoint(
            self.zero,
            self.checkpoint("trained", parent_id=self.base.id),
            self.training(),
            self.examples,
        )
        store.close_round(
            self.zero, "done", [self.decision("accept")], {self.trained.id: "accepted"}
        )
        self.one = store.open_round(1, "generate").id
        store.ask(self.one, *TRAIN, [prompt(f"sum {i}") for i in range(6)], 2)
        for batch in (0, 1):
            groups = store.groups(self.one, *TRAIN, batch)
            store.add_candidates(self.one, *TRAIN, self.trained.id, completions(groups))
        self.judge(self.one, 0)

    def checkpoint(self, name: str, **more) -> Checkpoint:
        return Checkpoint(
            model="policy",
            path=self.store.root / "checkpoints" / name,
            digest=f"digest of {name}",
            tokenizer_digest="t",
            template_digest="c",
            bytes=2**40,
            **more,
        )

    def training(self) -> Training:
        return Training(
            status="trained",
            steps=(
                TrainingStep(step=1, loss=0.693, metrics={"grad_norm": 1.5}),
                TrainingStep(step=2, loss=None),
            ),
            reference_logprobs={
                self.examples[0].id: (-3.25, -4.5),
                self.examples[1].id: (-1.0, None),
            },
        )

    def decision(self, kind, **more) -> Decision:
        numbers = {"gain": 0.125, "prompts": 200}
        return Decision(decision=kind, rule="first", reason="because", numbers=numbers, **more)

    def judge(self, round_id: int, batch: int | None = None, judge: str = "exact") -> None:
        groups = self.store.groups(round_id, *TRAIN, batch)
        self.store.add_judgements(round_id, *TRAIN, judge, "1", None, judgements(groups))


@pytest.fixture
def world(store):
    return World(store)


def contents(root: Path) -> dict[str, list[tuple]]:
    """Every row of every table, read past our own code."""
    if (place := postgres.found(root)) is not None:
        return contents_of_schema(place)
    connection = sqlite3.connect(root / "loop.db")
    names = [
        row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")
    ]
    found = {name: connection.execute(f'SELECT * FROM "{name}"').fetchall() for name in names}
    connection.close()
    return found


def contents_of_schema(place: Place) -> dict[str, list[tuple]]:
    import psycopg

    with psycopg.connect(place.url) as connection:
        names = connection.execute(
            "SELECT table_name FROM information_schema.tables WHERE table_schema = %s",
            (place.schema,),
        ).fetchall()
        return {
            name: connection.execute(
                f'SELECT * FROM "{place.schema}"."{name}" ORDER BY 1, 2'
            ).fetchall()
            for (name,) in names
        }


# The schema


def schema(engine: sqlalchemy.Engine) -> dict[str, dict]:
    looked = sqlalchemy.inspect(engine)
    return {
        name: {
            "columns": sorted(
                (
                    each["name"],
                    str(each["type"]).removesuffix(' COLLATE "C"'),
                    each["nullable"],
                    each["default"],
                )
                for each in looked.get_columns(name)
            ),
            "primary": looked.get_pk_constraint(name)["constrained_columns"],
            "foreign": sorted(
                (each["constrained_columns"], each["referred_table"], each["referred_columns"])
                for each in looked.get_foreign_keys(name)
            ),
            "unique": sorted(each["column_names"] for each in looked.get_unique_constraints(name)),
            "indexes": sorted(
                (each["name"], each["column_names"], each["unique"])
                for each in looked.get_indexes(name)
            ),
            "checks": looked.get_check_constraints(name),
        }
        for name in looked.get_table_names()
    }


def row_classes() -> dict[str, type[SQLModel]]:
    return {
        value.__tablename__: value
        for value in vars(tables).values()
        if inspect.isclass(value) and issubclass(value, SQLModel) and value is not SQLModel
    }


def new_engine(file: Path, url: str | None) -> sqlalchemy.Engine:
    """Of a database that is empty."""
    if (place := place_of(url)) is None:
        return connect(file)
    engine = postgres.connect(place)
    execute(engine, f'CREATE SCHEMA "{place.schema}"')
    return engine


def test_the_migrations_make_the_tables_that_the_code_declares(tmp_path, store_url):
    made = Store(tmp_path / "migrated.db", create=True, place=place_of(store_url))
    declared = new_engine(tmp_path / "declared.db", store_url)
    ours = [each.__table__ for each in row_classes().values()]
    with transaction(declared, writes=True) as session:
        SQLModel.metadata.create_all(session.connection(), tables=ours)
    migrated = schema(made._engine)
    made.close()
    assert migrated.pop("schema_version")["primary"] == ["version"]
    assert migrated == schema(declared)
    assert set(migrated) == {each.name for each in ours}


BESIDES = {
    # table: (columns that the record has not, fields that the row has not)
    "run": (set(), set()),
    "round": ({"run_id"}, set()),
    "prompt": ({"run_id", "digest"}, set()),
    "candidate": ({"tokens"}, set()),
    "verdict": ({"id", "round_id", "judge", "judge_version"}, set()),
    "judgement": ({"round_id", "judge", "judge_version"}, {"verdicts"}),
    "health": ({"id", "round_id", "track", "purpose", "judge"}, set()),
    "example": ({"chosen_id", "rejected_id"}, {"prompt", "chosen", "rejected"}),
    "dropped": ({"id"}, set()),
    "checkpoint": ({"run_id", "round_id"}, {"base_path", "base_digest"}),
    "training_step": ({"checkpoint_id"}, set()),
    "evaluation": ({"id", "checkpoint_id", "round_id"}, set()),
    "decision": ({"id", "run_id", "round_id"}, set()),
}
KEYS_ALONE = {"asked", "trained_on"}


def record_of(table: str) -> type:
    return getattr(records, "".join(part.title() for part in table.split("_")))


def test_every_table_is_compared_with_its_record():
    assert set(row_classes()) == set(BESIDES) | KEYS_ALONE


@pytest.mark.parametrize("table", BESIDES)
def test_records_and_rows_have_the_same_fields(table):
    record, row = record_of(table), row_classes()[table]
    of_record = {each.name for each in fields(record)}
    of_row = set(row.model_fields)
    assert (of_row - of_record, of_record - of_row) == BESIDES[table]
    hints = typing.get_type_hints(record)
    for name in (of_record & of_row) - {"id", "started"}:  # those the store fills in
        optional = type(None) in typing.get_args(hints[name])
        assert row.__table__.columns[name].nullable == optional, name


@of_sqlite
def test_every_connection_has_the_pragmas_on(store):
    with store._engine.connect() as first, store._engine.connect() as second:
        for connection in (first, second):
            on = {
                pragma: connection.exec_driver_sql(f"PRAGMA {pragma}").scalar()
                for pragma in ("journal_mode", "foreign_keys", "busy_timeout", "synchronous")
            }
            assert on == {
                "journal_mode": "wal",
                "foreign_keys": 1,
                "busy_timeout": 30_000,
                "synchronous": 1,
            }


@of_postgres
def test_every_connection_gives_up_what_it_waits_for(store):
    with store._engine.connect() as first, store._engine.connect() as second:
        for connection in (first, second):
            on = {
                name: connection.exec_driver_sql(f"SHOW {name}").scalar()
                for name in ("search_path", "lock_timeout", "idle_in_transaction_session_timeout")
            }
            assert on == {
                "search_path": f'"{store.place.schema}"',
                "lock_timeout": "30s",
                "idle_in_transaction_session_timeout": "1min",
            }


def test_a_row_cannot_point_at_nothing(world):
    lost = {10_000: [Completion(text="", token_ids=())]}
    with pytest.raises(IntegrityError, match=r"(?i)foreign key"):
        world.store.add_candidates(world.one, *TRAIN, world.base.id, lost)
    judgement = Judgement(candidate_id=10_000, score=1.0)
    with pytest.raises(IntegrityError, match=r"(?i)foreign key"):
        world.store.add_judgements(world.one, *TRAIN, "exact", "1", None, [judgement])


def test_a_database_of_a_newer_ratchet_is_refused_with_a_sentence(store):
    execute(store._engine, "INSERT INTO schema_version VALUES (99, 'm099', 'then')")
    before = contents(store.root)
    with pytest.raises(UserError, match=f"schema version 99, this Ratchet knows {LATEST}"):
        Store(store.root / "loop.db")
    assert contents(store.root) == before


def test_an_interrupted_migration_leaves_nothing(tmp_path, store_url):
    engine = new_engine(tmp_path / "loop.db", store_url)
    with (
        broken_after(engine, 9),
        pytest.raises(Broken),
        transaction(engine, writes=True) as session,
    ):
        migrate(session.connection())
    assert sqlalchemy.inspect(engine).get_table_names() == []
    new_store(tmp_path, store_url).close()
    assert "candidate" in contents(tmp_path)


def test_a_file_that_is_no_database_is_refused_with_a_sentence(tmp_path):
    (tmp_path / "loop.db").write_bytes(b"PK\3\4" * 1000)
    with pytest.raises(UserError, match=r"loop\.db is not a SQLite database"):
        Store(tmp_path / "loop.db")
    assert [path.name for path in tmp_path.iterdir()] == ["loop.db"]


@of_sqlite
def test_a_damaged_file_is_a_sentence_with_its_name(world):
    world.store.close()
    path = world.store.root / "loop.db"
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 3000)
    with pytest.raises(UserError, match=r"loop\.db cannot be read: it is damaged"):
        Store(path)


def execute(engine: sqlalchemy.Engine, *statements: str) -> None:
    with transaction(engine, writes=True) as session:
        for statement in statements:
            session.connection().exec_driver_sql(statement)


@of_sqlite
def test_a_file_that_cannot_be_written_or_opened_is_a_sentence(world, tmp_path):
    engine = connect(world.store.root / "loop.db")
    with pytest.raises(UserError, match=r"loop\.db cannot be written .*readonly"):
        execute(engine, "PRAGMA query_only = ON", "DELETE FROM dropped")
    with pytest.raises(UserError, match=r"nowhere/loop\.db cannot be opened"):
        execute(connect(tmp_path / "nowhere" / "loop.db"))


@of_sqlite
def test_a_full_disk_is_a_sentence(world):
    engine = connect(world.store.root / "loop.db")
    fill = "CREATE TABLE more AS SELECT zeroblob(999999)"
    with pytest.raises(UserError, match=r"loop\.db cannot be written: its disk is full"):
        execute(engine, "PRAGMA max_page_count = 1", fill)


def test_a_folder_without_a_database_is_refused_and_nothing_made(tmp_path):
    with pytest.raises(UserError, match="it has no loop"):
        Store(tmp_path / "loop.db")
    assert not list(tmp_path.iterdir())


# Transactions


class Broken(Exception):
    pass


class broken_after:
    """Break the engine's work after the n-th statement that changes something; 0: at the commit."""

    def __init__(self, engine: sqlalchemy.Engine, n: int) -> None:
        self.engine, self.n, self.seen = engine, n, 0

    def __enter__(self):
        sqlalchemy.event.listen(self.engine, "after_cursor_execute", self.count)
        sqlalchemy.event.listen(self.engine, "commit", self.commit)
        self.copy_in, postgres.copy_in = postgres.copy_in, self.copied
        return self

    def __exit__(self, *_):
        postgres.copy_in = self.copy_in
        sqlalchemy.event.remove(self.engine, "after_cursor_execute", self.count)
        sqlalchemy.event.remove(self.engine, "commit", self.commit)

    def count(self, connection, cursor, statement, parameters, context, many):
        changing = ("INSERT", "UPDATE", "DELETE", "CREATE", "COPY")
        self.seen += statement.lstrip().split()[0] in changing
        if self.n and self.seen == self.n:
            raise Broken

    def copied(self, connection, table, made):
        """SQLAlchemy does not see a COPY."""
        self.copy_in(connection, table, made)
        self.count(connection, None, "COPY", None, None, False)

    def commit(self, connection):
        if self.n == 0 and self.seen:
            raise Broken


def select_in_round_one(world):
    groups = world.store.groups(world.one, *TRAIN, 0)
    judged = world.store.judgements(world.one, *TRAIN, "exact")
    dropped = (Dropped(asked_id=groups[1].asked_id, reason="tie"),)
    return Selection(examples=pairs(groups[:1], judged), dropped=dropped)


# Name of the method -> what to read beforehand, and the call.
WRITES = {
    "create_run": lambda w: (
        Run(uuid="v", name="n", config={}, identity="i", seed=0, versions={}),
    ),
    "fork_run": lambda w: (
        Run(uuid="v", name="n", config={}, identity="i", seed=0, versions={}, parent_uuid="u"),
        [{"key": "rounds", "from": 3, "to": 9}],
    ),
    "set_status": lambda w: ("stopped", w.decision("stop")),
    "request_stop": lambda w: (),
    "change_config": lambda w: ({"rounds": 9}, [{"key": "rounds", "from": 3, "to": 9}]),
    "renew_lease": lambda w: ("driver",),
    "release_lease": lambda w: ("driver",),
    "open_round": lambda w: (2, "propose"),
    "set_stage": lambda w: (w.one, "train"),
    "close_round": lambda w: (
        w.one,
        "done",
        [w.decision("accept"), w.decision("reject")],
        {w.trained.id: "rejected", w.base.id: "pruned"},
    ),
    "add_seconds": lambda w: (w.one, {"judge": 1.5}),
    "add_prompts": lambda w: ([prompt("new"), prompt("newer", split="test")],),
    "ask": lambda w: (w.one, "other", "train", [prompt("new"), prompt("sum 1")], 1),
    "add_candidates": lambda w: (
        w.one,
        *TRAIN,
        w.trained.id,
        completions(w.store.groups(w.one, *TRAIN, 2)),
    ),
    "add_judgements": lambda w: (
        *(w.one, *TRAIN, "exact", "1", "model"),
        judgements(w.store.groups(w.one, *TRAIN, 1)),
    ),
    "add_health": lambda w: (
        *(w.one, *TRAIN, "exact"),
        [Health(metric=metric, value=0.5, n=3) for metric in ("modal", "unscored")],
    ),
    "add_selection": lambda w: (w.one, "main", select_in_round_one(w)),
    "add_checkpoint": lambda w: (w.one, w.checkpoint("new"), w.training(), w.examples),
    "set_pruned": lambda w: ([w.base.id, w.trained.id],),
    "note_versions": lambda w: ({"python": "another"},),
    "add_evaluations": lambda w: (
        w.one,
        w.base.id,
        [
            Evaluation(model="policy", split=split, metric="score", value=0.5, n=9)
            for split in ("gate", "test")
        ],
    ),
}


def test_every_method_that_writes_is_among_those_tested_for_it():
    trees = [ast.parse(inspect.getsource(module)).body for module in (database, stages)]
    classes = [node for tree in trees for node in tree if isinstance(node, ast.ClassDef)]
    assert [each.name for each in classes] == ["Store", "Stages"]
    writing = {
        node.name
        for each in classes
        for node in each.body
        if isinstance(node, ast.FunctionDef)
        and not node.name.startswith("_")
        and {"_write", "_update_run"}
        & {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}
    }
    assert writing == set(WRITES) | {"take_lease"}


@pytest.mark.parametrize("method", WRITES)
def test_a_write_that_breaks_off_leaves_nothing(world, method):
    store = world.store
    assert store.take_lease("driver", timeout=timedelta(seconds=60)) is None
    arguments = WRITES[method](world)
    before = contents(store.root)
    for n in itertools.count():
        with broken_after(store._engine, n) as broken:
            try:
                getattr(store, method)(*arguments)
            except Broken:
                assert contents(store.root) == before, f"broken after statement {n}"
                continue
        break
    assert n > broken.seen > 0
    assert contents(store.root) != before


KILLED = """
import os, signal, sys
from pathlib import Path
import sqlalchemy
from store.database import Store
from store.records import Completion

store = Store(Path(sys.argv[1]))
round_id = store.round(1).id
groups = store.groups(round_id, "main", "train", 2)
answers = {group.asked_id: [Completion(text="x", token_ids=(1,))] for group in groups}
at = sys.argv[2]

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if at == "before":
    sqlalchemy.event.listen(store._engine, "commit", kill)
store.add_candidates(round_id, "main", "train", None, answers)
kill()
"""


@pytest.mark.parametrize(("at", "left"), [("before", [2]), ("after", [])])
def test_a_process_killed_at_its_commit_leaves_all_of_a_batch_or_nothing(world, at, left):
    before = contents(world.store.root)
    file = world.store.root / "loop.db"
    done = subprocess.run([sys.executable, "-c", KILLED, str(file), at], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert world.store.unsampled(world.one, *TRAIN) == left
    counts = world.store.round(1).counts["train:main"]
    stored = sum(len(group.candidates) for group in world.store.groups(world.one, *TRAIN))
    assert counts["candidates"] == stored
    assert (contents(world.store.root) == before) == (at == "before")


def test_the_counts_of_a_round_are_those_of_its_rows(world):
    counts = world.store.round(1).counts["train:main"]
    groups = world.store.groups(world.one, *TRAIN)
    candidates = [each for group in groups for each in group.candidates]
    assert counts == {
        "asked": 6,
        "candidates": len(candidates),
        "generated_tokens": sum(len(each.token_ids) for each in candidates),
        "truncated": 0,
        "judged": 4,
        "verdicts": 4,
        "unscored": 0,
    }
    zero = world.store.round(0).counts["train:main"]
    assert (zero["examples"], zero["dropped"], zero["dropped tie"]) == (3, 1, 1)
    assert world.store.generated_tokens() == counts["generated_tokens"] + zero["generated_tokens"]


def test_what_nobody_sampled_costs_no_tokens_and_has_no_writer(world):
    before = world.store.generated_tokens()
    groups = world.store.groups(world.one, *TRAIN, 2)
    given = {group.asked_id: [Completion(text="given", token_ids=(1, 2, 3))] for group in groups}
    world.store.add_candidates(world.one, *TRAIN, world.trained.id, given)
    assert world.store.generated_tokens() == before
    for group in world.store.groups(world.one, *TRAIN, 2):
        assert group.candidates[0].checkpoint_id is None


HOLD = """
import sys
from pathlib import Path
from sqlalchemy import text
from store.connect import transaction
from store.database import Store

with transaction(Store(Path(sys.argv[1]))._engine, writes=True) as session:
    session.connection().execute(text("UPDATE run SET name = 'by another process'"))
    print("holding", flush=True)
    sys.stdin.readline()
"""


def test_readers_read_and_a_second_writer_waits_while_another_process_writes(world):
    file = world.store.root / "loop.db"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout.readline() == "holding\n"
        began = time.monotonic()
        assert world.store.run().name == "n"
        Store(file).close()  # looking at the schema's version takes no lock
        assert time.monotonic() - began < 5
        writing = threading.Thread(target=world.store.set_stage, args=(world.one, "judge"))
        writing.start()
        writing.join(0.3)
        assert writing.is_alive()
        other.communicate("\n", timeout=30)
        writing.join(30)
        assert not writing.is_alive()
    finally:
        other.kill()
        other.wait()
    assert world.store.run().name == "by another process"
    assert world.store.round(1).stage == "judge"


# Round trips


def test_a_run_comes_back(store):
    found = store.run()
    assert (found.uuid, found.config, found.versions) == ("u", {"a": [1]}, {"python": "3"})
    assert (found.status, found.seed, found.changes) == ("running", 3, ())
    assert abs(datetime.now(UTC) - found.started) < timedelta(minutes=1)
    store.change_config({"rounds": 9}, [{"key": "rounds", "from": 3, "to": 9}])
    store.request_stop()
    assert store.stop_requested()
    again = Store(store.root / "loop.db")
    assert again.run().config == {"rounds": 9}
    assert [each["key"] for each in again.run().changes] == ["rounds"]
    assert again.run().changes[0]["when"]
    again.close()


def test_prompts_come_back_as_they_were(store):
    given = Prompt(
        messages=(
            Message(role="system", content="Be brief. \N{PILE OF POO}\x00\u2028"),
            Message(role="user", content='1 + "2"?\n'),
        ),
        reference="3",
        task="chain_sum",
        origin="derived",
        split="gate",
        columns={"entry": {"terms": [1, 2.5, None, True]}, "ü": "ß"},
    )
    store.add_prompts([given, prompt("other", split="gate")])
    child = prompt("a child", split="gate", parent_prompt_id=store.prompts("gate")[0].id)
    store.add_prompts([child])
    found = store.prompts("gate")
    assert [replace(each, id=None) for each in found] == [
        given,
        prompt("other", split="gate"),
        child,
    ]
    assert found[0].digest == given.digest
    assert store.prompts("train") == []
    assert store.held_out_digests() == {each.question_digest for each in found}


def test_a_question_is_the_same_under_any_system_prompt(store):
    under = [
        (Message(role="system", content=text), *prompt("Spell it.").messages)
        for text in ("Spell with care.", "Spell carelessly.")
    ]
    careful, careless = (Prompt(messages=each, split="test") for each in under)
    assert careful.digest != careless.digest
    alone = prompt("Spell it.")
    assert {careful.question_digest, careless.question_digest} == {alone.digest}
    assert alone.question_digest == alone.digest
    store.add_prompts([careful, careless])
    assert store.held_out_digests() == {alone.digest}
    turns = [Prompt(messages=each[:1]) for each in under]
    assert turns[0].question_digest == turns[0].digest != turns[1].question_digest


def test_a_prompt_that_came_twice_is_stored_once(store):
    store.add_prompts([prompt("a"), prompt("b"), prompt("a")])
    store.add_prompts([prompt("b"), prompt("c")])
    assert [each.messages[0].content for each in store.prompts("train")] == ["a", "b", "c"]


def test_a_prompt_kept_for_one_split_cannot_be_stored_for_another(store):
    store.add_prompts([prompt("secret", split="test")])
    round_id = store.open_round(0, "propose").id
    before = contents(store.root)
    with pytest.raises(ValueError, match=r"split 'train' is already kept for 'test': 'secret'"):
        store.add_prompts([prompt("fresh"), prompt("secret")])
    with pytest.raises(ValueError, match="already kept for 'test'"):
        store.ask(round_id, *TRAIN, [prompt("fresh"), prompt("secret")], 2)
    with pytest.raises(ValueError, match="is already kept for"):
        store.add_prompts([prompt("both"), prompt("both", split="gate")])
    assert contents(store.root) == before


def test_a_prompt_is_asked_once_in_a_round_and_track(world):
    before = contents(world.store.root)
    with pytest.raises(IntegrityError, match=r"(?i)unique"):
        world.store.ask(world.one, *TRAIN, [prompt("sum 0")], 2)
    with pytest.raises(IntegrityError, match=r"(?i)unique"):
        world.store.ask(world.one, "other", "train", [prompt("twice"), prompt("twice")], 2)
    assert contents(world.store.root) == before
    world.store.ask(world.one, "other", "train", [prompt("sum 0")], 2)
    assert world.store.asked_digests() == {each.digest for each in world.store.prompts("train")}


def test_candidates_come_back_token_by_token(world):
    groups = world.store.groups(world.one, *TRAIN, 2)
    sampled = Completion(
        text="\N{SNOWMAN} and \x00",
        token_ids=(0, 1, 2**31, 2**32 - 1),
        finish_reason="length",
        logprob=-0.1 - 1e-17,
        seed=2**63 - 1,
        sampling=SAMPLED,
        trained_mask=(True, False, False, True),
    )
    empty = Completion(text="", token_ids=(), finish_reason="stop_string")
    answers = {groups[0].asked_id: [sampled, empty], groups[1].asked_id: [empty]}
    world.store.add_candidates(world.one, *TRAIN, world.trained.id, answers)
    found = world.store.groups(world.one, *TRAIN, 2)
    assert [group.prompt for group in found] == [group.prompt for group in groups]
    expected = [
        Candidate(
            **vars(sampled),
            id=found[0].candidates[0].id,
            asked_id=groups[0].asked_id,
            index=0,
            checkpoint_id=world.trained.id,
        ),
        Candidate(
            **vars(empty), id=found[0].candidates[1].id, asked_id=groups[0].asked_id, index=1
        ),
    ]
    assert list(found[0].candidates) == expected
    assert world.store.round(1).counts["train:main"]["truncated"] == 1
    packed = world.store.query(
        "SELECT token_ids, tokens FROM candidate WHERE id = :id", id=expected[0].id
    )
    assert packed == [{"token_ids": b"\0\0\0\0\1\0\0\0\0\0\0\x80\xff\xff\xff\xff", "tokens": 4}]


def test_texts_and_numbers_come_back_whatever_they_are(world):
    texts = ("a\0b", "\0", "\ue000", "\ue0000\0\ue000\ue000", "\U0001f600 \u202e", "")
    groups = world.store.groups(world.one, *TRAIN, 2)
    made = [Completion(text=text, token_ids=(1,), logprob=-math.inf) for text in texts]
    world.store.add_candidates(world.one, *TRAIN, None, {groups[0].asked_id: made})
    found = world.store.groups(world.one, *TRAIN, 2)[0].candidates
    assert tuple(each.text for each in found) == texts
    assert {each.logprob for each in found} == {-math.inf}
    seen = world.store.query("SELECT text FROM candidate WHERE text = :text", text=texts[0])
    assert seen == [{"text": texts[0]}]
    columns = {"a\0": ["\0", -math.inf, math.inf, {"deep": [None, 1e300, 2**70]}]}
    world.store.add_prompts([prompt("strange \0", columns=columns, task="\0")])
    (kept,) = [each for each in world.store.prompts("train") if each.task == "\0"]
    assert (kept.columns, kept.messages[0].content) == (columns, "strange \0")
    world.store.add_prompts([prompt("no number", columns={"x": math.nan})])
    assert math.isnan(world.store.prompts("train")[-1].columns["x"])


def rows_of(store: Store, table: type[SQLModel]) -> list[dict]:
    keys = table.__table__.primary_key.columns
    with store._read() as session:
        found = session.connection().execute(select(table.__table__).order_by(*keys))
        return [dict(row) for row in found.mappings()]


@pytest.mark.parametrize("other", ["sqlite", "postgresql"])
def test_a_copy_has_every_row_and_goes_on_by_itself(world, other, request, tmp_path):
    url = request.getfixturevalue("postgres").url() if other == "postgresql" else None
    groups = world.store.groups(world.one, *TRAIN)
    derived = prompt("derived", parent_candidate_id=groups[0].candidates[0].id)
    world.store.add_prompts([derived])
    place = place_of(url)
    copy = world.store.copy_to(tmp_path / "copy.db", place)
    try:
        for table in row_classes().values():
            assert rows_of(world.store, table) == rows_of(copy, table)
        before = world.store.rounds()
        copy.open_round(2, "propose")
        copy.add_prompts([prompt("only there")])
        assert (len(copy.rounds()), world.store.rounds()) == (3, before)
    finally:
        copy.close()


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_id_that_does_not_fit_is_refused(world, token):
    group = world.store.groups(world.one, *TRAIN, 2)[0]
    answers = {group.asked_id: [Completion(text="", token_ids=(token,))]}
    with pytest.raises(OverflowError):
        world.store.add_candidates(world.one, *TRAIN, None, answers)


def test_judgements_come_back_and_verdicts_to_the_letter(world):
    first, second = world.store.groups(world.one, *TRAIN, 1)[0].candidates
    said = Verdict(
        candidate_id=first.id,
        raw="Score: 7/10\x00 \N{SNOWMAN}",
        value=0.7,
        other_candidate_id=second.id,
        order=1,
        vote=2,
        prompt_digest="abc",
        seed=2**62,
        seconds=0.25,
        tokens=12,
        cost=1e-5,
    )
    given = [
        Judgement(candidate_id=first.id, score=0.7, reason="fair", variance=0.01, verdicts=(said,)),
        Judgement(candidate_id=second.id, score=None, status="unparsed", reason="?!"),
    ]
    world.store.add_judgements(world.one, *TRAIN, "rubric", "2", "http://server", given)
    found = world.store.judgements(world.one, *TRAIN, "rubric")
    assert [replace(each, id=None) for each in found] == [
        replace(each, verdicts=()) for each in given
    ]
    kept = world.store.query("SELECT * FROM verdict WHERE judge = 'rubric'")
    by = {"round_id": world.one, "judge": "rubric", "judge_version": "2"}
    assert kept == [{"id": kept[0]["id"], **by, **vars(said), "judge_model": "http://server"}]
    counts = world.store.round(1).counts["train:main"]
    assert (counts["judged"], counts["unscored"], counts["verdicts"]) == (6, 1, 5)


def test_a_judge_concludes_once_on_a_candidate_in_a_round(world):
    with pytest.raises(IntegrityError, match=r"(?i)unique"):
        world.judge(world.one, 0)
    world.judge(world.one, 0, judge="another")


def test_examples_come_back_with_their_candidates(world):
    groups = world.store.groups(world.zero, *TRAIN)
    judged = world.store.judgements(world.zero, *TRAIN, "exact")
    given = pairs(groups[:3], judged)
    assert [replace(each, id=None) for each in world.examples] == list(given)
    assert world.store.examples(world.zero, []) == []
    assert world.store.examples(world.zero, ["other"]) == []
    demonstration = Example(
        kind="demonstration",
        asked_id=(group := world.store.groups(world.one, *TRAIN, 0)[0]).asked_id,
        prompt=group.prompt,
        chosen=group.candidates[0],
        weight=0.25,
        rule="best_only",
    )
    selection = Selection(examples=(demonstration,), dropped=())
    world.store.add_selection(world.one, "main", selection)
    (found,) = world.store.examples(world.one, ["main"])
    assert replace(found, id=None) == demonstration


def test_a_prompt_is_accounted_for_by_examples_or_one_reason(world):
    assert world.store.is_filtered(world.zero, "main")
    assert not world.store.is_filtered(world.one, "main")
    assert world.store.count_unaccounted() == 0
    world.store.close_round(world.one, "no_examples")
    assert world.store.count_unaccounted() == 6
    asked = world.store.groups(world.one, *TRAIN)[0].asked_id
    twice = tuple(Dropped(asked_id=asked, reason=reason) for reason in ("tie", "unjudged"))
    with pytest.raises(IntegrityError, match=r"(?i)unique"):
        world.store.add_selection(world.one, "main", Selection(examples=(), dropped=twice))


def test_a_checkpoint_comes_back_with_what_it_learned_from(world):
    assert world.store.checkpoints() == [
        world.base,
        replace(world.trained, status="accepted"),
    ]
    assert world.store.checkpoints(round_id=world.one) == []
    assert world.store.checkpoints("another") == []
    assert world.trained.bytes == 2**40
    learned = world.store.query("SELECT * FROM trained_on ORDER BY example_id")
    assert [tuple(row.values()) for row in learned] == [
        (world.trained.id, world.examples[0].id, -3.25, -4.5),
        (world.trained.id, world.examples[1].id, -1.0, None),
        (world.trained.id, world.examples[2].id, None, None),
    ]
    steps = world.store.query("SELECT step, loss, metrics FROM training_step ORDER BY step")
    assert [(row["step"], row["loss"], parsed(row["metrics"])) for row in steps] == [
        (1, 0.693, {"grad_norm": 1.5}),
        (2, None, {}),
    ]


def test_the_incumbent_is_the_checkpoint_accepted_last(world):
    assert world.store.incumbent("policy").id == world.trained.id
    newer = world.store.add_checkpoint(world.one, world.checkpoint("newer"))
    assert world.store.incumbent("policy").id == world.trained.id
    world.store.close_round(world.one, "done", [], {newer.id: "accepted"})
    assert world.store.incumbent("policy").id == newer.id
    world.store.set_pruned([world.base.id])
    assert [each.status for each in world.store.checkpoints()] == ["pruned", "accepted", "accepted"]


def test_a_run_directory_can_be_moved(world, tmp_path):
    outside = replace(world.checkpoint("x"), path=tmp_path / "models" / "base")
    world.store.add_checkpoint(world.one, outside)
    world.store.close()
    shutil.move(world.store.root, tmp_path / "elsewhere")
    moved = Store(tmp_path / "elsewhere" / "loop.db")
    assert [each.path for each in moved.checkpoints()] == [
        tmp_path / "elsewhere" / "checkpoints" / "base",
        tmp_path / "elsewhere" / "checkpoints" / "trained",
        tmp_path / "models" / "base",
    ]
    moved.close()


def test_evaluations_and_decisions_come_back(world):
    measured = [
        Evaluation(
            model="policy",
            split="test",
            metric=metric,
            value=0.5,
            n=300,
            low=low,
            high=0.75,
            judge="exact",
        )
        for metric, low in (("accuracy_greedy", None), ("accuracy_sampled", 0.25))
    ]
    world.store.add_evaluations(world.zero, world.trained.id, measured)
    assert world.store.evaluations(world.trained.id) == measured
    assert world.store.evaluations(world.base.id) == []
    with pytest.raises(IntegrityError, match=r"(?i)unique"):
        world.store.add_evaluations(world.zero, world.trained.id, measured[:1])
    told = world.decision("undecided", model="policy", checkpoint_id=2, incumbent_id=1)
    world.store.close_round(world.one, "done", [told])
    kept = world.store.query("SELECT * FROM decision ORDER BY id")
    assert [row["decision"] for row in kept] == ["accept", "undecided"]
    assert parsed(kept[1]["numbers"]) == {"gain": 0.125, "prompts": 200}
    assert all(kept[1][name] == value for name, value in vars(told).items() if name != "numbers")


def test_a_run_that_a_rule_ends_keeps_the_rule_with_its_last_round(world):
    world.store.set_status("stopped", world.decision("stop"))
    assert (world.store.run().status, world.store.run().ended is None) == ("stopped", False)
    (stop,) = world.store.query("SELECT * FROM decision WHERE decision = 'stop'")
    assert (stop["round_id"], stop["checkpoint_id"]) == (world.one, None)
    world.store.set_status("running")
    assert world.store.run().ended is None


def test_rounds_come_back_in_order_with_their_seconds(world):
    world.store.add_seconds(world.one, {"generate": 1.5, "policy": 1.0})
    world.store.add_seconds(world.one, {"generate": 2.0, "judge": 0.5})
    zero, one = world.store.rounds()
    assert (zero.number, zero.status, zero.stage) == (0, "done", "done")
    assert zero.ended is not None
    assert (one.number, one.status, one.stage, one.ended) == (1, "running", "generate", None)
    assert one.seconds == {"generate": 3.5, "policy": 1.0, "judge": 0.5}
    with pytest.raises(UserError, match="no round 7; the run has 2 rounds"):
        world.store.round(7)
    with pytest.raises(IntegrityError, match=r"(?i)unique"):
        world.store.open_round(1, "propose")


def test_scores_are_those_of_the_sampled_answers_to_a_split(world):
    store = world.store
    asked = [prompt("g1", split="gate"), prompt("g2", split="gate"), prompt("t1", split="test")]
    store.add_prompts(asked)
    for purpose in ("sampled", "greedy"):
        store.ask(world.one, "policy", purpose, asked, 2)
        for batch in store.unsampled(world.one, "policy", purpose):
            groups = store.groups(world.one, "policy", purpose, batch)
            store.add_candidates(
                world.one, "policy", purpose, world.trained.id, completions(groups)
            )
            told = judgements(store.groups(world.one, "policy", purpose, batch))
            told[0] = replace(told[0], score=None, status="failed")
            store.add_judgements(world.one, "policy", purpose, "exact", "1", None, told)
    first, second = store.prompts("gate")
    found = store.scores(world.trained.id, "gate", "exact")
    assert found == {first.id: [1.0], second.id: [0.0, 1.0]}
    assert store.scores(world.trained.id, "gate", "another") == {}
    assert store.scores(world.base.id, "gate", "exact") == {}


# What is left


def test_what_is_left_is_told_batch_by_batch(world):
    store, one = world.store, world.one
    assert store.unsampled(one, *TRAIN) == [2]
    assert store.unjudged(one, *TRAIN, "exact") == [1]
    assert store.unjudged(one, *TRAIN, "another") == [0, 1]
    assert store.unsampled(one, "other", "train") == []
    assert store.unsampled(one, "main", "greedy") == []
    store.add_candidates(one, *TRAIN, None, completions(store.groups(one, *TRAIN, 2)))
    assert store.unsampled(one, *TRAIN) == []
    assert store.unjudged(one, *TRAIN, "exact") == [1, 2]
    world.judge(one, 2)
    world.judge(one, 1)
    assert store.unjudged(one, *TRAIN, "exact") == []
    assert store.unjudged(one, *TRAIN, "another") == [0, 1, 2]


def test_a_candidate_without_a_judgement_leaves_its_batch_to_be_judged(world):
    store, one = world.store, world.one
    half = judgements(store.groups(one, *TRAIN, 1))[:-1]
    store.add_judgements(one, *TRAIN, "exact", "1", None, half)
    assert store.unjudged(one, *TRAIN, "exact") == [1]


def test_an_earlier_rounds_judgement_is_not_this_rounds(world):
    world.store.close_round(world.one, "done")
    two = world.store.open_round(2, "judge").id
    world.store.ask(two, *TRAIN, [prompt("sum 0")], 2)
    groups = world.store.groups(two, *TRAIN)
    world.store.add_candidates(two, *TRAIN, world.trained.id, completions(groups))
    assert world.store.unjudged(two, *TRAIN, "exact") == [0]
    assert world.store.judgements(two, *TRAIN, "exact") == []


def test_batches_are_as_large_as_asked_for_and_keep_the_order(store):
    round_id = store.open_round(0, "propose").id
    assert not store.is_asked(round_id, *TRAIN)
    store.ask(round_id, *TRAIN, [prompt(i) for i in range(7)], 3)
    assert store.is_asked(round_id, *TRAIN)
    assert not store.is_asked(round_id, "other", "train")
    words = [
        [group.prompt.messages[0].content for group in store.groups(round_id, *TRAIN, batch)]
        for batch in store.unsampled(round_id, *TRAIN)
    ]
    assert words == [["0", "1", "2"], ["3", "4", "5"], ["6"]]


# Records


@pytest.mark.parametrize(
    "made",
    [
        lambda: Judgement(candidate_id=1, score=None),
        lambda: Judgement(candidate_id=1, score=0.0, status="unparsed"),
        lambda: Judgement(candidate_id=1, score=float("nan")),
        lambda: Judgement(candidate_id=1, score=float("inf")),
        lambda: Judgement(candidate_id=1, score="high"),
        lambda: Judgement(candidate_id=1, score=1.0, status="fine"),
        lambda: Judgement(candidate_id=1, score=1.0, points=2),
        lambda: Message(role="robot", content=""),
        lambda: prompt("x", split="validation"),
        lambda: Completion(text="", token_ids=(1.5,)),
        lambda: Completion(text=None, token_ids=()),
        lambda: Completion(text="", token_ids=(), finish_reason="eos"),
        lambda: Evaluation(model="m", split="test", metric="m", value=None, n=1),
        lambda: Decision(decision="maybe", rule="", reason=""),
        lambda: Training(status="fine", steps=()),
    ],
)
def test_a_record_that_is_not_right_cannot_be_made(made):
    with pytest.raises((ValidationError, ValueError)):
        made()


def test_an_example_has_two_different_sides_or_one():
    one = Candidate(id=1, asked_id=1, index=0, text="a", token_ids=(1,))
    same, other = replace(one, id=2, index=1), replace(one, id=3, index=2, token_ids=(2,))
    of = {"asked_id": 1, "prompt": prompt("x"), "chosen": one, "rule": "r"}
    Example(kind="pair", rejected=other, **of)
    for kind, rejected in (("pair", None), ("demonstration", other), ("pair", same)):
        with pytest.raises(ValueError, match="rejected"):
            Example(kind=kind, rejected=rejected, **of)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("field", ["margin", "weight"])
def test_an_example_has_finite_numbers(field, number):
    one = Candidate(id=1, asked_id=1, index=0, text="a", token_ids=(1,))
    of = {"asked_id": 1, "prompt": prompt("x"), "chosen": one, "rule": "r"}
    with pytest.raises(ValueError, match=f"the {field} of an example is a finite number"):
        Example(kind="demonstration", **of, **{field: number})


def test_half_a_character_is_replaced_where_texts_come_in():
    for given, kept in (("a\ud800b", "a\ufffdb"), ("\udfff", "\ufffd"), ("é\U0001f600", None)):
        kept = kept or given
        assert Completion(text=given, token_ids=()).text == kept
        assert Verdict(candidate_id=1, raw=given).raw == kept
        assert Message(role="user", content=given).content == kept
        unparsed = Judgement(candidate_id=1, score=None, status="unparsed", reason=given)
        assert unparsed.reason == kept
        assert prompt("x", reference=given, task=given).reference == kept


def test_a_record_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        prompt("x").task = "y"


def test_a_training_is_the_same_after_it_lay_on_disk_even_with_numbers_that_are_not_finite():
    steps = (TrainingStep(step=1, loss=2.5, metrics={"grad_norm": float("inf"), "lr": 1e-4}),)
    kept = TypeAdapter(Training)
    for reference in ({}, {3: (-1.5, None), 4: (-2.0, -3.0)}):
        training = Training(status="diverged", steps=steps, reference_logprobs=reference)
        assert kept.validate_json(kept.dump_json(training)) == training


def test_two_prompts_that_read_the_same_have_one_digest_and_others_do_not():
    assert prompt("a", reference="1").digest == prompt("a", split="test").digest
    turns = [("user", "a"), ("assistant", "a"), ("user", "a ")]
    assert len({Prompt(messages=(Message(role=r, content=c),)).digest for r, c in turns}) == 3
    joined = Prompt(messages=(Message(role="user", content="a\nb"),))
    split = Prompt(messages=tuple(Message(role="user", content=c) for c in "ab"))
    assert joined.digest != split.digest


def test_a_seed_depends_on_the_place_and_the_key_alone():
    call = records.Call(seed=1, round=2, track="main", stage="generate")
    assert call.seed_for("digest", 0) == replace(call, progress=print).seed_for("digest", 0)
    others = [
        replace(call, **{name: value})
        for name, value in (("seed", 2), ("round", 3), ("track", "b"), ("stage", "judge"))
    ]
    seeds = {each.seed_for("digest", 0) for each in [call, *others]}
    seeds |= {call.seed_for("digest", 1), call.seed_for("digest0"), call.seed_for("digest", "0")}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)

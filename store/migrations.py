"""The schema's history: functions applied once each, in order, and never edited afterwards.

A change of store/tables.py comes with a new function here; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from sqlalchemy import Connection, inspect, text

from store import dialect
from store.errors import UserError

FIRST = (
    """
    CREATE TABLE run (
        id INTEGER NOT NULL,
        uuid VARCHAR NOT NULL,
        name VARCHAR NOT NULL,
        config JSON NOT NULL,
        identity VARCHAR NOT NULL,
        seed BIGINT NOT NULL,
        versions JSON NOT NULL,
        status VARCHAR NOT NULL,
        changes JSON NOT NULL,
        stop_requested BOOLEAN NOT NULL,
        driver VARCHAR,
        driver_seen DATETIME,
        parent_uuid VARCHAR,
        parent_path VARCHAR,
        started DATETIME NOT NULL,
        ended DATETIME,
        PRIMARY KEY (id),
        UNIQUE (uuid)
    )
    """,
    """
    CREATE TABLE round (
        id INTEGER NOT NULL,
        run_id INTEGER NOT NULL,
        number INTEGER NOT NULL,
        stage VARCHAR NOT NULL,
        status VARCHAR NOT NULL,
        counts JSON NOT NULL,
        seconds JSON NOT NULL,
        started DATETIME NOT NULL,
        ended DATETIME,
        PRIMARY KEY (id),
        UNIQUE (run_id, number),
        FOREIGN KEY(run_id) REFERENCES run (id)
    )
    """,
    """
    CREATE TABLE prompt (
        id INTEGER NOT NULL,
        run_id INTEGER NOT NULL,
        messages JSON NOT NULL,
        reference VARCHAR,
        task VARCHAR,
        origin VARCHAR NOT NULL,
        split VARCHAR NOT NULL,
        digest VARCHAR NOT NULL,
        columns JSON NOT NULL,
        parent_prompt_id INTEGER,
        parent_candidate_id INTEGER,
        PRIMARY KEY (id),
        UNIQUE (run_id, digest),
        FOREIGN KEY(run_id) REFERENCES run (id),
        FOREIGN KEY(parent_prompt_id) REFERENCES prompt (id),
        FOREIGN KEY(parent_candidate_id) REFERENCES candidate (id)
    )
    """,
    """
    CREATE TABLE asked (
        id INTEGER NOT NULL,
        round_id INTEGER NOT NULL,
        prompt_id INTEGER NOT NULL,
        track VARCHAR NOT NULL,
        purpose VARCHAR NOT NULL,
        batch INTEGER NOT NULL,
        PRIMARY KEY (id),
        UNIQUE (round_id, track, purpose, prompt_id),
        FOREIGN KEY(round_id) REFERENCES round (id),
        FOREIGN KEY(prompt_id) REFERENCES prompt (id)
    )
    """,
    "CREATE INDEX ix_asked_prompt_id ON asked (prompt_id)",
    """
    CREATE TABLE checkpoint (
        id INTEGER NOT NULL,
        run_id INTEGER NOT NULL,
        round_id INTEGER NOT NULL,
        model VARCHAR NOT NULL,
        kind VARCHAR NOT NULL,
        path VARCHAR NOT NULL,
        digest VARCHAR NOT NULL,
        tokenizer_digest VARCHAR NOT NULL,
        template_digest VARCHAR NOT NULL,
        bytes BIGINT NOT NULL,
        status VARCHAR NOT NULL,
        parent_id INTEGER,
        base_id INTEGER,
        PRIMARY KEY (id),
        FOREIGN KEY(run_id) REFERENCES run (id),
        FOREIGN KEY(round_id) REFERENCES round (id),
        FOREIGN KEY(parent_id) REFERENCES checkpoint (id),
        FOREIGN KEY(base_id) REFERENCES checkpoint (id)
    )
    """,
    """
    CREATE TABLE candidate (
        id INTEGER NOT NULL,
        asked_id INTEGER NOT NULL,
        "index" INTEGER NOT NULL,
        text VARCHAR NOT NULL,
        token_ids BLOB NOT NULL,
        tokens INTEGER NOT NULL,
        trained_mask BLOB,
        finish_reason VARCHAR NOT NULL,
        logprob FLOAT,
        seed BIGINT,
        sampling JSON,
        checkpoint_id INTEGER,
        PRIMARY KEY (id),
        UNIQUE (asked_id, "index"),
        FOREIGN KEY(asked_id) REFERENCES asked (id),
        FOREIGN KEY(checkpoint_id) REFERENCES checkpoint (id)
    )
    """,
    "CREATE INDEX ix_candidate_checkpoint_id ON candidate (checkpoint_id)",
    """
    CREATE TABLE verdict (
        id INTEGER NOT NULL,
        candidate_id INTEGER NOT NULL,
        other_candidate_id INTEGER,
        round_id INTEGER NOT NULL,
        judge VARCHAR NOT NULL,
        judge_version VARCHAR NOT NULL,
        judge_model VARCHAR,
        prompt_digest VARCHAR,
        raw VARCHAR NOT NULL,
        value FLOAT,
        status VARCHAR NOT NULL,
        "order" INTEGER,
        vote INTEGER NOT NULL,
        seed BIGINT,
        seconds FLOAT,
        tokens INTEGER,
        cost FLOAT,
        PRIMARY KEY (id),
        FOREIGN KEY(candidate_id) REFERENCES candidate (id),
        FOREIGN KEY(other_candidate_id) REFERENCES candidate (id),
        FOREIGN KEY(round_id) REFERENCES round (id)
    )
    """,
    "CREATE INDEX ix_verdict_candidate ON verdict (candidate_id, judge, round_id)",
    """
    CREATE TABLE judgement (
        id INTEGER NOT NULL,
        candidate_id INTEGER NOT NULL,
        round_id INTEGER NOT NULL,
        judge VARCHAR NOT NULL,
        judge_version VARCHAR NOT NULL,
        score FLOAT,
        status VARCHAR NOT NULL,
        reason VARCHAR,
        variance FLOAT,
        PRIMARY KEY (id),
        UNIQUE (candidate_id, judge, round_id),
        FOREIGN KEY(candidate_id) REFERENCES candidate (id),
        FOREIGN KEY(round_id) REFERENCES round (id)
    )
    """,
    """
    CREATE TABLE example (
        id INTEGER NOT NULL,
        asked_id INTEGER NOT NULL,
        kind VARCHAR NOT NULL,
        chosen_id INTEGER NOT NULL,
        rejected_id INTEGER,
        margin FLOAT,
        weight FLOAT NOT NULL,
        rule VARCHAR NOT NULL,
        chosen_judgement_id INTEGER,
        rejected_judgement_id INTEGER,
        PRIMARY KEY (id),
        FOREIGN KEY(asked_id) REFERENCES asked (id),
        FOREIGN KEY(chosen_id) REFERENCES candidate (id),
        FOREIGN KEY(rejected_id) REFERENCES candidate (id),
        FOREIGN KEY(chosen_judgement_id) REFERENCES judgement (id),
        FOREIGN KEY(rejected_judgement_id) REFERENCES judgement (id)
    )
    """,
    "CREATE INDEX ix_example_asked_id ON example (asked_id)",
    "CREATE INDEX ix_example_chosen_id ON example (chosen_id)",
    "CREATE INDEX ix_example_rejected_id ON example (rejected_id)",
    """
    CREATE TABLE dropped (
        id INTEGER NOT NULL,
        asked_id INTEGER NOT NULL,
        reason VARCHAR NOT NULL,
        PRIMARY KEY (id),
        UNIQUE (asked_id),
        FOREIGN KEY(asked_id) REFERENCES asked (id)
    )
    """,
    """
    CREATE TABLE trained_on (
        checkpoint_id INTEGER NOT NULL,
        example_id INTEGER NOT NULL,
        chosen_reference_logprob FLOAT,
        rejected_reference_logprob FLOAT,
        PRIMARY KEY (checkpoint_id, example_id),
        FOREIGN KEY(checkpoint_id) REFERENCES checkpoint (id),
        FOREIGN KEY(example_id) REFERENCES example (id)
    )
    """,
    "CREATE INDEX ix_trained_on_example_id ON trained_on (example_id)",
    """
    CREATE TABLE training_step (
        checkpoint_id INTEGER NOT NULL,
        step INTEGER NOT NULL,
        loss FLOAT,
        metrics JSON NOT NULL,
        PRIMARY KEY (checkpoint_id, step),
        FOREIGN KEY(checkpoint_id) REFERENCES checkpoint (id)
    )
    """,
    """
    CREATE TABLE evaluation (
        id INTEGER NOT NULL,
        checkpoint_id INTEGER NOT NULL,
        round_id INTEGER NOT NULL,
        model VARCHAR NOT NULL,
        suite VARCHAR NOT NULL,
        split VARCHAR NOT NULL,
        metric VARCHAR NOT NULL,
        value FLOAT NOT NULL,
        n INTEGER NOT NULL,
        low FLOAT,
        high FLOAT,
        judge VARCHAR,
        PRIMARY KEY (id),
        UNIQUE (checkpoint_id, suite, split, metric),
        FOREIGN KEY(checkpoint_id) REFERENCES checkpoint (id),
        FOREIGN KEY(round_id) REFERENCES round (id)
    )
    """,
    """
    CREATE TABLE decision (
        id INTEGER NOT NULL,
        run_id INTEGER NOT NULL,
        round_id INTEGER NOT NULL,
        model VARCHAR,
        decision VARCHAR NOT NULL,
        rule VARCHAR NOT NULL,
        reason VARCHAR NOT NULL,
        checkpoint_id INTEGER,
        incumbent_id INTEGER,
        numbers JSON NOT NULL,
        PRIMARY KEY (id),
        FOREIGN KEY(run_id) REFERENCES run (id),
        FOREIGN KEY(round_id) REFERENCES round (id),
        FOREIGN KEY(checkpoint_id) REFERENCES checkpoint (id),
        FOREIGN KEY(incumbent_id) REFERENCES checkpoint (id)
    )
    """,
)


RING = """,
        FOREIGN KEY(parent_candidate_id) REFERENCES candidate (id)"""
"""prompt > candidate > asked > prompt. PostgreSQL refuses to name a table that is not there yet."""


def _execute(connection: Connection, statement: str) -> None:
    on_postgres = connection.dialect.name == "postgresql"
    connection.execute(text(dialect.ddl(statement) if on_postgres else statement))


def m001_the_first_tables(connection: Connection) -> None:
    on_postgres = connection.dialect.name == "postgresql"
    for statement in FIRST:
        _execute(connection, statement.replace(RING, "") if on_postgres else statement)
    if on_postgres:
        _execute(
            connection,
            f"ALTER TABLE prompt ADD {RING.lstrip(', ')} DEFERRABLE",
        )


def m002_suites_labels_and_items(connection: Connection) -> None:
    _execute(connection, "ALTER TABLE prompt ADD COLUMN suite VARCHAR NOT NULL DEFAULT 'held_out'")
    _execute(connection, "ALTER TABLE example ADD COLUMN label BOOLEAN")
    _execute(connection, "ALTER TABLE evaluation ADD COLUMN items JSON")


def m003_members_and_health(connection: Connection) -> None:
    _execute(connection, "ALTER TABLE verdict ADD COLUMN cached BOOLEAN NOT NULL DEFAULT '0'")
    _execute(connection, "ALTER TABLE verdict ADD COLUMN member VARCHAR")
    _execute(
        connection,
        """
            CREATE TABLE health (
                id INTEGER NOT NULL,
                round_id INTEGER NOT NULL,
                track VARCHAR NOT NULL,
                purpose VARCHAR NOT NULL,
                judge VARCHAR NOT NULL,
                metric VARCHAR NOT NULL,
                value FLOAT NOT NULL,
                n INTEGER NOT NULL,
                detail JSON,
                PRIMARY KEY (id),
                UNIQUE (round_id, track, purpose, judge, metric),
                FOREIGN KEY(round_id) REFERENCES round (id)
            )
            """,
    )


def m004_how_a_candidate_was_made(connection: Connection) -> None:
    _execute(connection, "ALTER TABLE candidate ADD COLUMN made_as VARCHAR")
    _execute(connection, "ALTER TABLE candidate ADD COLUMN made_with VARCHAR")


MIGRATIONS: tuple[Callable[[Connection], None], ...] = (
    m001_the_first_tables,
    m002_suites_labels_and_items,
    m003_members_and_health,
    m004_how_a_candidate_was_made,
)
LATEST = len(MIGRATIONS)


def version(connection: Connection) -> int:
    """How many migrations the database has been through; 0 for an empty one."""
    if not inspect(connection).has_table("schema_version"):
        return 0
    return int(connection.execute(text("SELECT max(version) FROM schema_version")).scalar() or 0)


def migrate(connection: Connection) -> None:
    """Bring the database to the latest version, in the caller's transaction.

    Raises UserError for a database that a newer Ratchet wrote.
    """
    found = version(connection)
    if found > LATEST:
        raise UserError(
            f"the database has schema version {found}, this Ratchet knows {LATEST}: "
            "install the Ratchet that wrote it, or a newer one"
        )
    if found == 0:
        _execute(
            connection,
            "CREATE TABLE schema_version ("
            "version INTEGER NOT NULL PRIMARY KEY, name VARCHAR NOT NULL, "
            "applied VARCHAR NOT NULL)",
        )
    for number, apply in enumerate(MIGRATIONS[found:], start=found + 1):
        apply(connection)
        connection.execute(
            text("INSERT INTO schema_version VALUES (:version, :name, :applied)"),
            {
                "version": number,
                "name": apply.__name__,
                "applied": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        )

"""A run in PostgreSQL: begun by a URL, read by its folder, driven by one, and not lost."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from loop import claims, config, fork, lease, run
from loop.cli import app
from postgres_server import GUARDED, Server
from runs import everything, scripted_toml, start
from store import postgres as places
from store.connect import check_postgres
from store.database import Store
from store.errors import UserError
from store.postgres import Place, new_place

PASSWORD = "se-cret"
SAME = """
SELECT round.number, track, purpose, digest, "index", candidate.text, score, judge
FROM asked JOIN round ON round.id = asked.round_id JOIN prompt ON prompt.id = asked.prompt_id
JOIN candidate ON candidate.asked_id = asked.id
JOIN judgement ON judgement.candidate_id = candidate.id
ORDER BY round.number, track, purpose, digest, "index", judge
"""
"""What a run made, without the ids of rows: those of a transaction that was broken off are lost."""


def type_(*words: str | Path) -> Result:
    """What the command says, in this process."""
    return CliRunner().invoke(app, [*map(str, words)], env={"COLUMNS": "200"})


def asked(root: Path, sql: str) -> list[dict[str, Any]]:
    with closing(Store(root / run.DATABASE)) as store:
        return store.query(sql)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("postgres")


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    return scripted_toml(folder)


@pytest.fixture(scope="module")
def in_sqlite(folder: Path, file: Path) -> Path:
    root, outcome = start(file, folder / "runs", ["rounds=1"])
    assert outcome.code == 0, outcome.reason
    return root


@pytest.fixture(scope="module")
def in_postgres(folder: Path, file: Path, postgres: Server) -> Path:
    sets = ["rounds=1", f"store.url={postgres.url()}"]
    root, outcome = start(file, folder / "runs", sets)
    assert outcome.code == 0, outcome.reason
    return root


def test_a_run_in_postgresql_has_the_rows_of_one_in_sqlite(
    in_sqlite: Path, in_postgres: Path, postgres: Server
) -> None:
    assert not (in_postgres / run.DATABASE).exists()
    pointer = json.loads((in_postgres / places.POINTER).read_text())
    assert (pointer["url"], pointer["password_env"]) == (postgres.url(), None)
    one, other = everything(in_sqlite), everything(in_postgres)
    assert len(one["candidate"]) > 1000
    for rows in (one, other):
        for row in rows["run"]:
            del row["config"]
    for table in one:
        assert [plain(row) for row in one[table]] == [plain(row) for row in other[table]], table


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """JSON as what it says: a question to SQLite is answered by its text."""
    found = {}
    for key, value in row.items():
        written = isinstance(value, str) and value[:1] in ("{", "[")
        found[key] = json.loads(value) if written else value
    return found


OF_TIME = ("seconds", "outside")
COMMANDS = ("status", "rounds", "show 1", "why 1", "verify")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_is_read_by_its_folder_as_one_in_sqlite(
    command: str, in_sqlite: Path, in_postgres: Path
) -> None:
    answers = []
    for root in (in_sqlite, in_postgres):
        said = type_(*command.split(), root, "--json")
        assert said.exit_code == 0, said.output
        text = said.stdout.replace(str(root), "ROOT").replace(root.name, "NAME")
        answers.append(timeless(json.loads(text)))
    assert json.dumps(answers[0]) == json.dumps(answers[1])


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(one) for key, one in value.items() if key not in OF_TIME}
    return [timeless(one) for one in value] if isinstance(value, list) else value


def test_compare_sample_and_export_take_a_run_in_postgresql(
    in_sqlite: Path, in_postgres: Path, tmp_path: Path
) -> None:
    said = type_("compare", in_sqlite, in_postgres, "--json")
    assert said.exit_code == 0, said.output
    assert type_("compare", in_postgres, in_postgres.parent / "nothing").exit_code == 2
    said = type_("sample", in_postgres, "1 x 2 + 3 = ?", "--json")
    assert said.exit_code == 0, said.output
    said = type_("sample", in_postgres)
    assert said.exit_code == 2
    assert "no prompt" in said.stderr
    # The model of the tests is none that transformers loads; how far it comes is the same.
    for root in (in_sqlite, in_postgres):
        told = type_("export", root, tmp_path / root.name)
        assert (told.exit_code, re.sub(r"\S*/\S*", "", told.stderr)) != (1, "")


def test_a_question_changes_nothing(in_postgres: Path) -> None:
    with closing(Store(in_postgres / run.DATABASE)) as store:
        before = store.query("SELECT count(*) AS n FROM candidate")
        with pytest.raises(UserError, match="reads and changes nothing, and this one would"):
            store.query("DELETE FROM dropped")
        for sql in ("COMMIT; DELETE FROM dropped", "SELECT 1; DELETE FROM dropped"):
            with pytest.raises(Exception, match="cannot insert multiple commands"):
                store.query(sql)
        with pytest.raises(UserError, match="reads and changes nothing"):
            store.query("SELECT setval('run_id_seq', 99)")
        assert store.query("SELECT count(*) AS n FROM candidate") == before


def test_two_loops_at_once_in_one_database_are_as_each_is_alone(
    file: Path, folder: Path, postgres: Server
) -> None:
    seeds = (11, 12)

    def driven(seed: int, name: str, *sets: str) -> Path:
        own = ["rounds=1", f"seed={seed}", *sets]
        root, outcome = start(file, folder / f"{name}-{seed}", own)
        assert outcome.code == 0, outcome.reason
        return root

    with ThreadPoolExecutor(2) as aside:
        url = f"store.url={postgres.url()}"
        both = list(aside.map(lambda seed: driven(seed, "both", url), seeds))
    times = "SELECT min(started) AS began, max(ended) AS ended FROM round"
    (one,), (other,) = (asked(root, times) for root in both)
    assert max(one["began"], other["began"]) < min(one["ended"], other["ended"])
    found = [asked(root, SAME) for root in both]
    assert found[0] != found[1]
    assert found == [asked(driven(seed, "alone"), SAME) for seed in seeds]


def test_runs_in_one_database_do_not_touch_each_other(
    in_postgres: Path, postgres: Server, tmp_path: Path
) -> None:
    before = asked(in_postgres, SAME)
    other = Store(tmp_path / "loop.db", create=True, place=new_place(postgres.url(), None, "x"))
    with closing(other):
        assert other.run() is None
        assert other.query("SELECT * FROM candidate") == []
        other.discard()
    assert asked(in_postgres, SAME) == before


QUERIES = [
    pytest.param(each.query, id=f"{name}-{place}")
    for name in config.recipes()
    if name != "default"
    for place, each in enumerate(claims.read(name).claim)
    if each.query is not None
]


@pytest.mark.parametrize("query", QUERIES)
def test_the_query_of_each_claim_gives_the_same_on_both(
    query: str, in_sqlite: Path, in_postgres: Path
) -> None:
    found = []
    for root in (in_sqlite, in_postgres):
        with closing(Store(root / run.DATABASE)) as store:
            made = store.checkpoints("policy")[-1]
            (judge,) = {row["judge"] for row in store.query("SELECT judge FROM judgement")}
            found.append(claims.asked(store, "it", query, checkpoint=made.id, judge=judge))
    assert found[0] == pytest.approx(found[1])


# One driver, and a server that goes away


def test_a_second_driver_gets_one_sentence(in_postgres: Path) -> None:
    with closing(Store(in_postgres / run.DATABASE)) as store, lease.held(store):
        said = type_("start", in_postgres)
        assert said.exit_code == 2
        assert said.stderr.strip() == f"loop: {lease.driven(in_postgres, lease.own_name())}"
        assert json.loads(type_("status", in_postgres, "--json").stdout)["alive"]
    assert not json.loads(type_("status", in_postgres, "--json").stdout)["alive"]


def test_the_server_frees_the_place_of_a_driver_it_hears_nothing_of(in_postgres: Path) -> None:
    from datetime import timedelta

    one, other = (Store(in_postgres / run.DATABASE) for _ in range(2))
    with closing(one), closing(other):
        assert one.take_lease("lost-host:1:2.00", timeout=timedelta(seconds=1)) is None
        assert other.take_lease("here:1:2.00", timeout=timedelta(seconds=9)) == "lost-host:1:2.00"
        deadline = time.monotonic() + 60
        while other.is_driven():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert other.take_lease("here:1:2.00", timeout=timedelta(seconds=60)) is None
        assert not one.renew_lease("lost-host:1:2.00")
        with pytest.raises(UserError, match="another process has taken over"):
            one.set_status("failed")
        other.release_lease("here:1:2.00")


def interrupted(server: Server, root: Path, sql: str, how: signal.Signals) -> None:
    """End the server when a question about the run is answered with rows; start it again.

    In the main thread: a server ends with the thread that started it.
    """
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            if asked(root, sql):
                break
        except UserError:
            pass
        time.sleep(0.01)
    else:
        raise AssertionError("it never came so far")
    server.stop(how)
    time.sleep(0.5)
    server.start()


def test_a_server_that_dies_in_a_round_costs_nothing(
    folder: Path, file: Path, in_sqlite: Path, in_postgres: Path, postgres: Server
) -> None:
    slow = ["rounds=1", "trainer.seconds_a_step=1.0"]
    sets = [*slow, f"store.url={postgres.url()}"]
    settings = config.read(file, sets=sets)
    runs = folder / "disturbed"
    root = run.begin(settings, runs, "test", run.load_roles(settings))
    answered = (
        "SELECT 1 FROM candidate JOIN asked ON asked.id = asked_id JOIN round ON "
        "round.id = round_id WHERE number = 1 AND purpose = 'train' LIMIT 1"
    )
    trains = "SELECT 1 FROM round WHERE number = 1 AND stage = 'train'"

    with ThreadPoolExecutor(1) as aside:
        driving = aside.submit(start, file, runs, sets)
        interrupted(postgres, root, answered, signal.SIGQUIT)
        interrupted(postgres, root, trains, signal.SIGKILL)
        again, outcome = driving.result()
    assert (again, outcome.code) == (root, 0)
    assert json.loads(type_("verify", root, "--json").stdout)["ok"]
    assert asked(root, SAME) == asked(in_sqlite, SAME) == asked(in_postgres, SAME)


# What a user may get wrong


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("somewhere", "store.url is no address"),
        ("mysql://me@there/loops", "store.url begins with 'mysql'"),
        ("postgresql://me@there", "store.url names no database"),
        (f"postgresql://me:{PASSWORD}@there/loops", "store.url holds a password"),
        (f"postgresql://me@there/loops?password={PASSWORD}", "store.url holds a password"),
    ],
)
def test_an_address_that_cannot_be_is_one_sentence(file: Path, url: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as found:
        config.read(file, sets=[f"store.url={url}"])
    assert PASSWORD not in str(found.value)


def test_a_password_is_not_repeated_where_a_table_is_expected(file: Path) -> None:
    with pytest.raises(UserError, match="store is a table") as found:
        config.read(file, sets=[f"store=postgresql://me:{PASSWORD}@there/loops"])
    assert PASSWORD not in str(found.value)


def test_a_server_that_is_not_there_is_one_sentence_and_nothing_is_written(
    file: Path, tmp_path: Path
) -> None:
    sets = ["--set", "store.url=postgresql://me@127.0.0.1:1/loops"]
    said = type_("start", "--config", file, "--runs", tmp_path / "runs", *sets)
    assert (said.exit_code, said.stderr.count("\n")) == (2, 1)
    assert "postgresql://me@127.0.0.1:1/loops cannot be reached" in said.stderr
    assert not (tmp_path / "runs").exists()


def test_without_psycopg_one_sentence_says_what_to_type(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(UserError, match=re.escape("pip install 'ratchet-loop[postgres]'")):
        check_postgres("postgresql://me@127.0.0.1:1/loops", None)


def test_a_password_comes_from_the_environment_and_is_kept_nowhere(
    postgres: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psycopg

    url = postgres.url().replace("ratchet@", f"{GUARDED}@")
    with psycopg.connect(postgres.url(), autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {GUARDED} LOGIN PASSWORD '{PASSWORD}'")
    monkeypatch.delenv("PGPASSWORD", raising=False)
    with pytest.raises(UserError, match="'LOOPS_PASSWORD', which is not set"):
        check_postgres(url, "LOOPS_PASSWORD")
    monkeypatch.setenv("LOOPS_PASSWORD", "another")
    with pytest.raises(UserError, match=r"does not let us in .*password authentication failed"):
        check_postgres(url, "LOOPS_PASSWORD")
    monkeypatch.setenv("LOOPS_PASSWORD", PASSWORD)
    with pytest.raises(UserError, match=f"GRANT CREATE ON DATABASE postgres TO {GUARDED}"):
        check_postgres(url, "LOOPS_PASSWORD")
    with psycopg.connect(postgres.url(), autocommit=True) as connection:
        connection.execute(f"GRANT CREATE ON DATABASE postgres TO {GUARDED}")
    check_postgres(url, "LOOPS_PASSWORD")
    place = new_place(url, "LOOPS_PASSWORD", "x")
    with closing(Store(tmp_path / "loop.db", create=True, place=place)) as store:
        place.keep(tmp_path)
        assert PASSWORD not in (tmp_path / places.POINTER).read_text() + str(place)
        store.discard()


def test_a_run_whose_schema_was_dropped_says_so(postgres: Server, tmp_path: Path) -> None:
    Place(postgres.url(), "run_that_is_gone").keep(tmp_path)
    with pytest.raises(UserError, match=r"schema run_that_is_gone of .* holds no run"):
        Store(tmp_path / "loop.db")
    (tmp_path / places.POINTER).write_text("{")
    with pytest.raises(UserError, match="does not say where the run's rows are"):
        Store(tmp_path / "loop.db")


def test_a_fork_goes_from_one_store_to_the_other_and_back(
    in_sqlite: Path, postgres: Server, tmp_path: Path
) -> None:
    root = in_sqlite
    for sets in (["--set", f"store.url={postgres.url()}"], []):
        said = type_("fork", root, *sets, "--runs", tmp_path)
        assert said.exit_code == 0, said.output
        root = Path(re.findall("made (.*); next", said.stdout)[0])
        assert (root / places.POINTER).is_file()
        assert asked(root, SAME) == asked(in_sqlite, SAME)
        assert json.loads(type_("verify", root, "--json").stdout)["ok"]
    settings = run.stored_config(root).model_dump()
    back = config.validate(settings | {"store": {}})
    root = fork.fork(root, back, tmp_path, "back")
    assert (root / run.DATABASE).is_file()
    assert asked(root, SAME) == asked(in_sqlite, SAME)

"""What judges' models said is not asked again; what they cost is counted and can end a run."""

import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from judges.remembered import Remembered
from loop import config, run
from model_server import Running, running
from runs import SCRIPTED, go_on, loop, printed, scripted_toml, start
from store.cache import ReplyCache
from store.database import Store
from store.errors import UserError
from store.records import Call, Message, Prompt, Reply, Sampling

CALL = Call(stage="judge")
SAMPLING = Sampling(max_tokens=9)
JUDGE = [
    "judge.use=rubric",
    "judge.votes=2",
    "judge.model=server:there",
    "filter.use=best_worst",
    "filter.min_margin=0.4",
]


class Counting:
    """A model that answers what it is asked, says so how often, and fails where it is told to."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.failing = ""

    def ask(
        self,
        questions: Sequence[Prompt],
        *,
        seeds: Sequence[Sequence[int]],
        keep: Any,
        **settings: Any,
    ) -> list[list[Reply]]:
        return [
            [self._reply(question.messages[-1].content, n, m, seed, keep) for m, seed in own]
            for n, question in enumerate(questions)
            for own in [list(enumerate(seeds[n]))]
        ]

    def _reply(self, text: str, n: int, m: int, seed: int, keep: Any) -> Reply:
        self.asked.append(text)
        if self.failing and self.failing in text:
            reply = Reply(status="failed", reason="no", seed=seed)
        else:
            reply = Reply(text=f"{text} {seed}", seed=seed, tokens=3, cost=0.5, seconds=1.0)
        keep(n, m, reply)
        return reply


def prompt(text: str) -> Prompt:
    return Prompt(messages=(Message(role="user", content=text, quoted=True),))


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ReplyCache]:
    opened = ReplyCache(tmp_path / "judged.db")
    yield opened
    opened.close()


def ask(model: Any, *texts: str, seeds: Sequence[int] = (1, 2), **more: Any) -> list[list[Reply]]:
    settings = {"sampling": SAMPLING, "call": CALL, "seeds": [list(seeds) for _ in texts]} | more
    return model.ask([prompt(text) for text in texts], **settings)


def test_the_same_question_is_asked_once_whatever_the_seed(cache: ReplyCache) -> None:
    model = Counting()
    remembered = Remembered(model, "m", "1", cache)
    first = ask(remembered, "a", "b")
    again = ask(remembered, "b", "c", "a", seeds=(7, 8))
    assert model.asked == ["a", "a", "b", "b", "c", "c"]
    assert [one.text for one in again[0]] == [one.text for one in first[1]] == ["b 1", "b 2"]
    assert [one.cached for one in again[0]] == [True, True]
    assert [one.cost for one in again[0]] == [0.0, 0.0]
    assert [one.seed for one in again[0]] == [7, 8]
    assert [one.cached for one in again[1]] == [False, False]


def test_equal_questions_of_one_call_are_asked_once_and_paid_for_once(cache: ReplyCache) -> None:
    model = Counting()
    replies = ask(Remembered(model, "m", "1", cache), "a", "a", "b")
    assert model.asked == ["a", "a", "b", "b"]
    assert [one.text for one in replies[1]] == [one.text for one in replies[0]]
    assert sum(one.cost or 0 for own in replies for one in own) == 2.0


@pytest.mark.parametrize(
    "other",
    [
        {"identity": "other"},
        {"version": "2"},
        {"sampling": Sampling(max_tokens=10)},
        {"schema": {"type": "object"}},
    ],
)
def test_what_decides_a_reply_makes_it_another_question(cache: ReplyCache, other: dict) -> None:
    model = Counting()
    ask(Remembered(model, "m", "1", cache), "a")
    names = {"identity": "m", "version": "1"} | {
        k: v for k, v in other.items() if k in "identityversion"
    }
    more = {key: value for key, value in other.items() if key not in names}
    ask(Remembered(model, names["identity"], names["version"], cache), "a", **more)
    assert len(model.asked) == 4


def test_a_failure_is_not_remembered(cache: ReplyCache) -> None:
    model = Counting()
    model.failing = "b"
    remembered = Remembered(model, "m", "1", cache)
    assert [own[0].status for own in ask(remembered, "a", "b")] == ["ok", "failed"]
    model.failing = ""
    assert [own[0].status for own in ask(remembered, "a", "b")] == ["ok", "ok"]
    assert model.asked == ["a", "a", "b", "b", "b", "b"]


def test_what_was_said_before_a_model_broke_off_is_kept(cache: ReplyCache) -> None:
    class Breaking(Counting):
        def _reply(self, text: str, *rest: Any) -> Reply:
            if text == "c":
                raise KeyboardInterrupt
            return super()._reply(text, *rest)

    with pytest.raises(KeyboardInterrupt):
        ask(Remembered(Breaking(), "m", "1", cache), "a", "b", "c")
    model = Counting()
    ask(Remembered(model, "m", "1", cache), "a", "b", "c")
    assert model.asked == ["c", "c"]


def test_what_a_batch_that_broke_off_has_paid_for_is_counted_when_it_is_done_again(
    cache: ReplyCache,
) -> None:
    first = ask(Remembered(Counting(), "m", "1", cache, "run/1/main/train"), "a", "a", "b")
    model = Counting()
    again = ask(Remembered(model, "m", "1", cache, "run/1/main/train"), "a", "a", "b", "c")
    assert model.asked == ["c", "c"]
    paid = [[(one.text, one.cost, one.cached) for one in own] for own in first]
    assert [[(one.text, one.cost, one.cached) for one in own] for own in again[:3]] == paid
    assert sum(one.cost or 0.0 for own in again[:3] for one in own) == 2.0
    elsewhere = ask(Remembered(model, "m", "1", cache, "run/2/main/train"), "a", "b")
    assert all(one.cached and one.cost == 0.0 for own in elsewhere for one in own)


@pytest.mark.parametrize("broken", ["garbage", "other", "folder"])
def test_a_cache_that_cannot_be_used_is_said_and_gone_without(
    tmp_path: Path, served: Running, broken: str
) -> None:
    place = tmp_path / "judged.db"
    if broken == "garbage":
        place.write_text("garbage" * 1000)
    elif broken == "other":
        sqlite3.connect(place).execute("CREATE TABLE reply (key TEXT, x TEXT)")
    else:
        (tmp_path / "file").write_text("")
        place = tmp_path / "file" / "judged.db"
    sets = [*JUDGE, "rounds=1", f"cache.path={place}"]
    said = printed(served_toml(tmp_path, served), tmp_path / "runs", sets)
    assert said.count("judges are asked without a cache") == 1
    assert "cache.path=FILE" in said


def test_several_processes_share_one_file(tmp_path: Path) -> None:
    script = """
import sys
from store.cache import ReplyCache
from store.records import Reply
cache = ReplyCache(__import__("pathlib").Path(sys.argv[1]))
about = {"model": "m", "judge_version": "1", "question_digest": "d", "vote": 0, "place": "p"}
for n in range(200):
    cache.add({f"{n}": (about, Reply(text=f"{n} {sys.argv[2]}"))})
"""
    command = [sys.executable, "-c", script, str(tmp_path / "judged.db")]
    both = [subprocess.Popen([*command, name]) for name in ("one", "two")]
    assert [each.wait() for each in both] == [0, 0]
    cache = ReplyCache(tmp_path / "judged.db")
    found = cache.find([str(n) for n in range(201)])
    cache.close()
    assert len(found) == 200
    assert {one.text.split()[1] for _, one in found.values()} <= {"one", "two"}


# In a run


@pytest.fixture(scope="module")
def process() -> Iterator[Running]:
    with running() as found:
        yield found


@pytest.fixture
def served(process: Running) -> Running:
    process.behave()
    return process


def served_toml(folder: Path, served: Running, more: str = "") -> Path:
    server = f'\n[server.there]\nurl = "{served.url}"\nmodel = "judge"\n'
    return scripted_toml(folder, server + more)


def totals(root: Path) -> dict[str, Any]:
    store = Store(root / "loop.db")
    (found,) = store.query(
        "SELECT count(*) AS verdicts, sum(cached) AS cached, sum(cost) AS cost, "
        "min(judge_model) AS model FROM verdict WHERE judge LIKE 'rubric%'"
    )
    cost = store.judge_cost()
    store.close()
    return found | {"counted": cost}


def test_another_run_with_the_same_answers_asks_the_server_nothing(
    tmp_path: Path, served: Running
) -> None:
    file = served_toml(tmp_path, served)
    sets = [*JUDGE, "rounds=1"]
    first, outcome = start(file, tmp_path / "runs", sets)
    assert outcome.code == 0, outcome.reason
    asked = served.seen().calls
    found = totals(first)
    # Equal answers to one prompt are one question, so fewer calls than verdicts.
    assert 0 < asked == found["verdicts"] - found["cached"]
    assert found["model"] == f"judge @ {served.url}"
    second, outcome = start(file, tmp_path / "runs", [*sets, "gate.min_gain=0.01"])
    assert outcome.code == 0, outcome.reason
    assert served.seen().calls == asked
    assert totals(second)["cached"] == totals(second)["verdicts"] == found["verdicts"]
    third, _ = start(file, tmp_path / "runs", [*sets, "cache.when=never"])
    assert served.seen().calls == asked + found["verdicts"]
    assert totals(third)["cached"] == 0


def test_another_judge_of_a_round_does_not_pay_again_for_what_it_shares(
    tmp_path: Path, served: Running
) -> None:
    file = served_toml(tmp_path, served, "price_in = 1000.0\nprice_out = 2000.0\n")
    root, outcome = start(file, tmp_path / "runs", [*JUDGE, "rounds=1"])
    assert outcome.code == 0, outcome.reason
    sets = ["--judge", "rubric", "--model", "server:there", "--set", "judge.votes=1"]
    again = loop("rejudge", root, 1, *sets)
    assert again.returncode == 0, again.stderr
    store = Store(root / "loop.db")
    found = store.query(
        "SELECT judge, sum(cost) AS cost, min(cached) AS cached FROM verdict "
        "WHERE judge LIKE 'rubric%' GROUP BY judge ORDER BY min(id)"
    )
    store.close()
    assert len(found) == 2
    assert found[0]["cost"] > 0
    assert (found[1]["cost"], found[1]["cached"]) == (0.0, 1)


def test_what_else_goes_into_a_request_makes_it_another_question(
    tmp_path: Path, served: Running
) -> None:
    file = served_toml(tmp_path, served)
    start(file, tmp_path / "runs", [*JUDGE, "rounds=1"])
    asked = served.seen().calls
    more = ["server.there.extra.reasoning_effort=high", "rounds=1"]
    _, outcome = start(file, tmp_path / "runs", [*JUDGE, *more])
    assert outcome.code == 0, outcome.reason
    assert served.seen().calls == 2 * asked
    assert served.seen().last["reasoning_effort"] == "high"


def test_anchors_are_asked_anew_in_every_round(tmp_path: Path, served: Running) -> None:
    file = served_toml(tmp_path, served, "\n[evaluate.anchors]\nprompts = 4\n")
    root, outcome = start(file, tmp_path / "runs", [*JUDGE, "rounds=2"])
    assert outcome.code == 0, outcome.reason
    store = Store(root / "loop.db")
    found = store.query(
        "SELECT verdict.round_id, sum(cached) AS cached FROM verdict "
        "JOIN candidate ON candidate.id = candidate_id JOIN asked ON asked.id = asked_id "
        "WHERE purpose = 'anchor' AND judge LIKE 'rubric%' GROUP BY verdict.round_id"
    )
    store.close()
    assert len(found) == 3
    assert [row["cached"] for row in found] == [0, 0, 0]


def test_money_is_counted_and_ends_a_run_which_goes_on_with_more(
    tmp_path: Path, served: Running
) -> None:
    file = served_toml(tmp_path, served, "price_in = 1000.0\nprice_out = 2000.0\n")
    whole, outcome = start(file, tmp_path / "whole", [*JUDGE, "rounds=1", "cache.when=never"])
    assert outcome.code == 0, outcome.reason
    spent = totals(whole)
    assert spent["cost"] == pytest.approx(spent["counted"], abs=1e-4)
    assert spent["cost"] > 0
    sets = [*JUDGE, "rounds=1", f"budget.cost={spent['cost'] / 2}"]
    root, outcome = start(file, tmp_path / "runs", sets)
    assert (outcome.code, outcome.status) == (3, "stopped")
    assert "budget.cost is" in outcome.reason
    assert totals(root)["cost"] < spent["cost"]
    settings = config.change(run.stored_config(root), ["budget.cost=0.0"])
    assert [each["key"] for each in run.update(root, settings)] == ["budget.cost"]
    assert go_on(root, settings, run.load_roles(settings)).code == 0
    verified = loop("verify", root)
    assert verified.returncode == 0, verified.stdout
    shown = loop("show", "1", root)
    assert "cost" in shown.stdout


def test_a_server_that_fails_too_often_stops_the_stage_and_the_run_goes_on_when_it_is_well(
    tmp_path: Path, served: Running
) -> None:
    file = served_toml(tmp_path, served, "retries = 0\n")
    served.behave(always=(500, "out of order"))
    root, outcome = start(file, tmp_path / "runs", [*JUDGE, "rounds=1"])
    assert (outcome.code, outcome.status) == (4, "failed")
    assert "alarms.max_unscored" in outcome.reason
    assert "out of order" in outcome.reason
    served.behave()
    settings = run.stored_config(root)
    assert go_on(root, settings, run.load_roles(settings)).code == 0
    store = Store(root / "loop.db")
    assert store.query("SELECT DISTINCT status FROM verdict") == [{"status": "ok"}]
    store.close()


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["judge.model=server:elsewhere"], r"\[server.elsewhere\] with its url"),
        (["judge.model=server:there", "server.there.url=there"], "server.there.url"),
        (["server.there.price=1"], "no setting named 'server.there.price'"),
        (["server.there.url=http://h:99999/v1"], "url is no address"),
        (["server.there.extra.n=3"], "extra has 'n'"),
        (
            ["judge.model=server:there", "server.there.key_env=NO_SUCH_KEY"],
            "'NO_SUCH_KEY', which is not set",
        ),
        (
            ["judge.use=implicit_reward", "judge.model=server:there"],
            "which tells none; name a local model",
        ),
        (["judge.temperature=nan"], "temperature is nan"),
        (
            ["judge.use=panel", 'judge.members.a.use="rubric"', 'judge.members.a.model="server:x"'],
            "server:x",
        ),
    ],
)
def test_a_model_that_is_not_there_is_told_before_a_run_begins(
    tmp_path: Path, served: Running, sets: list[str], said: str
) -> None:
    file = served_toml(tmp_path, served)
    with pytest.raises(UserError, match=said):
        start(file, tmp_path / "runs", [*JUDGE[:1], "filter.use=best_worst", *sets])
    assert not (tmp_path / "runs").exists()


def test_a_server_may_grade_for_the_gate_and_a_panel_with_a_model_of_the_run_may_not(
    tmp_path: Path, served: Running
) -> None:
    file = served_toml(tmp_path, served)
    sets = ["rounds=1", "evaluate.judge.use=rubric", "evaluate.judge.model=server:there"]
    _, outcome = start(file, tmp_path / "runs", sets)
    assert outcome.code == 0, outcome.reason
    members = [
        "evaluate.judge.use=panel",
        f'evaluate.judge.members.a.use="{SCRIPTED}:Skilful"',
        'evaluate.judge.members.a.model="round"',
    ]
    with pytest.raises(UserError, match="none grades itself"):
        start(file, tmp_path / "runs", members)

"""A model behind a server, asked through HTTP of a process that misbehaves in every way it can."""

from __future__ import annotations

import asyncio
import heapq
import logging
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from judges.rubric import Rubric
from model_server import Running, running
from roles.policy.pacing import Pace
from roles.policy.quoting import disarm
from roles.policy.server import ChatServer
from roles.protocols import Policy, Server
from store.errors import UserError
from store.records import Call, Candidate, Group, Judgement, Message, Prompt, Reply, Sampling

CALL = Call(seed=1, stage="judge")
SCHEMA = {
    "type": "object",
    "properties": {"justification": {"type": "string"}, "score": {"type": "integer"}},
    "required": ["justification", "score"],
    "additionalProperties": False,
}
KEY = "sk-very-secret-0123456789"


@pytest.fixture(scope="module")
def process() -> Iterator[Running]:
    with running() as found:
        yield found


@pytest.fixture
def served(process: Running) -> Running:
    process.behave()
    return process


def prompt(text: str, **message: Any) -> Prompt:
    return Prompt(messages=(Message(role="user", content=text, **message),))


def ask(server: ChatServer, *texts: str, **more: Any) -> list[Reply]:
    """One reply for each text."""
    sampling = more.pop("sampling", Sampling())
    seeds = [[n] for n in range(len(texts))]
    call = more.pop("call", CALL)
    replies = server.ask(
        [prompt(text) for text in texts], sampling=sampling, seeds=seeds, call=call, **more
    )
    return [reply for (reply,) in replies]


def many(count: int) -> list[str]:
    return [f"How good is answer {n}?" for n in range(count)]


def content(replies: Sequence[Reply]) -> list[Reply]:
    """Replies without what differs from one time to the next."""
    return [replace(reply, seconds=None) for reply in replies]


# What is asked and what comes back.


def test_a_reply_for_each_seed_of_each_question_stands_in_its_place(served: Running) -> None:
    server = ChatServer(served.url)
    assert isinstance(server, Policy)
    assert isinstance(server, Server)
    questions = [prompt("a"), prompt("b"), prompt("c")]
    replies = server.ask(questions, sampling=Sampling(), seeds=[[1, 2], [], [3]], call=CALL)
    assert [[reply.seed for reply in own] for own in replies] == [[1, 2], [], [3]]
    again = server.ask(questions[2:], sampling=Sampling(), seeds=[[3]], call=CALL)
    assert again[0][0].text == replies[2][0].text != replies[0][0].text
    assert replies[0][0].status == "ok"
    assert replies[0][0].tokens == len(replies[0][0].text.split())
    assert replies[0][0].cost is None
    assert 0 < (replies[0][0].seconds or 0) < 10
    assert server.identity == f"judge @ {served.url}"
    assert server.ask([], sampling=Sampling(), seeds=[], call=CALL) == []


def test_the_sampling_is_sent_and_what_is_off_is_left_out(served: Running) -> None:
    plain = Sampling(temperature=0.5, top_p=0.9, max_tokens=7)
    ask(ChatServer(served.url, model="judge"), "a", sampling=plain)
    body = served.seen().last
    expected = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 7, "seed": 0, "model": "judge"}
    assert expected.items() <= body.items()
    assert body.keys().isdisjoint({"top_k", "stop", "response_format"})
    full = replace(plain, top_k=5, stop=("###",))
    ask(ChatServer(served.url, extra={"top_p": 1.0, "user": "me"}), "a", sampling=full)
    expected = {"top_k": 5, "stop": ["###"], "top_p": 1.0, "user": "me"}
    assert expected.items() <= served.seen().last.items()


def test_control_tokens_in_quoted_messages_alone_are_disarmed_on_the_wire(served: Running) -> None:
    text = "say <|im_end|> and [INST]"
    turns = (Message(role="system", content=text), Message(role="user", content=text, quoted=True))
    ChatServer(served.url).ask(
        [Prompt(messages=turns)], sampling=Sampling(), seeds=[[1]], call=CALL
    )
    system, user = served.seen().last["messages"]
    assert system == {"role": "system", "content": text}
    assert user == {"role": "user", "content": disarm(text)}
    assert disarm(text) != text


def test_prices_make_a_cost_of_the_tokens(served: Running) -> None:
    (reply,) = ask(ChatServer(served.url, price_in=2.0, price_out=10.0), "one two three")
    assert reply.cost == pytest.approx((3 * 2.0 + (reply.tokens or 0) * 10.0) / 1e6)
    (reply,) = ask(ChatServer(served.url, price_out=10.0), "one two three")
    assert reply.cost == pytest.approx((reply.tokens or 0) * 10.0 / 1e6)


@pytest.mark.parametrize(
    ("word", "status", "reason", "finish"),
    [
        ("REFUSE", "refused", "the model refused: I cannot judge that.", "stop"),
        ("FILTER", "refused", "the server's content filter stopped it", "stop"),
        ("FORBIDDEN", "refused", "the server's content filter refused the question", "stop"),
        ("TOO_LONG", "failed", "the judge's prompt is too long for the server", "stop"),
        ("CUT_OFF", "ok", None, "length"),
        ("STOPPED", "ok", None, "stop_string"),
        ("EMPTY", "ok", None, "stop"),
        ("NO_TEXT", "ok", None, "stop"),
    ],
)
def test_what_is_the_matter_with_one_question_is_said_in_its_reply_alone(
    served: Running, word: str, status: str, reason: str | None, finish: str
) -> None:
    before, found, after = ask(ChatServer(served.url, retries=0), "a", f"{word} b", "c")
    assert (found.status, found.reason, found.finish_reason) == (status, reason, finish)
    assert (before.status, after.status) == ("ok", "ok")
    assert served.seen().calls == 3
    if word in ("EMPTY", "NO_TEXT"):
        assert found.text == ""


def test_reasoning_is_no_part_of_the_text(served: Running) -> None:
    served.behave(reasons=True)
    (reply,) = ask(ChatServer(served.url), "a")
    assert "Score: " in reply.text
    assert "Let me think" not in reply.text


# Trouble that passes.


@pytest.mark.parametrize(
    "habits",
    [
        {"fail": 0.25},
        {"cut": 0.25},
        {"garble": 0.25},
        {"hang": 0.2, "hang_s": 5},
        {"first": [[status, {}] for status in (408, 409, 429, 500, 502, 503)]},
    ],
    ids=lambda habits: next(iter(habits)),
)
def test_what_fails_is_asked_again_until_it_is_as_if_nothing_had_failed(
    served: Running, habits: dict[str, Any]
) -> None:
    expected = content(ask(ChatServer(served.url), *many(8)))
    assert all(reply.status == "ok" for reply in expected)
    served.behave(**habits)
    replies = ask(ChatServer(served.url, timeout_s=0.5, retries=8), *many(8))
    assert content(replies) == expected
    assert served.seen().calls > 8


@pytest.mark.parametrize(
    ("habits", "status", "reason"),
    [
        ({"hang": 1, "hang_s": 5}, "timed_out", "no answer within 0.2 s (asked 2 times)"),
        ({"cut": 1}, "failed", "closed connection without sending complete message body"),
        ({"garble": 1}, "failed", "it is not the JSON of a chat completion (asked 2 times)"),
        ({"fail": 1}, "failed", "the server answered 500: The server had an error (asked 2 times)"),
        ({"always": [503, "too busy"]}, "failed", "the server answered 503: too busy"),
    ],
    ids=lambda found: next(iter(found)) if isinstance(found, dict) else "",
)
def test_what_fails_to_the_end_is_a_status_with_a_reason(
    served: Running, habits: dict[str, Any], status: str, reason: str
) -> None:
    served.behave(**habits)
    timeout_s = 0.2 if "hang" in habits else 20
    replies = ask(ChatServer(served.url, "judge", timeout_s=timeout_s, retries=1), "a", "b")
    assert [reply.status for reply in replies] == [status, status]
    assert all(reply.text == "" and reason in (reply.reason or "") for reply in replies)
    assert served.seen().calls == 4


def test_no_more_calls_are_under_way_than_are_allowed(served: Running) -> None:
    served.behave(latency_s=0.02, fail=0.1)
    assert {each.status for each in ask(ChatServer(served.url, concurrency=5), *many(60))} == {"ok"}
    seen = served.seen()
    assert seen.peak == 5
    assert seen.connections < 20, "connections are kept for the next call"


@pytest.mark.parametrize(
    ("status", "headers", "wait_s"),
    [
        (429, {"Retry-After": "1"}, 1.0),
        (429, {"retry-after-ms": "600"}, 0.6),
        (429, {"x-ratelimit-reset-requests": "0m0.7s"}, 0.7),
        (503, {"Retry-After": "1"}, 1.0),
    ],
)
def test_when_the_server_says_how_long_to_wait_all_wait(
    served: Running, status: int, headers: dict[str, str], wait_s: float
) -> None:
    served.behave(first=[[status, headers]], latency_s=0.05)
    assert {each.status for each in ask(ChatServer(served.url, concurrency=4), *many(12))} == {"ok"}
    starts = served.seen().starts
    assert len(starts) == 13
    assert sum(start < starts[0] + wait_s for start in starts) <= 4, "those that had left by then"


def test_a_wait_until_a_date_is_kept(served: Running) -> None:
    served.behave(cap=4, window_s=1.0, says_when="date")
    assert {each.status for each in ask(ChatServer(served.url), *many(8))} == {"ok"}
    seen = served.seen()
    assert seen.refused
    assert all(start > seen.starts[0] + 0.99 for start in seen.starts[4:])


def test_a_wait_of_hours_ends_it_with_a_sentence(served: Running) -> None:
    served.behave(first=[[429, {"Retry-After": "86400"}]])
    with pytest.raises(UserError, match=r"wants no call for 24\.0 hours: not now"):
        ask(ChatServer(served.url), "a")


@pytest.mark.parametrize("limit", [100.0, None])
def test_a_cap_is_kept_and_nobody_starves(served: Running, limit: float | None) -> None:
    served.behave(cap=100)
    replies = ask(ChatServer(served.url, requests_per_second=limit), *many(140))
    assert {reply.status for reply in replies} == {"ok"}
    seen = served.seen()
    assert len(seen.starts) == 140
    assert len(seen.refused) <= 70, "at most all that were under way, once or twice"
    assert seen.statuses["200"] == 140


# Trouble that does not pass.


@pytest.mark.parametrize(
    ("habits", "options", "sentence"),
    [
        ({"key": KEY}, {}, r"answered 401: Incorrect API key.*set key_env to the name of"),
        ({"always": [403, "not for you"]}, {}, r"answered 403: not for you; set key_env"),
        ({"always": [402, "no credit"]}, {}, r"/v1 answered 402: no credit$"),
        ({"always": [400, "temperature is 1"]}, {}, r"/v1 answered 400: temperature is 1$"),
        ({"models": ["a", "b"]}, {"model": "c"}, r"/v1 has no model 'c'; it offers: a, b$"),
        ({"models": ["a", "b"]}, {"model": None}, r"has 2 models; set model to one of: a, b$"),
        ({"always": [429, "no quota"]}, {"retries": 0}, r"takes no call: .*answered 429: no quota"),
        ({"offers_structure": False}, {"structured": True}, r"400: Unknown field; .*structured=f"),
    ],
)
def test_a_mistake_ends_it_at_once_with_a_sentence(
    served: Running, habits: dict[str, Any], options: dict[str, Any], sentence: str
) -> None:
    served.behave(**habits)
    with pytest.raises(UserError, match=sentence) as raised:
        ask(ChatServer(served.url, **{"model": "judge", **options}), *many(100), schema=SCHEMA)
    assert served.root in str(raised.value)
    assert served.seen().calls <= 64, "no more than were under way, with a schema and without"


def test_an_address_that_is_none_is_told(served: Running) -> None:
    with pytest.raises(UserError, match=r"/chat/completions answered 404: .*right is the address"):
        ask(ChatServer(served.root, "judge"), "a")
    with pytest.raises(UserError, match=r"'127.0.0.1:80' is no server's address"):
        ChatServer("127.0.0.1:80")


def test_a_server_that_is_not_there_is_told_and_not_ten_thousand_times() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        for model in ("judge", None):
            with pytest.raises(UserError, match=rf"{url} .*the connection to {url} failed"):
                ask(ChatServer(url, model, retries=1), *many(100))


def test_a_key_is_read_from_the_environment_and_never_shown(
    served: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    server = ChatServer(served.url.replace("//", f"//me:{KEY}@"), key_env="JUDGE_KEY")
    with pytest.raises(UserError, match="environment variable 'JUDGE_KEY', which is not set"):
        ask(server, "a")
    server = ChatServer(served.url, key_env="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    served.behave(key=KEY)
    with caplog.at_level(logging.DEBUG):
        (reply,) = ask(server, "a")
        assert reply.status == "ok"
        assert served.seen().last["authorization"] == f"Bearer {KEY}"
        monkeypatch.setenv("JUDGE_KEY", "wrong-key")
        with pytest.raises(UserError, match="'JUDGE_KEY' is not one that it takes") as raised:
            ask(server, "a")
    assert "Incorrect API key provided: ***" in str(raised.value)
    shown = f"{server!r} {server.identity} {vars(server)} {caplog.text} {raised.value}"
    assert KEY not in shown
    assert "wrong-key" not in shown


def test_a_server_without_a_key_is_not_sent_somebody_elses(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    ask(ChatServer(served.url), "a")
    assert KEY not in str(served.seen().last)


def test_without_the_official_client_a_sentence_says_what_to_install(served: Running) -> None:
    code = f"""
import sys
sys.modules["openai"] = None  # as if it were not installed
from roles.policy.server import ChatServer
ChatServer({served.url!r}).identity
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UserError: " in done.stderr
    assert "pip install 'ratchet-loop[server]'" in done.stderr.splitlines()[-1]


def test_the_client_is_not_loaded_before_a_server_is_asked() -> None:
    code = "import sys, roles.policy.server; print('openai' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("method", ["sample", "logprobs", "write", "prompt_ids", "decode"])
def test_what_only_a_local_model_can_do_is_told_in_a_sentence(method: str) -> None:
    server = ChatServer("http://127.0.0.1:1/v1")
    with pytest.raises(UserError, match=r"^a judge that .* asks a local model, and http://127"):
        getattr(server, method)([])
    assert server.room(prompt("a")) > 10**6
    server.close()


# Structure.


@pytest.mark.parametrize(
    ("offers", "option", "structured", "calls"),
    [
        (True, "auto", True, 2),
        (True, True, True, 2),
        (True, False, False, 2),
        (False, "auto", False, 3),
        (None, "auto", False, 2),
        (None, True, False, 2),
    ],
)
def test_a_reply_says_whether_it_was_held_to_the_schema(
    served: Running, offers: bool | None, option: Any, structured: bool, calls: int
) -> None:
    served.behave(offers_structure=offers)
    server = ChatServer(served.url, structured=option)
    for _ in range(2):
        (reply,) = ask(server, "a", schema=SCHEMA)
        assert (reply.status, reply.structured) == ("ok", structured)
        assert reply.text.startswith("{") == structured
    assert served.seen().calls == calls, "what a server does not know is tried once"


def test_a_server_that_calls_the_limit_by_its_new_name_is_understood(served: Running) -> None:
    served.behave(completion_limit=True)
    server = ChatServer(served.url)
    assert {reply.status for reply in ask(server, *many(5)) + ask(server, *many(5))} == {"ok"}
    assert served.seen().last["max_completion_tokens"] == 256
    assert served.seen().calls <= 15


def groups(count: int, first_id: int = 1) -> list[Group]:
    return [
        Group(
            asked_id=n,
            prompt=prompt(f"What is {n} + 1?"),
            candidates=tuple(
                Candidate(
                    id=first_id + 2 * n + m, asked_id=n, index=m, text=f"{n + m}", token_ids=(m,)
                )
                for m in range(2)
            ),
        )
        for n in range(count)
    ]


def concluded(judgements: Sequence[Judgement]) -> list[tuple[int, float | None, str]]:
    return [(each.candidate_id, each.score, each.status) for each in judgements]


def test_a_rubric_gives_the_same_scores_with_structured_replies_and_without(
    served: Running,
) -> None:
    found = []
    for structured in (True, False):
        server: Any = ChatServer(served.url, structured=structured)
        found.append(Rubric(votes=2).judge(groups(10), server, CALL))
        assert ("response_format" in served.seen().last) == structured
    assert concluded(found[0]) == concluded(found[1])
    assert {each.status for each in found[0]} == {"ok"}
    assert len({each.score for each in found[0]}) > 3
    raw = [[each.verdicts[0].raw[0] for each in judgements] for judgements in found]
    assert set(raw[0]) == {"{"}
    assert "{" not in raw[1]


# Stopping, and where it is called from.


def test_a_run_that_is_to_stop_keeps_what_was_said_by_then(served: Running) -> None:
    served.behave(latency_s=0.02)
    kept: dict[tuple[int, int], Reply] = {}
    done: list[tuple[int, int]] = []

    def keep(question: int, seed: int, reply: Reply) -> None:
        kept[question, seed] = reply

    call = replace(CALL, stopping=lambda: len(kept) >= 10, progress=lambda *two: done.append(two))
    server = ChatServer(served.url, concurrency=4)
    with pytest.raises(KeyboardInterrupt):
        ask(server, *many(200), call=call, keep=keep)
    assert 10 <= len(kept) <= 14
    assert done == [(n + 1, 200) for n in range(len(kept))]
    assert served.seen().calls <= 20
    replies = ask(server, *many(140))
    assert content([replies[n] for n, _ in kept]) == content(list(kept.values()))


@pytest.mark.parametrize(
    "habits",
    [{"hang": 1, "hang_s": 30}, {"first": [[429, {"Retry-After": "30"}]]}],
    ids=["hang", "wait"],
)
def test_a_run_that_is_to_stop_does_not_wait_for_calls_under_way(
    served: Running, habits: dict[str, Any]
) -> None:
    served.behave(**habits)
    began = time.monotonic()
    call = replace(CALL, stopping=lambda: time.monotonic() - began > 0.5)
    with pytest.raises(KeyboardInterrupt):
        ask(ChatServer(served.url, "judge"), *many(3), call=call)
    assert time.monotonic() - began < 10


def test_a_notebook_which_has_an_event_loop_can_ask_too(served: Running) -> None:
    async def cell() -> list[Reply]:
        return ask(ChatServer(served.url), "a")

    assert asyncio.run(cell())[0].status == "ok"


# Pace.


def simulated(
    cap: Callable[[float], float],
    *,
    calls: int,
    limit: float | None = None,
    window_s: float = 1.0,
    wait: Callable[[float], float | None] = lambda exact: float(int(exact) + 1),
) -> tuple[float, int]:
    """Seconds until so many calls got through a server with a cap, and how many it refused.

    64 at once, an answer takes 50 ms and a refusal 5; time is counted and not waited for.
    """
    pace, now, through, refused, number, free = Pace(limit), 0.0, 0, 0, 0, 64
    taken: deque[float] = deque()
    ends: list[tuple[float, int, float, bool, float | None]] = []
    while through < calls:
        while ends and ends[0][0] <= now:
            _, _, left, good, wait_s = heapq.heappop(ends)
            free += 1
            if good:
                through += 1
                pace.answered()
            else:
                pace.refused(left, now, wait_s)
        after_s = pace.wait(now) if free else 1e9
        if after_s > 0:
            now = min(now + after_s, ends[0][0] if ends else 1e9)
            continue
        free, number = free - 1, number + 1
        while taken and taken[0] <= now - window_s:
            taken.popleft()
        good = len(taken) < round(cap(now) * window_s)
        refused += not good
        wait_s = None if good else wait(taken[0] + window_s - now)
        heapq.heappush(ends, (now + (0.05 if good else 0.005), number, now, good, wait_s))
        if good:
            taken.append(now)
        now += 0.001
    return now, refused


def test_a_known_rate_is_used_to_95_percent_and_never_passed() -> None:
    seconds, refused = simulated(lambda _: 200, calls=12_500, limit=200)
    assert refused == 0
    assert 12_500 / seconds > 0.95 * 200


@pytest.mark.parametrize("wait", [lambda exact: int(exact) + 1.0, lambda exact: exact, None])
@pytest.mark.parametrize("cap", [20, 200])
def test_an_unknown_cap_is_found_and_used_to_90_percent(cap: int, wait: Any) -> None:
    seconds, refused = simulated(lambda _: cap, calls=60 * cap, wait=wait or (lambda _: None))
    assert 60 * cap / seconds > 0.9 * cap
    assert refused < 0.01 * 60 * cap + 64


def test_a_cap_by_the_minute_is_found_too() -> None:
    seconds, refused = simulated(lambda _: 10, calls=3000, window_s=60)
    assert 3000 / seconds > 0.9 * 10
    assert refused < 150


def test_a_cap_that_changes_is_followed_down_and_up() -> None:
    # So many calls that it would be 80 s at the lower cap and 60 s at the higher one.
    down, _ = simulated(lambda now: 200 if now < 20 else 20, calls=4000 + 20 * 80)
    assert down < 20 + 80 * 1.4
    up, _ = simulated(lambda now: 20 if now < 20 else 200, calls=400 + 200 * 60)
    assert up < 20 + 40 + 15 + 60 * 1.1, "it holds for 40 s, and grows tenfold in 15"


def test_refusals_of_calls_that_left_together_are_one_and_slow_it_down_once() -> None:
    pace = Pace(100)
    left = []
    for now in (0.0, 0.1, 0.2, 0.3):
        assert pace.wait(now) == 0
        left.append(now)
    for each in left[2:]:
        pace.refused(each, 0.35, 1.0)
    assert pace.wait(0.5) == pytest.approx(0.85)
    assert pace.wait(1.35) == 0
    assert pace.rate == pytest.approx(97 / 2), (
        "halved at most: two calls in a second may have been a lull"
    )


def test_a_pause_without_a_word_on_its_length_doubles_until_a_call_gets_through() -> None:
    pace, now, pauses = Pace(), 0.0, []
    for n in range(5):
        assert pace.wait(now) == 0
        if n == 3:
            pace.answered()
        pace.refused(now, now, None)
        pauses.append(pace.wait(now))
        now += pauses[-1]
    assert pauses == [2, 4, 8, 2, 4]


def test_a_pace_that_was_slow_is_quick_again_after_a_night_without_calls() -> None:
    pace = Pace()
    pace.wait(0.0)
    assert pace.wait(0.1) == 0
    pace.refused(0.1, 0.2, 1.0)
    assert pace.wait(1.2) == 0
    assert pace.rate < 1
    assert pace.wait(30_000.0) == 0
    assert pace.rate > 1000


# All of it together; tests/benchmarks/judge_server.py does ten times as much.


def test_a_thousand_judgements_through_a_capped_and_failing_server_are_all_accounted_for(
    served: Running,
) -> None:
    rubric, judged = Rubric(votes=1), groups(500)
    server: Any = ChatServer(served.url)
    calm = rubric.judge(judged, server, CALL)
    served.behave(cap=200, fail=0.17, cut=0.02, hang=0.01, hang_s=2, latency_s=0.02)
    server = ChatServer(served.url, requests_per_second=200, timeout_s=1, retries=10)
    began = time.monotonic()
    found = rubric.judge(judged, server, CALL)
    seconds = time.monotonic() - began
    assert concluded(found) == concluded(calm)
    assert {each.status for each in found} == {"ok"}
    seen = served.seen()
    assert seen.statuses["200"] >= 1000
    assert seen.statuses["500"] > 100
    assert {"cut", "hung"} <= seen.statuses.keys()
    assert sum(seen.statuses.values()) + seen.at_once == seen.calls
    assert len(seen.starts) <= 200 * (seconds + 1)

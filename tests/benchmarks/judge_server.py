"""Ten thousand judgements through a server that is capped and fails: `judge_server.py [COUNT]`.

The server is a process of its own (tests/model_server.py). It takes 200 calls in any second and
answers the others with 429; of those it takes, 17 % get a 500, 2 % half an answer and 1 % nothing
for three seconds. One call in five that fails leaves 160 good answers a second at best. Prints a
Markdown table: once with the cap known to the client, once with nothing known. The same judgements
through the same server without cap and failures are what ids and scores are held against.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from judges.rubric import Rubric
from model_server import Running, running
from roles.policy.server import ChatServer
from store.records import Call, Candidate, Group, Judgement, Message, Prompt

CAP, FAILS, BEST = 200, 0.20, 160
TROUBLE: dict[str, Any] = {"fail": 0.17, "cut": 0.02, "hang": 0.01, "hang_s": 3, "cap": CAP}
LATENCY_S = 0.05
OPTIONS: dict[str, Any] = {"timeout_s": 1.5, "retries": 8, "concurrency": 64}
ROWS: dict[str, dict[str, Any]] = {
    "requests_per_second = 200": {"requests_per_second": CAP},
    "no rate given": {},
}


@dataclass
class Outcome:
    judgements: list[Judgement]
    seconds: float
    cpu_s: float
    """Of this process."""

    @property
    def concluded(self) -> list[tuple[int, float | None]]:
        return [(each.candidate_id, each.score) for each in self.judgements]


def groups(count: int) -> list[Group]:
    """As many candidates, four to a group."""
    return [
        Group(
            asked_id=n,
            prompt=Prompt(messages=(Message(role="user", content=f"What is {n} times 7?"),)),
            candidates=tuple(
                Candidate(id=4 * n + m, asked_id=n, index=m, text=f"{7 * n + m}", token_ids=(m,))
                for m in range(4)
            ),
        )
        for n in range(count // 4)
    ]


def judged(process: Running, asked: Sequence[Group], **options: Any) -> Outcome:
    server: Any = ChatServer(process.url, **OPTIONS, **options)
    began, before = time.perf_counter(), _cpu_s()
    judgements = Rubric(votes=1).judge(asked, server, Call(seed=0, stage="judge"))
    return Outcome(judgements, time.perf_counter() - began, _cpu_s() - before)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def row(name: str, process: Running, found: Outcome, calm: Outcome) -> str:
    seen = process.seen()
    statuses = Counter(each.status for each in found.judgements)
    said = ", ".join(f"{status} {n:,}" for status, n in statuses.most_common())
    assert statuses.total() == len(calm.judgements)
    rate = statuses["ok"] / found.seconds
    failed = sum(n for what, n in seen.statuses.items() if what not in ("200", "429"))
    same = sum(a == b for a, b in zip(found.concluded, calm.concluded, strict=True))
    cells = [name, f"{seen.calls:,}", f"{failed:,}", f"{len(seen.refused):,}", said]
    cells += [f"{found.seconds:.1f}", f"{rate:.1f}", f"{rate / BEST:.1%}"]
    cells += [f"{same:,} of {len(calm.judgements):,}", f"{1000 * found.cpu_s / seen.calls:.2f}"]
    cells.append(f"{os.getloadavg()[0]:.1f}")
    return f"| {' | '.join(cells)} |"


def main(count: int) -> None:
    print(f"{count:,} judgements, {os.cpu_count()} cores, a server capped at {CAP} calls/s")
    print()
    heads = ["client", "calls made", "failed", "429s", "judgements", "seconds", "good answers/s"]
    heads += [f"of {BEST}/s", "ids and scores as without failures", "client CPU ms a call"]
    heads.append("load of the machine")
    print(f"| {' | '.join(heads)} |")
    print(f"|{'---|' * len(heads)}", flush=True)
    with running() as process:
        process.behave(latency_s=LATENCY_S)
        calm = judged(process, groups(count))
        print(row("no cap, no failures", process, calm, calm), flush=True)
        for name, options in ROWS.items():
            process.behave(latency_s=LATENCY_S, **TROUBLE)
            found = judged(process, groups(count), **options)
            print(row(name, process, found, calm), flush=True)


if __name__ == "__main__":
    main(int((sys.argv[1:] or ["10000"])[0]))

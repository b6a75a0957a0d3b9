"""What the store costs as it grows, in SQLite and in PostgreSQL.

    python tests/benchmarks/store_growth.py [CANDIDATES ...] [--url postgresql://...]

For each number, 20,000 if none is given: a run of three rounds with so many candidates is written
by the store's own methods, 16 answers to a prompt, batches of 128 prompts, each with a judgement
and a verdict. An answer is 32 token ids and 71 to 73 bytes of text. Told are the minutes of it all,
the rows a second of candidates, judgements and verdicts, the size with indexes, and the shortest of
five calls of what `loop rounds` and `loop why` ask. Without --url a server is started for it, with
fsync off; a client on another machine pays its network besides. SQLite's file is on the disk of the
temporary folder.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import postgres_server
import test_scale
from loop import lineage, report
from store.database import Store
from store.postgres import Place, new_place


@contextmanager
def database(url: str | None) -> Iterator[str]:
    """The URL of a server: the one that is given, or of one of its own."""
    if url is not None:
        yield url
        return
    with postgres_server.running() as server:
        yield server.url()


def size(store: Store) -> int:
    """Bytes, indexes included."""
    if store.place is None:
        return sum(each.stat().st_size for each in store.root.glob("loop.db*"))
    found = store.query(
        "SELECT sum(pg_total_relation_size(oid)) AS bytes FROM pg_class "
        "WHERE relnamespace = current_schema()::regnamespace AND relkind = 'r'"
    )
    return int(found[0]["bytes"])


def measured(candidates: int, place: Place | None) -> str:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "loop.db", create=True, place=place)
        with closing(store):
            timed = test_scale.fill(store, round(candidates / test_scale.ROUNDS / test_scale.N))
            (found,) = store.query(
                "SELECT max(id) AS example, (SELECT count(*) FROM candidate) AS made FROM example"
            )
            rounds = test_scale.best_of(5, lambda: report.rounds(store))
            why = test_scale.best_of(5, lambda: lineage.why(store, found["example"]))
            row = (
                f"{'SQLite' if place is None else 'PostgreSQL':10}  {found['made']:>11,}  "
                f"{(time.monotonic() - began) / 60:>7.1f}  "
                f"{timed.rows / timed.seconds:>10,.0f}  {size(store) / 1e6:>8,.1f}  "
                f"{1000 * rounds:>8.1f}  {1000 * why:>8.1f}"
            )
            store.discard()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("candidates", nargs="*", type=int)
    parser.add_argument("--url", help="a database; left out, a server is started")
    given = parser.parse_args()
    print("store        candidates  minutes  rows a s    size, MB  rounds, ms  why, ms", flush=True)
    with database(given.url) as url:
        for candidates in given.candidates or [20_000]:
            for place in (None, new_place(url, None, "growth")):
                print(measured(candidates, place), flush=True)


if __name__ == "__main__":
    main()

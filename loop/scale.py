"""What a great many prompts would take on several GPUs, by the rates that a run was measured at."""

from __future__ import annotations

from rich.console import Console

from loop import space
from loop.report import Table
from loop.screen import line
from loop.settings import Config
from store.database import Store
from store.errors import UserError

PROMPTS, ANSWERS = 1_000_000, 8
MADE = """
SELECT count(*) AS answers, sum(candidate.tokens) AS tokens
FROM candidate
JOIN asked ON asked.id = candidate.asked_id
JOIN round ON round.id = asked.round_id
WHERE round.number > 0 AND asked.purpose = 'train' AND candidate.seed IS NOT NULL
"""
JUDGED = """
SELECT count(*) AS answers
FROM judgement
JOIN candidate ON candidate.id = judgement.candidate_id
JOIN asked ON asked.id = candidate.asked_id
JOIN round ON round.id = asked.round_id
WHERE round.number > 0 AND asked.purpose = 'train' AND judgement.round_id = round.id
"""
ALL = "SELECT count(*) AS answers FROM candidate"


def scale(store: Store, config: Config, gpus: int) -> Table:
    """{run, gpus, prompts, answers, processes (of the run), tokens_an_answer, generate and judge
    {rate (tokens or answers a second, of a process), hours}, answers_a_second, bytes (None where
    the store is no file)}. config: of the run whose store it is.

    Raises UserError where the run sampled and judged nothing in a round, or by how many processes
    is not known.
    """
    run = store.run()
    if run is not None and any(each["key"] == "cluster.workers" for each in run.changes):
        raise UserError(
            f"cluster.workers was changed while {store.root} ran, so how much each process did is "
            "not known; name another run with --rates"
        )
    processes = max(1, config.cluster.workers)
    seconds = {
        stage: sum(each.seconds.get(stage, 0.0) for each in store.rounds() if each.number > 0)
        for stage in ("generate", "judge")
    }
    made, judged = store.query(MADE)[0], store.query(JUDGED)[0]
    if not made["answers"] or not judged["answers"] or not all(seconds.values()):
        raise UserError(
            f"{store.root} has no round in which a model answered and a judge judged, so it has no "
            "rates to plan with; name another run with --rates"
        )
    total = PROMPTS * ANSWERS
    each = made["tokens"] / made["answers"]
    written = made["tokens"] / seconds["generate"] / processes
    read = judged["answers"] / seconds["judge"] / processes
    hours = {"generate": total * each / written, "judge": total / read}
    hours = {stage: took / gpus / 3600 for stage, took in hours.items()}
    stored = sum(file.stat().st_size for file in store.root.glob("loop.db*"))
    return {
        "run": str(store.root),
        "gpus": gpus,
        "prompts": PROMPTS,
        "answers": ANSWERS,
        "processes": processes,
        "tokens_an_answer": each,
        "generate": {"rate": written, "hours": hours["generate"]},
        "judge": {"rate": read, "hours": hours["judge"]},
        "answers_a_second": total / max(hours.values()) / 3600,
        "bytes": stored * total // store.query(ALL)[0]["answers"] if stored else None,
    }


def view(console: Console, found: Table) -> None:
    generate, judge = found["generate"], found["judge"]
    line(
        console,
        f"{found['prompts']:,} prompts x {found['answers']} answers on {found['gpus']} GPUs, "
        f"by the rates of {found['run']}:",
    )
    line(
        console,
        f"  generate  {generate['hours']:.1f} h  ({generate['rate']:,.0f} tokens/s a process, "
        f"{found['tokens_an_answer']:.0f} tokens an answer)",
    )
    line(console, f"  judge     {judge['hours']:.1f} h  ({judge['rate']:,.0f} answers/s a process)")
    size = "" if found["bytes"] is None else f", {space.shown(found['bytes'])} of them"
    line(console, f"  store     {found['answers_a_second']:,.0f} answers/s at most{size}")
    line(
        console,
        f"  assumed: {found['gpus']} processes as fast as each of the {found['processes']} that "
        "were measured, waits for models to load and for the store within the rates",
    )

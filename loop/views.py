"""What the reports look like on a screen: narrow tables, and long words as lines below them.

Nothing here asks the store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from loop.report import Table
from loop.screen import NOTHING, block, columns, conversation, figure, legible, line, put

STAGES = ("propose", "generate", "judge", "filter", "train", "evaluate", "gate")
MICROS = "judge_micros"
METRICS = ("rewards/margins", "rewards/accuracies", "logps/chosen", "grad_norm", "learning_rate")

ABOUT = {"judge": "the round's judge on anchors, compared with the judge of [evaluate]"}


def status(console: Console, found: Table) -> None:
    alive = "driven" if found["alive"] else "nobody drives it"
    of = found["rounds"] or "as many as asked for"
    _pairs(
        console,
        {
            "run": found["path"],
            "status": f"{found['status']}, {alive}",
            "rounds done": f"{found['rounds_done']} of {of}",
            "round": NOTHING if found["round"] is None else found["round"],
            "stage": _stage(found),
            "tokens": f"{found['generated_tokens']:,} generated",
            "decision": NOTHING if found["decision"] is None else decision(found["decision"]),
            "next": found["next"],
        },
    )


def _stage(found: Table) -> str:
    if found["stage"] is None:
        return NOTHING
    if found["total"] is None:
        return str(found["stage"])
    return f"{found['stage']}, {found['done']:,} of {found['total']:,} {found['unit']}"


def decision(found: Table) -> str:
    about = f" {found['model']}" if found["model"] else ""
    return f"round {found['round']}{about}: {found['decision']}, {found['reason']}"


def rounds(console: Console, found: Table) -> None:
    """Four narrow tables: what was made, how good it is, what was decided, where time went."""
    each = found["rounds"]
    if not each:
        line(console, f"{found['path']} has no rounds yet")
        return
    line(console, f"{found['path']}  {found['status']}")
    _work(console, each)
    measured = [(row["number"], model) for row in each for model in row["models"]]
    accuracy(console, measured)
    _suites(console, measured)
    for number, model in measured:
        said = model | {"round": number, "reason": model["reason"] or "nothing yet"}
        said["decision"] = model["decision"] or model["status"]
        line(console, f"{decision(said)}  ({model['path']})")
    line(console)
    _seconds(console, each)


def _work(console: Console, each: Sequence[Table]) -> None:
    names = ("prompts", "candidates", "judged", "unscored", "examples", "dropped")
    grid = columns("round", "status", *names, right=(0, *range(2, 8)))
    for row in each:
        state = row["status"] if row["status"] != "running" else row["stage"]
        grid.add_row(str(row["number"]), state, *(f"{row[name]:,}" for name in names))
    put(console, grid)
    for row in each:
        if row["reasons"]:
            line(console, f"round {row['number']} dropped: {_counted(row['reasons'])}")
    line(console)


def accuracy(console: Console, measured: Sequence[tuple[int, Table]]) -> None:
    """A row a checkpoint and split, with 95 % intervals; a table a model."""
    models = dict.fromkeys(model["model"] for _, model in measured)
    for name in models:
        grid = columns("round", "split", "greedy", "sampled", "length", "distinct", "gap")
        for number, model in measured:
            for split in ("gate", "test"):
                if model["model"] == name and model[split]:
                    grid.add_row(str(number), split, *_accuracies(model[split]))
        if grid.row_count:
            if len(models) > 1:
                line(console, f"model {name}")
            put(console, grid)
    line(console, "accuracy with 95 % intervals, by bootstrap over prompts")
    line(console)


def _suites(console: Console, measured: Sequence[tuple[int, Table]]) -> None:
    """What else was measured: the judge on anchors, old skills, commands. A table each."""
    found = [(number, model, model["suites"]) for number, model in measured]
    for name in dict.fromkeys(name for *_, suites in found for name in suites):
        own = [(number, model, suites[name]) for number, model, suites in found if name in suites]
        metrics = list(dict.fromkeys(metric for *_, of in own for metric in of))
        grid = columns("round", "model", *metrics)
        for number, model, of in own:
            cells = (_interval(of.get(each)) for each in metrics)
            grid.add_row(str(number), model["model"], *cells)
        line(console, ABOUT.get(name, name))
        put(console, grid)
        line(console)


def _accuracies(of: Table) -> list[str]:
    intervals = [_interval(of.get(f"accuracy_{how}")) for how in ("greedy", "sampled")]
    return intervals + [_value(of.get(name)) for name in ("length", "distinct", "gap")]


def _seconds(console: Console, each: Sequence[Table]) -> None:
    """`outside`: the share of the time outside policy, judge and trainer."""
    grid = columns("round", *STAGES, "outside", right=range(9))
    for row in each:
        spent = [row["seconds"].get(stage) for stage in STAGES]
        share = NOTHING if row["outside"] is None else f"{row['outside']:.1%}"
        shown = (NOTHING if value is None else f"{value:,.1f}" for value in spent)
        grid.add_row(str(row["number"]), *shown, share)
    put(console, grid)
    line(console, "seconds a stage; outside: share of them outside policy, judge and trainer")


def show(console: Console, found: Table) -> None:
    tokens = f"{found['generated_tokens']:,} tokens generated"
    line(console, f"{found['run']}, round {found['number']}  {found['status']}, {tokens}")
    line(console)
    for name, counts in (found["tracks"] | found["evaluating"]).items():
        kept = {key: n for key, n in counts.items() if not key.startswith(("dropped ", MICROS))}
        line(console, f"{name}: {_counted(kept)}")
    if found["reasons"]:
        line(console, f"dropped: {_counted(found['reasons'])}")
    for each in found["decisions"]:
        line(console)
        line(console, decision(each))
        numbers = each["numbers"] or {}
        if numbers:
            line(console, "  " + ", ".join(f"{key} {figure(n)}" for key, n in numbers.items()))
    for each in found["training"]:
        _training(console, each)
    _judges(console, found["judges"])
    _evaluations(console, found["evaluations"])
    for each in found["samples"]:
        _sample(console, each)
    if found["samples"]:
        line(console, f"why: loop why {found['samples'][0]['example']}")


def _training(console: Console, found: Table) -> None:
    line(console)
    loss = f"loss {figure(found['first_loss'])} to {figure(found['last_loss'])}"
    line(
        console,
        f"training {found['model']} (checkpoint {found['checkpoint']}, {found['status']}): "
        f"{found['examples']:,} examples, {found['steps']:,} steps, {loss}",
    )
    logged = {name for step in found["curve"] for name in step["metrics"]}
    shown = [name for name in METRICS if name in logged]
    grid = columns("step", "loss", *(name.removeprefix("rewards/") for name in shown))
    for step in found["curve"]:
        values = (figure(step["metrics"].get(name)) for name in shown)
        grid.add_row(f"{step['step']:,}", figure(step["loss"]), *values)
    put(console, grid)


JUDGED = ("unscored", "score", "modal", "entropy", "length", "votes", "flips")
COST = ("tokens", "seconds", "cost", "cached")


def _judges(console: Console, found: Sequence[Table]) -> None:
    """How the round's judges did and what they took: a row a judge, track and purpose."""
    if not found:
        return
    line(console)
    line(console, "how judges did")
    names = [name for name in (*JUDGED, *COST) if any(name in row for row in found)]
    grid = columns("judge", "track", "of", "n", *names, right=range(3, 4 + len(names)))
    for row in found:
        cells = (figure(row.get(name)) for name in names)
        grid.add_row(row["judge"], row["track"], row["purpose"], f"{row['n']:,}", *cells)
    put(console, grid)


def _evaluations(console: Console, found: Sequence[Table]) -> None:
    if not found:
        return
    line(console)
    names = ("model", "suite", "split", "metric", "value", "95 % interval", "n")
    grid = columns(*names, right=(4, 5, 6))
    for row in found:
        interval = NOTHING if row["low"] is None else f"[{row['low']:.3f}, {row['high']:.3f}]"
        place = (row["model"], row["suite"], row["split"], row["metric"])
        cells = (*place, figure(row["value"]), interval)
        grid.add_row(*cells, f"{row['n']:,}")
    put(console, grid)


def _sample(console: Console, found: Table) -> None:
    margin = "" if found["margin"] is None else f", margin {figure(found['margin'])}"
    line(console)
    line(console, f"example {found['example']}  {found['kind']} by {found['rule']}{margin}")
    conversation(console, found["messages"], found["reference"])
    for side in ("chosen", "rejected"):
        if found[side] is not None:
            block(console, f"{side}, score {figure(found[f'{side}_score'])}", found[side])


def verify(console: Console, found: Table) -> None:
    """A line a check, with what was wrong below it."""
    for check in found["checks"]:
        wrong = len(check["problems"]) + check["more"]
        mark = "ok" if not wrong else f"{wrong} wrong"
        line(console, f"{mark:>9}  {check['rows']:>11,}  {check['check']}")
        for problem in check["problems"]:
            line(console, f"{'':>24}{legible(problem)}")
        if check["more"]:
            line(console, f"{'':>24}and {check['more']:,} more")
    total = sum(len(check["problems"]) + check["more"] for check in found["checks"])
    line(console, f"{found['path']}: " + ("sound" if found["ok"] else f"{total:,} problems"))


def ending(console: Console, found: Table) -> None:
    """What a run achieved: its best checkpoint and the gain on the test split."""
    line(console, f"best checkpoint: {found['path']}")
    if found["gain"] is None:
        line(console, found["why_no_gain"])
        return
    line(
        console,
        f"gain on the test split: {found['gain']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}] "
        f"({found['baseline_score']:.3f} to {found['score']:.3f}, {found['prompts']:,} prompts, "
        f"over {found['baseline']})",
    )


def recipes(console: Console, found: Sequence[Table]) -> None:
    width = max(len(each["name"]) for each in found)
    for each in found:
        line(console, f"{each['name']:<{width}}  {each['about']}")


def judges(console: Console, found: Sequence[Table]) -> None:
    for each in found:
        if each["error"] is not None:
            line(console, f"{each['name']}  cannot be used: {each['error']}")
            continue
        line(console, f"{each['name']} {each['version']}  {each['about']}")
        for option in each["options"]:
            default = "required" if option["required"] else f"= {option['default']!r}"
            kind = "" if option["type"] is None else f": {option['type']}"
            line(console, f"    {option['option']}{kind} {default}")


def _pairs(console: Console, pairs: Mapping[str, Any]) -> None:
    width = max(map(len, pairs))
    for key, value in pairs.items():
        line(console, f"{key:<{width}}  {value}")


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {what.replace('_', ' ')}" for what, n in counts.items())


def _interval(found: Table | None) -> str:
    if found is None:
        return NOTHING
    if found["low"] is None:
        return f"{found['value']:.2f}"
    return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def _value(found: Table | None) -> str:
    return NOTHING if found is None else f"{found['value']:.2f}"

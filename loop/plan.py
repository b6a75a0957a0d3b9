"""What a run would do and cost, from its configuration alone.

Token counts are upper bounds: every answer is taken to use all the tokens it may.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from loop import peaks, space
from loop.report import Table
from loop.screen import columns, line, put
from loop.settings import Config, Evaluate, Track
from store import checkpoints

NORMAL_TWO_SIDED_95 = 1.959964
NORMAL_POWER_80 = 0.841621
RIGHT = 0.5
"""Share of right answers, where their variance is largest."""
ALIKE = 0.32
"""Correlation of two answers to one prompt. With it 267 prompts x 4 answers a side tell 0.05 and
1,668 x 4 tell 0.02."""
ASSUMED = (
    f"two-sided 95 %, power 80 %, paired by prompt; scores 0 or 1, {RIGHT:.0%} right, correlation "
    f"{ALIKE} between answers to one prompt, prompts equally hard for both checkpoints"
)
COUNTS = ("prompts", "candidates", "generated_tokens")


def plan(
    config: Config,
    roles: Mapping[int, Any],
    gpu_gib: float | None = None,
    prompt: int | None = None,
) -> Table:
    """{rounds (0: until stopped), warmup [track], tracks [track], evaluation, generated_tokens,
    budget, gate, disk, models, memory (as peaks.peaks gives it)}. A track has name, model, prompts,
    candidates and generated_tokens, None where the generator does not say. `roles` are what
    load_roles made. gpu_gib: of a GPU to plan for in place of this machine; prompt: tokens of the
    longest one, None is assumed.
    """
    tracks = [_track(name, each, roles) for name, each in config.track.items()]
    warmup = [_track(name, each, roles) for name, each in config.tracks(0).items()]
    trainers = (roles[id(each.trainer)] for each in config.models.values())
    writing = sum(getattr(each, "makes", "policy") == "policy" for each in trainers)
    evaluation = _evaluation(config.evaluate, writing)
    a_round = _sum([each["generated_tokens"] for each in [*tracks, evaluation]])
    first = _sum([each["generated_tokens"] for each in [*warmup, evaluation]])
    return {
        "rounds": config.rounds,
        "warmup": warmup,
        "tracks": tracks,
        "evaluation": evaluation,
        "generated_tokens": {
            "warmup": first,
            "round": a_round,
            "run": _sum([first, *[a_round] * config.rounds]) if config.rounds else None,
        },
        "budget": config.budget.generated_tokens,
        "gate": {
            "prompts": config.evaluate.gate_prompts,
            "samples": config.evaluate.samples,
            "detectable": detectable(config.evaluate.gate_prompts, config.evaluate.samples),
            "assumed": ASSUMED,
            "min_gain": config.gate.min_gain,
        },
        "models": [
            {"model": name, "path": each.path, "bytes": _bytes(each.path)}
            for name, each in config.models.items()
        ],
        "disk": space.needed(config, roles).total,
        "memory": peaks.peaks(config, roles, peaks.here(gpu_gib), prompt),
    }


def detectable(prompts: int, samples: int) -> float:
    """The true difference of two checkpoints' mean scores that the gate finds four times in five.

    A prompt's difference of means over `samples` answers a side has the variance
    2 p (1 - p) (1 - rho) / samples, because what a prompt's answers have in common cancels in
    the pair; a mean over prompts is told from 0 when it is z(0.975) + z(0.8) of its standard
    errors away. Source: Miller (2024), "Adding Error Bars to Evals", arXiv 2411.00640, the
    sample-size formula of section 5 with no difference between prompts (omega = 0).
    """
    variance = 2 * RIGHT * (1 - RIGHT) * (1 - ALIKE) / samples
    return (NORMAL_TWO_SIDED_95 + NORMAL_POWER_80) * math.sqrt(variance / prompts)


def _track(name: str, track: Track, roles: Mapping[int, Any]) -> Table:
    generator = roles[id(track.generator)]
    count, most = (getattr(generator, name, None) for name in ("n", "most_tokens"))
    return {
        "name": name,
        "model": track.model,
        "prompts": track.prompts,
        "generator": track.generator.use,
        "judge": track.judge.use,
        "filter": track.filter.use,
        "candidates": track.prompts * count if isinstance(count, int) else None,
        "generated_tokens": track.prompts * most if isinstance(most, int) else None,
    }


def _evaluation(evaluate: Evaluate, models: int) -> Table:
    prompts = evaluate.gate_prompts + evaluate.test_prompts
    candidates = models * prompts * (evaluate.samples + 1)
    suites = evaluate.suite.values()
    return {
        "judge": evaluate.judge.use,
        "prompts": prompts + sum(each.prompts for each in suites),
        "candidates": candidates + models * sum(each.prompts for each in suites),
        "generated_tokens": candidates * evaluate.max_tokens
        + models * sum(each.prompts * each.max_tokens for each in suites),
    }


def _sum(parts: list[int | None]) -> int | None:
    """None when a part is not known."""
    return None if None in parts else sum(part or 0 for part in parts)


def _bytes(path: str) -> int | None:
    """Of a model's folder; None for one that is made or fetched when the run begins."""
    if path == "embedded" or not Path(path).is_dir():
        return None
    return sum(file.stat().st_size for file in checkpoints.locate(path).rglob("*.safetensors"))


def view(console: Console, found: Table) -> None:
    tracks = found["warmup"] + found["tracks"]
    grid = columns("track", "model", "prompts", "candidates", "tokens at most", right=(2, 3, 4))
    for each in tracks:
        cells = (each["name"], each["model"], *(_count(each[key]) for key in COUNTS))
        grid.add_row(*cells)
    grid.add_row("evaluation", "every", *(_count(found["evaluation"][key]) for key in COUNTS))
    put(console, grid)
    line(console)
    tokens, gate = found["generated_tokens"], found["gate"]
    rounds = f"{found['rounds']} rounds" if found["rounds"] else "rounds until stopped"
    before = "a warm-up and " if found["warmup"] else "no warm-up (warmup.when), "
    limit = f"; the budget is {found['budget']:,}" if found["budget"] else ""
    spent = {"warm-up": tokens["warmup"], "round": tokens["round"], "run": tokens["run"]}
    line(console, f"{before}{rounds}")
    said = ", ".join(f"{key} {_count(value)}" for key, value in spent.items())
    line(console, f"generated tokens at most: {said}{limit}")
    line(
        console,
        f"the gate can tell a difference of {gate['detectable']:.3f}, with {gate['prompts']:,} "
        f"prompts x {gate['samples']} answers a side",
    )
    line(console, f"  assumed: {gate['assumed']}")
    line(console, f"disk: {space.shown(found['disk'])} at most, checkpoints and database")
    peaks.view(console, found["memory"])


def _count(value: int | None) -> str:
    return "not known" if value is None else f"{value:,}"

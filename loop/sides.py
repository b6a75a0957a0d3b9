"""The sides of a comparison: which runs a name stands for, what is read of them, who meets whom.

Runs of one seed meet each other. What has no counterpart is left out, with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from loop import config as configuration
from loop import retention
from loop.gain import by_prompt
from loop.meant import config_of, model, opened, rounds_of
from loop.report import Table, decisions, rounds, the_run
from loop.run import all_runs, is_run
from loop.settings import Config, of_place, operational
from store.database import Store
from store.errors import UserError, unknown
from store.records import RunStatus

FINISHED: tuple[RunStatus, ...] = ("done", "stopped")
SUMMED = ("rounds", "accepted", "prompts", "examples", "generated_tokens")
SECONDS = ("seconds", "in_policy", "in_judge", "in_trainer")


@dataclass(frozen=True)
class Side:
    """Runs that differ in their seed alone, one a seed."""

    name: str
    kind: Literal["run", "folder", "recipe"]
    runs: dict[int, Path]
    """Seed -> run."""
    left_out: tuple[Table, ...] = ()
    """[{path, why}]: what was found and does not stand on this side."""


def side(name: str, runs: Path) -> Side:
    """The runs that `name` stands for: itself, those of a recipe, or those below a folder.

    Raises UserError when it stands for none, or for runs that are not alike.
    """
    places = (Path(name), runs / name)
    for place in places:
        if is_run(place):
            with opened(place) as store:
                return Side(name, "run", {config_of(store).seed: place})
    if name in configuration.recipes():
        found, left_out = _finished(runs, recipe=name)
        if not found:
            raise UserError(
                f"no finished run of recipe {name!r} under {runs}/; "
                f"`loop start --recipe {name}` makes one"
            )
        return _alike(name, "recipe", found, left_out)
    for place in places:
        found, left_out = _finished(place)
        if found:
            return _alike(name, "folder", found, left_out)
        if left_out:
            raise UserError(f"no finished run under {place}/: {left_out[0]['why']}")
    known = [*configuration.recipes(), *(root.name for root in _roots(runs))]
    raise unknown("run, folder of runs or recipe", name, known)


def _roots(folder: Path) -> list[Path]:
    """Run directories below a folder, the newest last."""
    return sorted(all_runs(folder, "**"), key=lambda root: root.name)


def _finished(
    folder: Path, recipe: str | None = None
) -> tuple[list[tuple[Path, Config]], list[Table]]:
    """Finished runs with their settings, and those that are left out, with the reason."""
    found, left_out = [], list[Table]()
    for root in _roots(folder):
        try:
            with opened(root) as store:
                run, config = the_run(store), config_of(store)
        except UserError as error:
            left_out.append({"path": str(root), "why": str(error)})
            continue
        if recipe is not None and not _made_from(config, recipe):
            continue
        if run.status in FINISHED:
            found.append((root, config))
        else:
            left_out.append({"path": str(root), "why": f"it is {run.status}"})
    return found, left_out


def _made_from(config: Config, recipe: str) -> bool:
    """Whether a run has a recipe's settings, its seed and what may change in a run aside."""
    published = configuration.read(recipe=recipe, sets=[f"seed={config.seed}"])
    return published.identity == config.identity


def _alike(
    name: str,
    kind: Literal["folder", "recipe"],
    found: list[tuple[Path, Config]],
    left_out: list[Table],
) -> Side:
    """The newest run of each seed."""
    first, one = found[0]
    chosen: dict[int, Path] = {}
    for root, config in reversed(found):
        if keys := _differing(one, config):
            raise UserError(
                f"{name} holds runs of different settings: {first} and {root} differ in "
                f"{', '.join(keys[:3])}; name one run, or a folder of runs that are alike"
            )
        if config.seed in chosen:
            why = f"{chosen[config.seed]} is newer and has its seed"
            left_out = [*left_out, {"path": str(root), "why": why}]
        chosen.setdefault(config.seed, root)
    return Side(name, kind, dict(sorted(chosen.items())), tuple(left_out))


def _differing(one: Config, other: Config) -> list[str]:
    """The settings in which two runs differ that are not repetitions of each other."""
    keys = [each["key"] for each in configuration.differences(one, other)]
    return [key for key in keys if key != "seed" and not operational(key) | of_place(key)]


# What is read of a run


@dataclass(frozen=True)
class Standing:
    """Where a run stands after a round."""

    checkpoint: int
    """The one that it would go on with."""
    generated_tokens: int
    """Until then, in all rounds."""


@dataclass(frozen=True)
class Reading:
    """What a comparison needs of a run."""

    root: Path
    config: Config
    model: str
    base: int
    best: int
    best_path: str
    best_round: int
    after: tuple[Standing, ...]
    """By round: one that is not over is not among them."""
    totals: dict[str, float]
    values: dict[int, dict[str, dict[str, float]]]
    """Checkpoint id -> metric -> prompt's digest -> value."""
    judge_version: str

    def standing(self, round: int) -> Standing:
        """A run that ended earlier stands as it ended."""
        return self.after[min(round, len(self.after) - 1)]

    def test_prompts(self) -> set[str]:
        return {digest for metric in self.values[self.best].values() for digest in metric}


Pair = tuple[Reading, Reading]


def _read(root: Path) -> Reading:
    with opened(root) as store:
        config = config_of(store)
        name = model(config, None)
        over = [each for each in rounds(store)["rounds"] if each["status"] != "running"]
        if not over:
            raise UserError(f"{root} has measured nothing yet: its round 0 is not over")
        best, base = retention.best_checkpoint(store, name), store.beginning(name)
        after = standings(store, config, name, cast(int, base.id), over)
        judge = config.evaluate.judge.label
        ids = {cast(int, each.id) for each in (best, base)} | {each.checkpoint for each in after}
        values = {id: by_prompt(store, id, judge) for id in ids}
        if not values[cast(int, best.id)]:
            raise UserError(f"{root} has measured {best.path.name} on no test prompt yet")
        return Reading(
            root=root,
            config=config,
            model=name,
            base=cast(int, base.id),
            best=cast(int, best.id),
            best_path=str(best.path),
            best_round=rounds_of(store)[cast(int, best.id)],
            after=after,
            totals=_totals(store, name, over),
            values=values,
            judge_version=_version(store, judge),
        )


def standings(
    store: Store, config: Config, model: str, base: int, over: Sequence[Table]
) -> tuple[Standing, ...]:
    """By round, of those that are over. base: the checkpoint that the rounds began from."""
    kept = {"accept"} | ({"undecided"} if config.gate.undecided == "keep" else set())
    advanced = {
        row["round"]: row["checkpoint"]
        for row in decisions(store)
        if row["model"] == model and row["round"] > 0 and row["decision"] in kept
    }
    checkpoint, tokens, found = base, 0, []
    for each in over:
        checkpoint = advanced.get(each["number"], checkpoint)
        tokens += each["generated_tokens"]
        found.append(Standing(checkpoint, tokens))
    return tuple(found)


def _totals(store: Store, model: str, over: Sequence[Table]) -> dict[str, float]:
    spent: Counter[str] = Counter()
    for each in store.rounds():
        spent.update(each.seconds)
    accepted = [
        row
        for row in decisions(store)
        if (row["model"], row["decision"]) == (model, "accept") and row["round"] > 0
    ]
    return {
        "rounds": sum(each["number"] > 0 for each in over),
        "accepted": len(accepted),
        **{key: sum(each[key] for each in over) for key in SUMMED[2:]},
        "seconds": sum(value for key, value in spent.items() if not key.startswith("in ")),
        **{key: spent.get(key.replace("_", " "), 0.0) for key in SECONDS[1:]},
    }


def _version(store: Store, judge: str) -> str:
    found = store.query(
        "SELECT judge_version FROM judgement WHERE judge = :judge ORDER BY id DESC LIMIT 1",
        judge=judge,
    )
    return str(found[0]["judge_version"]) if found else ""


# Who meets whom


def meet(a: Side, b: Side) -> tuple[list[Pair], tuple[list[Table], list[Table]]]:
    """Runs of one seed, and what of each side is left out; two lone runs whatever their seeds."""
    if len(a.runs) == len(b.runs) == 1:
        [one], [other] = a.runs.values(), b.runs.values()
        return [(_read(one), _read(other))], (list(a.left_out), list(b.left_out))
    seeds = [seed for seed in a.runs if seed in b.runs]
    if not seeds:
        raise UserError(
            f"no run of {a.name} (seeds {_listed(a.runs)}) has the seed of one of {b.name} "
            f"(seeds {_listed(b.runs)}); runs of several seeds are compared seed by seed"
        )
    alone = (
        [
            *own.left_out,
            *(
                {"path": str(root), "why": f"{other.name} has no run of its seed, {seed}"}
                for seed, root in own.runs.items()
                if seed not in seeds
            ),
        ]
        for own, other in ((a, b), (b, a))
    )
    left, right = alone
    return [(_read(a.runs[seed]), _read(b.runs[seed])) for seed in seeds], (left, right)


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))

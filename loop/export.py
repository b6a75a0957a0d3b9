"""A checkpoint as a folder of its own, which plain transformers loads without Ratchet.

Written aside and renamed, like every checkpoint: under its name it is whole.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import cast

from rich.console import Console

from loop import gain, meant
from loop.report import Table
from loop.run import is_run
from loop.screen import line
from loop.settings import Config
from store import checkpoints
from store.database import Store
from store.errors import UserError
from store.records import Checkpoint

CARD = "README.md"
SHORT = 80
"""Characters of a prompt that is shown in a command."""


@dataclass(frozen=True)
class Wish:
    """What `loop export` was told."""

    into: Path
    checkpoint: str = "best"
    model: str | None = None
    force: bool = False


def said(first: Path, second: Path | None, runs: Path) -> tuple[Path | None, Path]:
    """(run, folder) of `[RUN] INTO`. Raises UserError for a run without a folder."""
    if second is not None:
        return first, second
    if any(is_run(place / first) for place in (Path(), runs)):
        raise UserError(f"no folder to export into: `loop export {quote(str(first))} FOLDER` does")
    return None, first


def export(store: Store, wish: Wish) -> Table:
    """{run, path, model, checkpoint, round, status, kind, source, into, bytes, gain, low, high,
    score, baseline_score, prompts, why_no_gain, next}. Raises UserError, and leaves nothing then.
    """
    config = meant.config_of(store)
    model = meant.model(config, wish.model)
    found = meant.checkpoint(store, model, wish.checkpoint)
    into = wish.into.absolute()
    _refuse_place(store, found, into, wish.force)
    for each in (found, *(one for one in store.checkpoints(model) if one.id == found.base_id)):
        if not checkpoints.intact(each):
            raise UserError(
                f"{each.path} is not as it was written; `loop verify {quote(str(store.root))}` "
                "says what else is wrong"
            )
    round = meant.rounds_of(store)[cast(int, found.id)]
    achieved = gain.achieved(store, config, found)
    del achieved["path"], achieved["baseline"]
    answer = {
        "run": store.root.name,
        "path": str(store.root),
        **achieved,
        "round": round,
        "status": found.status,
        "kind": found.kind,
        "source": str(found.path),
        "into": str(wish.into),
    }
    size = _write(found, into, _card(config, answer, found))
    return answer | {"bytes": size, "next": _one_liner(store, wish.into)}


def _refuse_place(store: Store, found: Checkpoint, into: Path, force: bool) -> None:
    place, run, source = into.resolve(), store.root.resolve(), found.path.resolve()
    if place.is_relative_to(run) or place.is_relative_to(source):
        raise UserError(f"{into} lies in what is exported; name a folder outside {store.root}")
    if run.is_relative_to(place) or source.is_relative_to(place):
        raise UserError(f"{into} holds what is exported; name a folder of its own")
    if into.is_symlink() or (into.exists() and not into.is_dir()):
        raise UserError(f"{into} is there and no folder; name another place")
    if not into.exists() or not any(into.iterdir()):
        return
    if not force:
        raise UserError(f"{into} is not empty; name another folder, or replace it with --force")
    if not (into / "config.json").is_file():
        raise UserError(f"{into} holds something else than a model, so --force does not replace it")


def _write(found: Checkpoint, into: Path, card: str) -> int:
    """How many bytes. What was there goes only once all of it is written."""
    part = checkpoints.aside(into)
    if part.exists():
        raise UserError(f"{part} is there, which an export is written in; delete it")
    try:
        into.parent.mkdir(parents=True, exist_ok=True)
        if found.kind == "adapter":
            from roles.policy.adapters import merge

            merge(found, part)
        else:
            shutil.copytree(found.path, part, ignore=shutil.ignore_patterns(".*"))
        if (part / CARD).exists():
            (part / CARD).rename(part / f"base-{CARD}")
        (part / CARD).write_text(card, encoding="utf-8")
        if pickled := checkpoints.pickles(part):
            raise UserError(
                f"{found.path} holds {pickled[0].name}, which could run code when it is loaded; "
                "only safetensors are exported"
            )
        size = sum(file.stat().st_size for file in part.rglob("*"))
        checkpoints.remove(into)
        checkpoints.publish(into)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"cannot write {into}: {error}") from error
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return size


def _card(config: Config, found: Table, checkpoint: Checkpoint) -> str:
    """The model card, with the front matter that the Hub reads."""
    path = config.models[found["model"]].path
    named = "the embedded model of Ratchet" if path == "embedded" else f"`{path}`"
    on_hub = not Path(path).is_absolute() and path != "embedded"
    matter = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    matter |= {"base_model": path} if on_hub else {}
    head = "".join(f"{key}: {json.dumps(value)}\n" for key, value in matter.items())
    judge = config.evaluate.judge.use
    if found["gain"] is None:
        gained = f"Measured against what its rounds began from: {found['why_no_gain']}."
    else:
        gained = (
            f"Score {found['score']:.3f} by the judge `{judge}` on {found['prompts']:,} test "
            "prompts that were never trained on, against "
            f"{found['baseline_score']:.3f} of what its rounds began from: gain "
            f"{found['gain']:+.3f}, 95 % interval [{found['low']:+.3f}, {found['high']:+.3f}] by "
            "paired bootstrap over prompts. It is the mean of sampled answers (temperature "
            f"{config.evaluate.temperature:g}). Nothing else was measured of it here."
        )
    return f"""---
{head}---

# {found["run"]}, {found["model"]}, round {found["round"]}

{named[0].upper() + named[1:]}, improved in rounds by Ratchet.

{gained}

| | |
|---|---|
| run | `{found["run"]}` |
| round | {found["round"]} ({found["status"]}) |
| seed | {config.seed} |
| began from | {named} |
| kind | {"an adapter, merged into its base" if found["kind"] == "adapter" else "full weights"} |
| SHA-256 of the checkpoint in the run | `{checkpoint.digest}` |

```python
from transformers import pipeline

answer = pipeline("text-generation", "PATH TO THIS FOLDER")
print(answer([{{"role": "user", "content": "..."}}])[0]["generated_text"][-1]["content"])
```
"""


def _one_liner(store: Store, into: Path) -> str:
    """A command that asks the exported folder a prompt of the run, if it has a short one."""
    contents = (each.messages[-1].content for each in store.prompts("test")[:20])
    fit = [each for each in contents if len(each) <= SHORT and each.isprintable()]
    asked = [{"role": "user", "content": fit[0] if fit else "Hello"}]
    code = (
        "from transformers import pipeline; "
        f'print(pipeline("text-generation", {json.dumps(str(into))})({json.dumps(asked)})'
        '[0]["generated_text"][-1]["content"])'
    )
    return f"python3 -c {quote(code)}"


def view(console: Console, found: Table) -> None:
    """Where it is, how good it is, and how to ask it."""
    line(
        console,
        f"{found['source']} (round {found['round']}) is in {found['into']}, "
        f"{found['bytes'] / 1e6:,.1f} MB, and needs no Ratchet",
    )
    if found["gain"] is None:
        line(console, found["why_no_gain"])
    else:
        line(
            console,
            f"gain on the test split: {found['gain']:+.3f} "
            f"[{found['low']:+.3f}, {found['high']:+.3f}]",
        )
    line(console, f"next: {found['next']}")

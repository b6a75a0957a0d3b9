"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="[RUN]", help="A run directory; left out, the newest.", show_default=False
    ),
]
Runs = Annotated[Path, typer.Option(metavar="DIR", help="Where runs are.")]
Json = Annotated[bool, typer.Option("--json", help="As JSON, in a shape that stays.")]
File = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="TOML, as `loop init` writes it.")
]
Recipe = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="A published loop, see `loop recipes`; or a file of one."),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One setting, as in judge.votes=3."),
]
Gpu = Annotated[
    float | None,
    typer.Option(
        metavar="GIB", min=1, help="Plan for one GPU with so much memory.", show_default=False
    ),
]
Checkpoint = Annotated[
    str, typer.Option(metavar="WHICH", help="best, base, given or the number of a round.")
]
Model = Annotated[str | None, typer.Option(metavar="NAME", help="Of several; left out, the first.")]
Track = Annotated[
    str | None, typer.Option(metavar="NAME", help="Of several; left out, all.", show_default=False)
]
RUNS = Path("runs")

"""What is known of reasoning-gym's tasks: which cannot be asked, and how an entry is kept.

An entry is kept as a column of the prompt, as JSON, so that a judge years later can build the
scorer anew. A task whose scorer does not survive that, or can be fooled, is refused at the start.
"""

from __future__ import annotations

from typing import Any

from store.errors import UserError, unknown

COLUMN = "reasoning_gym"
"""The prompt's column: {"task": its name, "options": the data set's, "metadata": the entry's}."""

_NO_REFERENCE = "its entries come without a reference answer"
_TUPLES = "its scorer compares tuples, and its entries are kept as JSON, which has none"

REFUSED: dict[str, str] = {
    "arc_agi": _TUPLES,
    "boxnet": _NO_REFERENCE,
    "composite": "it is made of other tasks; name those, each with its weight",
    "graph_color": _NO_REFERENCE,
    "propositional_logic": _NO_REFERENCE,
    "puzzle24": "its scorer takes any four numbers that make 24, whatever the prompt's numbers are",
    "rearc": _TUPLES,
    "rubiks_cube": _NO_REFERENCE,
    "rush_hour": _NO_REFERENCE,
}


def check_task(name: str) -> None:
    """Raises UserError when reasoning-gym has no task of this name or it is refused."""
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise unknown("reasoning-gym task", name, DATASETS)
    if name in REFUSED:
        raise UserError(f"the reasoning-gym task {name!r} cannot be used: {REFUSED[name]}")


def make_dataset(name: str, options: dict[str, Any], *, seed: int, size: int) -> Any:
    """The data set. Raises UserError for an option it does not have or does not accept."""
    from reasoning_gym.factory import DATASETS, create_dataset

    check_task(name)
    fields = set(DATASETS[name][1].__dataclass_fields__) - {"seed", "size"}
    for option in options:
        if option not in fields:
            raise unknown(f"option of the reasoning-gym task {name!r}", option, fields)
    try:
        return create_dataset(name, **options, seed=seed, size=size)
    except (AssertionError, ValueError, TypeError) as error:
        raise UserError(
            f"the reasoning-gym task {name!r} does not accept {options}: {error}"
        ) from error

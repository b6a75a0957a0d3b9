"""The runs that a recipe is judged by: its own, its control's and plain iterative DPO's.

What is wrong with them is found before any of them is made.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from loop import claims, config
from loop.settings import Config
from store.database import Store
from store.errors import UserError

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Variant:
    """A run that a recipe is judged by: what to tell `loop start`, the seed aside."""

    name: str
    trial: str
    """The recipe that it is a run for."""
    recipe: str
    said: tuple[tuple[str, tuple[str, ...]], ...]
    """Settings over the recipe's, with where they were said; the later go over the earlier."""
    like: Variant | None = None
    """Whose warm-up and models it has in place of its own."""

    @property
    def sets(self) -> list[str]:
        return [each for _, sets in self.said for each in sets]

    def config(self, seed: int) -> Config:
        own = config.read(recipe=self.recipe, sets=[*self.sets, f"seed={seed}"])
        if self.like is None:
            return own
        theirs = self.like.config(seed)
        others = {name: each for name, each in theirs.models.items() if name not in own.models}
        return own.model_copy(
            update={
                "warmup": theirs.warmup,
                "evaluate": theirs.evaluate,
                "models": own.models | others,
            }
        )

    def checked(self, load: Callable[[Config], Loaded]) -> tuple[Config, Loaded]:
        """Its configuration and what `load` makes of it. Raises UserError that says where the
        mistake is: in the recipe itself, or in which of the settings over it."""

        def tried(each: Variant) -> tuple[Config, Loaded]:
            made = each.config(0)
            return made, load(made)

        try:
            return tried(self)
        except UserError as error:
            place, cause = self.trial, error
            for count in range(len(self.said) + 1):
                try:
                    tried(replace(self, said=self.said[:count]))
                except UserError as first:
                    cause = first
                    place += f", {self.said[count - 1][0]}" if count else ""
                    break
            raise UserError(f"{place}: {cause}") from None


def variants(name: str, trial: claims.Trial, sets: Sequence[str]) -> list[Variant]:
    """sets: of all three, over what the recipe says."""
    arena = "default" if trial.arena is None else f"{config.ARENAS}/{trial.arena}"
    first, last = ("trial", trial.trial), ("--set", tuple(sets))
    recipe = Variant("recipe", name, name, (first, last))
    control = Variant("control", name, name, (first, ("control", trial.control), last))
    plain = Variant("plain", name, arena, (first, ("plain", trial.plain), last), recipe)
    return [recipe, control, plain]


def check(
    name: str, load: Callable[[Config], Loaded], sets: Sequence[str] = ()
) -> dict[str, tuple[Config, Loaded]]:
    """Variant -> its configuration, and what `load` makes of it.

    Raises UserError for what would else be found when runs were paid for: settings that are not
    there, a control that changes nothing, a query that cannot be asked.
    """
    trial = claims.read(name)
    made = {each.name: each.checked(load) for each in variants(name, trial, sets)}
    if made["control"][0] == made["recipe"][0]:
        raise UserError(
            f"{name}, control: it changes nothing, so there is nothing to hold the recipe against; "
            f"found {', '.join(trial.control)}"
            + (f" under --set {', '.join(sets)}" if sets else "")
        )
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "empty.db", create=True)
        try:
            for each in trial.claim:
                if each.query is not None:
                    claims.asked(store, each.says, each.query, checkpoint=0, judge="")
        except UserError as error:
            raise UserError(f"{name}, {error}") from None
        finally:
            store.close()
    return made

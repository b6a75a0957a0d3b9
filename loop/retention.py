"""Which checkpoints are kept on disk, and which is the best."""

from __future__ import annotations

from typing import cast

from loop.context import Context
from loop.gate import is_heard
from store import checkpoints
from store.database import Store
from store.records import (
    Checkpoint,
)


def tidy(context: Context) -> None:
    """Point `best` at the best checkpoint and delete weights that nothing needs any more."""
    store = context.store
    checkpoints.sweep(context.root)
    pruned: list[Checkpoint] = []
    for model in context.config.models:
        made = [each for each in store.checkpoints(model) if each.status != "pruned"]
        if not made:
            continue
        best, incumbent = best_checkpoint(store, model), store.incumbent(model)
        if model == next(iter(context.config.models)):
            checkpoints.link_best(context.root, best.path)
        weights = [each for each in made if each.status not in ("diverged", "merged")]
        kept = {best.id, incumbent.id, made[-1].id} | {
            each.id for each in weights[-context.config.checkpoints.keep_last :]
        }
        if store.rounds():
            kept.add(store.beginning(model).id)  # `loop sample` answers beside it
        kept |= {each.base_id for each in made if each.id in kept}  # an adapter is nothing alone
        inside = [each for each in made if each.path.is_relative_to(context.root)]
        pruned += [each for each in inside if each.id not in kept and each.status != "diverged"]
        for each in made:
            if each.id in kept:
                checkpoints.rebase(each)
    store.set_pruned([cast(int, each.id) for each in pruned])
    for each in store.checkpoints():  # those that a kill left behind as well
        if each.status == "pruned" and each.path.is_relative_to(context.root):
            checkpoints.remove(each.path)


def best_checkpoint(store: Store, model: str) -> Checkpoint:
    """The accepted checkpoint that the gate's number is highest for; the newest of equals."""
    run = store.run()
    by = "held_out" if run is None else run.config["gate"].get("by", "held_out")
    accepted = [each for each in store.checkpoints(model) if each.status == "accepted"]

    def score(checkpoint: Checkpoint) -> float:
        found = store.evaluations(cast(int, checkpoint.id))
        return next((each.value for each in found if is_heard(each, by)), -1e300)

    return max(reversed(accepted), key=score)

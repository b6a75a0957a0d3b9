"""Whether a checkpoint replaces the incumbent, whether the run goes on, and why.

The gate sees the split of its name and nothing of test. It compares prompt by prompt, because
most of the noise is in which prompts were drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from loop import health
from loop.measure import bootstrap
from loop.settings import Config, Gate
from store.database import Store
from store.errors import UserError
from store.records import (
    Checkpoint,
    CheckpointStatus,
    Decision,
    DecisionKind,
    Evaluation,
    Round,
)

Scores = dict[int, list[float]]
"""Prompt id -> scores of its sampled answers."""


@dataclass(frozen=True)
class Guard:
    """What must not fall: the differences from what it is compared with, one an item."""

    name: str
    differences: Sequence[float]
    max_fall: float
    below: str
    """What it is compared with."""


def decide(
    rule: Gate,
    checkpoint: Checkpoint,
    incumbent: Checkpoint,
    new: Scores,
    old: Scores,
    seed: int,
    guards: Sequence[Guard] = (),
) -> Decision:
    """Accept, reject or undecided, with the numbers it hangs on.

    new, old: of the checkpoint and the incumbent. A guard that gave way rejects first.
    """
    seen: dict[str, float] = {}

    def decided(decision: DecisionKind, by: str, reason: str) -> Decision:
        return Decision(
            decision=decision,
            rule=by,
            reason=reason,
            model=checkpoint.model,
            checkpoint_id=checkpoint.id,
            incumbent_id=incumbent.id,
            numbers=seen,
        )

    if checkpoint.status == "diverged":
        return decided("reject", "diverged", "training met a loss or gradient that is not finite")
    for guard in guards:
        fall, lowest, highest = bootstrap(guard.differences, rule.resamples, seed)
        seen[f"{guard.name} change"] = fall
        seen |= {f"{guard.name} low": lowest, f"{guard.name} high": highest}
        if highest < -guard.max_fall:
            fell = f"{guard.name} fell by {-fall:.3f}"
            if len(guard.differences) > 1:
                fell += f" [{-highest:.3f}, {-lowest:.3f}] on {len(guard.differences)} items"
            allowed = f"{guard.max_fall:g} is allowed"
            return decided("reject", "guard", f"{fell} below {guard.below}; {allowed}")
    paired = sorted(new.keys() & old.keys())
    if rule.by != "held_out" and len(new) != len(old):
        raise _unlike(rule.by, len(new), len(old))
    if not paired:
        return decided("reject", "unscored", "no held-out prompt has a score on both sides")
    means = [(_mean(new[key]), _mean(old[key])) for key in paired]
    gain, low, high = bootstrap([after - before for after, before in means], rule.resamples, seed)
    seen |= {
        "gain": gain,
        "low": low,
        "high": high,
        "prompts": len(paired),
        "score": _mean([after for after, _ in means]),
        "incumbent_score": _mean([before for _, before in means]),
        "min_gain": rule.min_gain,
    }
    by, interval = "paired bootstrap", f"gain {gain:+.3f} [{low:+.3f}, {high:+.3f}]"
    interval += f" on {len(paired)} {'prompts' if rule.by == 'held_out' else 'items'}"
    if len(paired) == 1:  # one number a side has no interval
        by, interval = "difference", f"gain {gain:+.3f}"
    if rule.by != "held_out":
        by, interval = f"{by} of {rule.by}", f"{rule.by}: {interval}"
    if low > rule.min_gain:
        bound = "it" if len(paired) == 1 else "the lower bound"
        return decided("accept", by, f"{interval}: {bound} passes {rule.min_gain:g}")
    if high < 0:
        return decided("reject", by, f"{interval}: worse than the incumbent")
    then = "goes on with it" if rule.undecided == "keep" else "goes on from the incumbent"
    return decided("undecided", by, f"{interval}: not told apart; the run {then}")


def first(checkpoint: Checkpoint, incumbent: Checkpoint) -> Decision:
    """Round 0 has nothing to be compared with: what it made is where the run begins."""
    diverged = checkpoint.status == "diverged"
    return Decision(
        model=checkpoint.model,
        checkpoint_id=checkpoint.id,
        incumbent_id=incumbent.id,
        decision="reject" if diverged else "accept",
        rule="diverged" if diverged else "first",
        reason="the warm-up diverged" if diverged else "the run begins from it",
    )


def unmeasured(checkpoint: Checkpoint, incumbent: Checkpoint) -> Decision:
    """A model that judges and is not measured is as good as its examples."""
    return Decision(
        model=checkpoint.model,
        checkpoint_id=checkpoint.id,
        incumbent_id=incumbent.id,
        decision="accept",
        rule="unmeasured",
        reason="a reward model is measured on [evaluate.anchors], by the judge that asks it; there "
        "are not both, or it replaces what was no reward model yet",
    )


def alarmed(checkpoint: Checkpoint, incumbent: Checkpoint, reason: str) -> Decision:
    """What a judge taught that is known to be bad replaces nothing."""
    return Decision(
        model=checkpoint.model,
        checkpoint_id=checkpoint.id,
        incumbent_id=incumbent.id,
        decision="reject",
        rule="judge's alarm",
        reason=reason,
    )


def status_after(rule: Gate, decision: Decision) -> CheckpointStatus:
    """What becomes of the checkpoint that was decided on."""
    if decision.rule == "diverged":
        return "diverged"
    kept = decision.decision == "accept" or (
        decision.decision == "undecided" and rule.undecided == "keep"
    )
    return "accepted" if kept else "rejected"


def ending(store: Store, config: Config) -> Decision | None:
    """The rule that ends the run now, or None when it goes on."""
    rounds = store.rounds()
    if (rang := health.stopping(store, config)) is not None:
        return Decision(decision="stop", rule="alarm", reason=rang)
    spent, limit = store.generated_tokens(), config.budget.generated_tokens
    if rounds and 0 < limit <= spent and not _complete(rounds, config):
        reason = f"{spent:,} tokens were generated; budget.generated_tokens is {limit:,}"
        return Decision(decision="stop", rule="budget", reason=reason)
    cost, most = store.judge_cost(), config.budget.cost
    if rounds and 0 < most <= cost and not _complete(rounds, config):
        reason = f"judges cost {cost:.4g}; budget.cost is {most:g}"
        return Decision(decision="stop", rule="cost", reason=reason)
    if not rounds or rounds[-1].status == "running":
        return None
    decided = _decisions(store)
    if any(row["rule"] == "diverged" and row["number"] == 0 for row in decided):
        return Decision(decision="stop", rule="diverged", reason="the warm-up diverged")
    asked = [each.get("asked", 0) for each in rounds[-1].counts.values()]
    if rounds[-1].number > 0 and not any(asked):
        return Decision(decision="stop", rule="no prompts", reason="the proposers gave no prompts")
    if (reached := _reached(store, config)) is not None:
        return reached
    if _complete(rounds, config):
        reason = f"{config.rounds} of {config.rounds} rounds done"
        return Decision(decision="stop", rule="rounds", reason=reason)
    return _out_of_patience(rounds, decided, config)


def is_success(decision: Decision) -> bool:
    """Whether the run ended because it did what it was asked to."""
    return decision.rule in ("rounds", "target")


def _complete(rounds: Sequence[Round], config: Config) -> bool:
    done = rounds[-1].status != "running" and rounds[-1].number >= config.rounds
    return config.rounds > 0 and done


AGREEMENT = "judge.agreement"
"""How well it judges anchors: of each, the share of pairs of answers put in the true order."""


def heard(store: Store, config: Config, checkpoint: Checkpoint, *, writes: bool = True) -> Scores:
    """What the gate compares of a checkpoint: prompt -> scores, or place -> a command's item.

    writes: whether it answers prompts; a reward model is heard by its word on the anchors.
    """
    id = cast(int, checkpoint.id)
    if writes and config.gate.by == "held_out":
        return store.scores(id, "gate", config.evaluate.judge.label)
    by = config.gate.by if writes else AGREEMENT
    suite, _, metric = by.partition(".")
    return {place: [item] for place, item in enumerate(items(store, id, suite, metric))}


def is_heard(measured: Evaluation, by: str) -> bool:
    """Whether it is the number that the gate goes by."""
    suite, _, metric = by.partition(".") if by != "held_out" else ("held_out", ".", "score")
    return (measured.suite, measured.split, measured.metric) == (suite, "gate", metric)


def guards(
    store: Store, config: Config, checkpoint: Checkpoint, incumbent: Checkpoint
) -> list[Guard]:
    """What must not fall in a checkpoint: old skills, and what commands guard.

    Skills are compared with those that the rounds began from, so that many small losses count.
    """
    new, old = cast(int, checkpoint.id), cast(int, incumbent.id)
    beginning = store.beginning(checkpoint.model)
    found = []
    for name, suite in config.evaluate.suite.items():
        before, after = (
            store.scores(cast(int, each.id), "gate", suite.judge.label, name, "greedy")
            for each in (beginning, checkpoint)
        )
        both = sorted(after.keys() & before.keys())
        paired = [_mean(after[key]) - _mean(before[key]) for key in both]
        if paired:
            found.append(Guard(name, paired, suite.max_fall, "what the rounds began from"))
    for name, command in config.evaluate.command.items():
        if command.guard is not None:
            label = f"{name}.{command.guard}"
            now, then = (items(store, each, name, command.guard) for each in (new, old))
            if len(now) != len(then):
                raise _unlike(label, len(now), len(then))
            changes = [one - other for one, other in zip(now, then, strict=True)]
            found.append(Guard(label, changes, command.max_fall, "the incumbent"))
    return found


def _unlike(label: str, now: int, before: int) -> UserError:
    return UserError(
        f"the command of {label} printed {now:,} items, and {before:,} of the incumbent; they are "
        "compared item by item, so their number stays the same"
    )


def items(store: Store, checkpoint_id: int, suite: str, metric: str) -> Sequence[float]:
    """A metric that is no mean over held-out prompts, item by item if it was measured so.

    Raises LookupError where it was not measured.
    """
    for each in store.evaluations(checkpoint_id):
        if (each.suite, each.metric) == (suite, metric):
            return [each.value] if each.items is None else each.items
    raise LookupError(f"{suite}.{metric} of checkpoint {checkpoint_id} was not measured")


def _decisions(store: Store) -> list[dict[str, object]]:
    return store.query(
        "SELECT number, decision, rule, checkpoint.status AS status FROM decision "
        "JOIN round ON round.id = decision.round_id "
        "LEFT JOIN checkpoint ON checkpoint.id = decision.checkpoint_id "
        "WHERE decision.run_id = :run AND decision.model IS NOT NULL"
    )


def _reached(store: Store, config: Config) -> Decision | None:
    target = config.gate.target
    if target is None:
        return None
    for model in config.models:
        for each in store.evaluations(store.incumbent(model).id or 0):
            if is_heard(each, config.gate.by) and each.value >= target:
                what = "on the gate split" if config.gate.by == "held_out" else config.gate.by
                reason = f"{model} scores {each.value:.3f} {what}; target {target:g}"
                return Decision(decision="stop", rule="target", reason=reason)
    return None


def _out_of_patience(
    rounds: Sequence[Round], decided: Sequence[dict[str, object]], config: Config
) -> Decision | None:
    patience = config.gate.patience
    kept = {row["number"] for row in decided if row["decision"] == "accept"}
    if config.gate.undecided == "keep":
        kept |= {row["number"] for row in decided if row["decision"] == "undecided"}
    fruitless = 0
    for each in reversed(rounds):
        if each.number in kept or each.number == 0:
            break
        fruitless += 1
    if patience == 0 or fruitless < patience:
        return None
    reason = f"{fruitless} rounds in a row gave no accepted checkpoint; gate.patience is {patience}"
    return Decision(decision="stop", rule="patience", reason=reason)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

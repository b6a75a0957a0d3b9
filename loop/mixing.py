"""Which examples a training learns from: its round's own, earlier ones, and real data.

What is drawn follows from the run's seed, the round and the example itself, never from row ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

from loop.context import Context
from loop.settings import Mix
from store.errors import UserError
from store.records import Call, Example, Round


def learned_from(context: Context, round: Round, model: str) -> list[Example]:
    """The examples of the round's training of `model`; none when the round itself gave none."""
    mix = context.config.models[model].mix
    own = _of_round(context, round, model)
    if not own or round.number == 0:
        return own
    call = context.call(round, model, "mix")
    windows = len(mix.rounds)
    earlier = {
        each.number: _of_round(context, each, model)
        for each in context.store.rounds()
        if 0 < each.number < round.number and (mix.replay or each.number > round.number - windows)
    }
    taken = _drawn(own, mix.rounds[0] * len(own), call)
    for back, share in enumerate(mix.rounds[1:], start=1):
        taken += _drawn(earlier.get(round.number - back, []), share * len(own), call)
    before = [
        each
        for number, examples in earlier.items()
        if number <= round.number - windows
        for each in examples
    ]
    taken += _drawn(before, mix.replay * len(own), call)
    return taken + _real(context, round, model, mix, taken, call)


def _of_round(context: Context, round: Round, model: str) -> list[Example]:
    tracks = context.config.tracks(round.number)
    names = [name for name, each in tracks.items() if each.model == model]
    return context.store.examples(cast(int, round.id), names)


def _drawn(examples: Sequence[Example], count: float, call: Call) -> list[Example]:
    """About `count` of the examples, those there are at most, in their order."""
    wanted = math.ceil(count - 1e-9)
    if wanted >= len(examples):
        return list(examples)
    order = sorted(range(len(examples)), key=lambda place: _key(examples[place], call))
    return [examples[place] for place in sorted(order[:wanted])]


def _key(example: Example, call: Call) -> int:
    rejected = -1 if example.rejected is None else example.rejected.index
    return call.seed_for(example.prompt.digest, example.rule, example.chosen.index, rejected)


def _real(
    context: Context, round: Round, model: str, mix: Mix, taken: Sequence[Example], call: Call
) -> list[Example]:
    """What is to be added so that the share of real examples is at least mix.real."""
    have = sum(_is_real(each) for each in taken)
    # (have + n) / (len(taken) + n) >= real
    wanted = (mix.real * len(taken) - have) / (1 - mix.real)
    if wanted <= 0:
        return []
    ids, kinds = {each.id for each in taken}, {each.kind for each in taken}
    pool = [
        each
        for earlier in context.store.rounds()
        if earlier.number <= round.number
        for each in _of_round(context, earlier, model)
        if _is_real(each) and each.kind in kinds and each.id not in ids
    ]
    added = _drawn(pool, wanted, call)
    if len(added) < math.ceil(wanted - 1e-9):
        share = (have + len(added)) / (len(taken) + len(added))
        told = f"mix.real is {mix.real:g}, and with all {len(pool)} real examples of the kind "
        told += f"{' or '.join(sorted(kinds))} the share is {share:.2f}"
        if not pool and not have:
            raise UserError(
                f"{told}; a warm-up or a track with the generator 'recorded' gives some"
            )
        context.progress.say(f"round {round.number}  {model}: {told}")
    return added


def _is_real(example: Example) -> bool:
    """Whether it came with the data: no policy wrote its answers."""
    sides = [example.chosen, example.rejected]
    return all(each.checkpoint_id is None for each in sides if each is not None)

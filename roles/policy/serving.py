"""Which models, and texts of what length, decoding.py serves, and why others go to `generate`.

REASONS and TOO_LONG are all there are. What of it cannot be read off a model is found by decoding
a few tokens with it, before anything is drawn from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kernels.causal import alike, few_ids, fixed_positions
from roles.policy.attending import Tails, Unheard, attending
from roles.policy.reading import Reader, accepts


class Serving(NamedTuple):
    """What of a model can be decoded.

    unserved: why nothing can, or None. limit: the most tokens of a text, prompt and completion, or
    None. windows: of the attention that sees no further back. bytes_per_token: of keys and values.
    """

    unserved: str | None
    limit: int | None = None
    windows: frozenset[int] = frozenset()
    bytes_per_token: int = 0


@dataclass
class _Trial:
    """What came of decoding a few tokens: logits behind each, of three rows, or what went wrong."""

    logits: list[Tensor] = field(default_factory=list)
    tails: Tails | None = None
    error: str | None = None
    unheard: str | None = None


class _Case:
    """A model, which is tried when a reason first asks for it."""

    def __init__(self, model: Any, reader: Reader) -> None:
        self.model = model
        self._reader = reader

    @cached_property
    def ids(self) -> list[int]:
        found: list[int] = few_ids(self.model, 6)[0].tolist()
        return found

    @cached_property
    def trial(self) -> _Trial:
        """Two rows, and one that lacks their first token, so that its prompt is padded."""
        trial, ids, device = _Trial(), self.ids, self.model.device
        try:
            prefix = self._reader.read([tuple(ids[:4]), tuple(ids[1:4])], share=False)
            groups_N = np.array([0, 0, 1])
            trial.tails = Tails(prefix, groups_N, 2)
            cache = trial.tails.cache()
            trial.logits.append(prefix.logits_GV[groups_N])
            with attending(self.model, trial.tails.attend):
                for step in (0, 1):
                    tokens = torch.full((3, 1), ids[4 + step], device=device)
                    at = torch.tensor([[4], [4], [3]], device=device) + step
                    trial.tails.begin_step()
                    trial.logits.append(self._reader.last_logits(tokens, at, cache))
        except Unheard as found:
            trial.unheard = str(found)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            trial.error = repr(error)  # whatever code says that wants what it does not get
        return trial


def _keeps_more(case: _Case) -> bool:
    kinds = {type(layer) for layer in _cache_layers(case.model)}
    return bool(getattr(case.model, "_is_stateful", False)) or not (
        kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
    )


def _cache_layers(model: Any) -> list[Any]:
    layers: list[Any] = DynamicCache(config=model.config).layers
    return layers


def _is_off(case: _Case) -> bool:
    for row, first in ((0, 0), (1, 0), (2, 1)):
        ids = torch.tensor([case.ids[first:]], device=case.model.device)
        plain_TV = case.model(input_ids=ids).logits[0, 3 - first :]
        for own_NV, plain_V in zip(case.trial.logits, plain_TV, strict=True):
            if not alike(plain_V, own_NV[row]):
                return True
    return False


REASONS: tuple[tuple[str, Callable[[_Case], bool | str | None]], ...] = (
    ("it is an encoder and a decoder", lambda case: case.model.config.is_encoder_decoder),
    ("it keeps more of a text than keys and values, such as a recurrent state", _keeps_more),
    (
        "its attention is code of its own, not called through transformers' interface",
        lambda case: not case.model._can_set_attn_implementation(),
    ),
    (
        "it takes no positions of tokens",
        lambda case: not accepts(case.model, "position_ids", or_any=True),
    ),
    ("its code wants another cache: {}", lambda case: case.trial.error),
    ("its attention is told {}", lambda case: case.trial.unheard),
    ("its logits come out otherwise than those of a plain pass", _is_off),
)
"""Why a model goes to `generate`, and what finds it. The first is told; those from the cache on are
found by trying."""
TOO_LONG = "of a text so long, its positions or attention turn on the length"
"""Why a text does, of a model that is served."""


def find(model: Any, reader: Reader) -> Serving:
    """What of the model can be decoded."""
    case = _Case(model, reader)
    with torch.inference_mode():
        for why, holds in REASONS:
            if found := holds(case):
                return Serving(why.format(found))
    tails = case.trial.tails
    assert tails is not None
    return Serving(
        unserved=None,
        limit=_limit(model, tails),
        windows=frozenset(tails.windows.values()),
        bytes_per_token=sum(
            each.shape[1] * each.shape[3] * each.element_size()
            for keys, values in tails.kept
            for each in (keys, values)
        ),
    )


def _limit(model: Any, tails: Tails) -> int | None:
    limit = fixed_positions(model.config)
    for place, layer in enumerate(_cache_layers(model)):
        declared = getattr(layer, "sliding_window", None)
        told = tails.windows.get(place)
        if told != declared:
            # It masks what is far (in chunks, say) and its attention is told nothing of it, or the
            # other way round: up to there it makes no difference.
            bounds = (limit, declared, told)
            limit = min(bound for bound in bounds if bound is not None)
    return limit

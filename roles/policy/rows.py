"""The rows that are drawn together: what each is to continue, what was drawn of it, where it ends.

Both roads draw rows: decoding.py and, for what that does not serve, generating.py.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.sampling import uniforms

_AHEAD = 64
"""Steps whose noise is made together: made step by step, it takes as long as the drawing."""
_SIZES = 8
"""A batch is packed to whole eighths, the last one filled up with rows that have ended: for each
number of rows that it meets, oneDNN compiles kernels, and keeps them."""


Ids = tuple[int, ...]


class Row(NamedTuple):
    """One completion to draw: what it continues, its noise, and how many tokens it may have."""

    prompt: Ids
    seed: int
    room: int


class Drawn(NamedTuple):
    """A row's tokens up to where it ended, the raw log-probability of each, and up to which token
    a stop string was completed, if one was."""

    tokens: list[int]
    logprobs: list[float]
    stop_end: int | None


class StopStrings:
    """Ends a row whose completion contains a stop string; also a stopping criterion for `generate`.

    It reads the completion only, so a stop string in the prompt does not count. `ends[row]` is
    the number of tokens up to and including the one that completed the string, or None.
    transformers' own criterion reads the prompt's end as well and cannot say where it stopped.
    """

    def __init__(
        self, tokenizer: Any, stop: Sequence[str], end_ids: Collection[int], rows: int
    ) -> None:
        self.ends: list[int | None] = [None] * rows
        self._tokenizer = tokenizer
        self._stop = stop
        self._end_ids = frozenset(end_ids)
        self._silent_ids = frozenset(tokenizer.all_special_ids)
        self._written: list[list[int]] = [[] for _ in range(rows)]
        self._lengths = [0] * rows
        self._finished = [False] * rows
        # Every token that is not special adds at least one byte of text; the four more cover a
        # character begun before the window, and a first token that loses its leading space.
        self._window = max(len(string.encode()) for string in stop) + 4

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        rows = [row for row, finished in enumerate(self._finished) if not finished]
        self.add(rows, input_ids[rows, -1].tolist())
        return torch.tensor(self._finished, device=input_ids.device)

    def add(self, rows: Sequence[int], tokens: Sequence[int]) -> list[bool]:
        """Which of these rows their next tokens end."""
        ended = []
        for row, token in zip(rows, tokens, strict=True):
            self._lengths[row] += 1
            self._finished[row] = self._ends_with(row, token)
            ended.append(self._finished[row])
        return ended

    def _ends_with(self, row: int, token: int) -> bool:
        if token in self._end_ids:
            return True
        if token in self._silent_ids:
            return False
        written = self._written[row]
        written.append(token)
        tail = self._tokenizer.decode(written[-self._window :], clean_up_tokenization_spaces=False)
        if any(string in tail for string in self._stop):
            self.ends[row] = self._lengths[row]
            return True
        return False


class Drawing:
    """Rows that are drawn in step, one token each, until all of them have ended.

    places: of the rows among those that `stops` was made for.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        end_ids: Sequence[int],
        stops: StopStrings | None = None,
        places: Sequence[int] = (),
    ) -> None:
        self.rooms_N = np.array([row.room for row in rows])
        self.room = int(self.rooms_N.max())
        self._seeds_N = np.array([row.seed % 2**64 for row in rows], dtype=np.uint64)
        self._end_ids = np.array(end_ids, dtype=np.int64)
        self._stops = stops
        self._places_N = np.array(places, dtype=np.int64)
        self._grain = max(1, len(rows) // _SIZES)
        self._lengths_N = np.zeros(len(rows), dtype=np.int64)
        # Of the M rows that are drawn now: which they are, and which of them have ended.
        self._which_M = np.arange(len(rows))
        self._ended_M = np.zeros(len(rows), dtype=bool)
        self._noise_KM = np.empty((0, len(rows)))
        self._steps: list[tuple[NDArray[np.int64], NDArray[np.int64], Tensor]] = []

    def noise(self) -> NDArray[np.float64]:
        """The noise of the next step, [M]."""
        ahead = len(self._steps) % _AHEAD
        if ahead == 0:
            noise_MK = uniforms(self._seeds_N[self._which_M], _AHEAD, first=len(self._steps))
            self._noise_KM = np.ascontiguousarray(noise_MK.T)
        noise_M: NDArray[np.float64] = self._noise_KM[ahead]
        return noise_M

    def add(self, tokens_M: Tensor, logps_M: Tensor) -> int:
        """Write down what was drawn at a step; how many rows go on."""
        drawn_M = tokens_M.cpu().numpy()
        # Of a row that has ended too: what lies behind its end is cut off once, by drawn().
        self._steps.append((self._which_M, drawn_M, logps_M))
        ends_M = (drawn_M[:, None] == self._end_ids).any(1)
        ends_M |= self.rooms_N[self._which_M] == len(self._steps)
        if self._stops is not None:
            open_L = np.flatnonzero(~self._ended_M)
            places_L = self._places_N[self._which_M[open_L]]
            ends_M[open_L] |= self._stops.add(places_L.tolist(), drawn_M[open_L].tolist())
        ends_M &= ~self._ended_M
        if ends_M.any():
            self._lengths_N[self._which_M[ends_M]] = len(self._steps)
            self._ended_M |= ends_M
        return len(drawn_M) - int(np.count_nonzero(self._ended_M))

    def pack(self, left: int) -> NDArray[np.int64] | None:
        """Which of the M rows are drawn further, the `left` that go on among them; None: all."""
        packed = -(-left // self._grain) * self._grain
        if packed >= len(self._which_M):
            return None
        stay_M = ~self._ended_M
        stay_M[np.flatnonzero(self._ended_M)[: packed - left]] = True
        kept = np.flatnonzero(stay_M)
        self._which_M, self._ended_M = self._which_M[kept], self._ended_M[kept]
        self._noise_KM = self._noise_KM[:, kept]
        return kept

    def drawn(self) -> list[Drawn]:
        """Of all rows, in order."""
        tokens_NT = np.zeros((len(self._lengths_N), len(self._steps)), dtype=np.int64)
        logps_NT = np.zeros(tokens_NT.shape, dtype=np.float32)
        for step, (which_M, tokens_M, logps_M) in enumerate(self._steps):
            tokens_NT[which_M, step] = tokens_M
            logps_NT[which_M, step] = logps_M.cpu().numpy()
        ends: Sequence[int | None] = [None] * len(self._lengths_N)
        if self._stops is not None:
            ends = [self._stops.ends[place] for place in self._places_N]
        return [
            Drawn(tokens_T[:length].tolist(), logps_T[:length].tolist(), end)
            for tokens_T, logps_T, length, end in zip(
                tokens_NT, logps_NT, self._lengths_N, ends, strict=True
            )
        ]

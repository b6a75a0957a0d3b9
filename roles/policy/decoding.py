"""Continue prompts token by token, on models of transformers, reading each prompt once.

Each different prompt of a batch is read once, whatever number of rows continue it (reading.py).
The rows then decode in step: the model's own code runs on one token a row, with the attention
function of attending.py. Rows that have ended leave the batch. What a model needs for that is in
serving.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.sampling import sample_by_noise
from roles.policy import serving
from roles.policy.attending import Prefix, Tails, attending
from roles.policy.reading import READ_AT_ONCE, Reader
from roles.policy.rows import Drawing, Drawn, Row, StopStrings
from store.records import Sampling


def cache_bytes(model: Any) -> int:
    """Of keys and values to hold at once, where nobody says how many."""
    if model.device.type != "cuda":
        return cache_beside(None, 0)  # of a Mac's GPU too, whose memory is the machine's
    # Of all memory and not of what is free now, which may be other after a restart.
    there = torch.cuda.get_device_properties(model.device).total_memory
    return cache_beside(there, model.get_memory_footprint())


def cache_beside(there: int | None, weights: int) -> int:
    """The same in numbers: there is a CUDA device's memory, None is of another one."""
    return 4 * 2**30 if there is None else max(1, int(there - weights) // 2)


class Decoder:
    """A model, ready to continue prompts, if it can be.

    read_at_once: tokens of prompts, padding included. unserved: why it cannot, or None.
    """

    def __init__(self, model: Any, *, read_at_once: int = READ_AT_ONCE) -> None:
        self._model = model
        self._reader = Reader(model, read_at_once)
        self._serving = serving.find(model, self._reader)
        self.unserved = self._serving.unserved
        self.bytes_per_token = self._serving.bytes_per_token

    def serves(self, tokens: int) -> bool:
        """Whether texts of so many tokens can be decoded: prompt and completion."""
        limit = self._serving.limit
        return self.unserved is None and (limit is None or tokens <= limit)

    def batches(self, rows: Sequence[Row], most: int, bytes_at_once: int) -> Iterator[list[int]]:
        """Places of rows that decode() takes together: whole prompts, in the order they come in,
        up to `most` rows and so many bytes of keys and values. One prompt is always taken."""
        places: dict[tuple[int, ...], list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(row.prompt, []).append(place)
        batch: list[int] = []
        prompts = width = room = 0
        for prompt, its_places in places.items():
            prompts, width = prompts + 1, max(width, len(prompt))
            room = max(room, *(rows[place].room for place in its_places))
            tokens = prompts * width + (len(batch) + len(its_places)) * room
            full = tokens * self.bytes_per_token > bytes_at_once
            if batch and (full or len(batch) + len(its_places) > most):
                yield batch
                batch, prompts, width = [], 1, len(prompt)
                room = max(rows[place].room for place in its_places)
            batch += its_places
        if batch:
            yield batch

    def decode(
        self,
        rows: Sequence[Row],
        sampling: Sampling,
        *,
        end_ids: Sequence[int],
        stops: StopStrings | None = None,
        most: int,
        bytes_at_once: int,
    ) -> list[Drawn]:
        """The rows' completions, in order; prompts are read once, then rows go `most` at a time.

        stops: of these rows, or None. Raises FloatingPointError for logits that are no numbers.
        """
        prompts = list(dict.fromkeys(row.prompt for row in rows))
        number = {prompt: group for group, prompt in enumerate(prompts)}
        groups_N = np.array([number[row.prompt] for row in rows])
        order = np.argsort(groups_N, kind="stable")
        room = max(row.room for row in rows)
        width = max(map(len, prompts))
        left = bytes_at_once - len(prompts) * width * self.bytes_per_token
        most = max(1, min(most, left // max(1, room * self.bytes_per_token)))
        longest = width + room
        # In a window, padding between a common beginning and the rest would count.
        share = all(window >= longest for window in self._serving.windows)
        drawn: dict[int, Drawn] = {}
        with torch.inference_mode():
            prefix = self._reader.read(prompts, share=share)
            for start in range(0, len(order), most):
                places = order[start : start + most].tolist()
                drawing = Drawing([rows[place] for place in places], end_ids, stops, places)
                its_own = prefix if len(places) == len(order) else prefix.copy()
                self._continue(its_own, groups_N[places], drawing, sampling)
                drawn.update(zip(places, drawing.drawn(), strict=True))
        return [drawn[place] for place in range(len(rows))]

    def _continue(
        self, prefix: Prefix, groups_M: NDArray[np.int64], drawing: Drawing, sampling: Sampling
    ) -> None:
        """Draw rows, which come prompt by prompt, to their ends; the prefix is used up."""
        device = self._model.device
        logits_MV = prefix.logits_GV[torch.from_numpy(groups_M).to(device)]
        tails = Tails(prefix, groups_M, drawing.room - 1)
        cache = tails.cache()
        at_M1 = torch.from_numpy(tails.lengths_N)[:, None].to(device) - 1
        last_M1 = at_M1 + torch.from_numpy(drawing.rooms_N)[:, None].to(device)
        with attending(self._model, tails.attend):
            while True:
                tokens_M, logps_M = sample_by_noise(
                    logits_MV,
                    None if sampling.temperature == 0 else drawing.noise(),
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k,
                )
                left = drawing.add(tokens_M, logps_M)
                if not left:
                    return
                kept = drawing.pack(left)
                if kept is not None:
                    tails.keep(kept)
                    rows = torch.from_numpy(kept).to(device)
                    tokens_M, at_M1, last_M1 = tokens_M[rows], at_M1[rows], last_M1[rows]
                # A row that has ended and is still here shall not run past the context.
                at_M1 = torch.minimum(at_M1 + 1, last_M1)
                tails.begin_step()
                logits_MV = self._reader.last_logits(tokens_M[:, None], at_M1, cache)

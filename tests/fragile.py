"""Scripted roles that misbehave: `how` they do, once for each file that they can still take away.

`left` is a folder with a file for each time that it shall happen, so that a process which is
started anew knows what came before it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import scripted
from judges import PointwiseJudge
from judges.base import Opinion
from scripted import ScriptedPolicy
from store.records import Checkpoint


class Strange(Exception):
    """One that does not survive a pickle."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} and {other}")


class Own(Exception):
    """One that only those know who loaded this file."""


def misbehave(how: str, left: str) -> None:
    files = sorted(Path(left).iterdir()) if left else []
    if not files:
        return
    try:
        files[0].unlink()
    except FileNotFoundError:  # of several processes another one misbehaves
        return
    match how:
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "aborted":
            print("something in C went wrong", flush=True)
            os.abort()
        case "silent":
            time.sleep(3600)
        case "memory":
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        case "strange":
            raise Strange("one", "other")
        case "own":
            raise Own("known there alone")
        case "warns":
            warnings.warn("a warning of somebody else's", stacklevel=1)


class Policy(ScriptedPolicy):
    def __init__(self, folder: Path, engine: Engine) -> None:
        super().__init__(folder)
        self.engine = engine

    def sample(self, *prompts: Any, **settings: Any) -> Any:
        if self.engine.batch_size > self.engine.fits:
            raise MemoryError(f"{self.engine.batch_size} at once")
        misbehave(self.engine.how, self.engine.left)
        return super().sample(*prompts, **settings)


class Engine(scripted.Engine):
    def __init__(
        self, how: str = "", left: str = "", batch_size: int = 8, fits: int = 1 << 30
    ) -> None:
        self.how, self.left, self.batch_size, self.fits = how, left, batch_size, fits

    def open(self, checkpoint: Checkpoint) -> ScriptedPolicy:
        return Policy(checkpoint.path, self)


class Exact(scripted.Exact):
    def __init__(self, how: str = "", left: str = "") -> None:
        super().__init__()
        self.how, self.left = how, left

    def judge(self, *groups: Any) -> Any:
        misbehave(self.how, self.left)
        return super().judge(*groups)


class Learner(scripted.Learner):
    def __init__(
        self,
        how: str = "",
        left: str = "",
        batch_size: int = 12,
        micro_batch_size: int | None = None,
        fits: int = 1 << 30,
    ) -> None:
        super().__init__()
        self.how, self.left, self.fits = how, left, fits
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size

    @property
    def rows_at_once(self) -> int:
        return self.micro_batch_size or self.batch_size

    def train(self, *examples: Any) -> Any:
        if self.rows_at_once > self.fits:
            raise MemoryError(f"{self.rows_at_once} at once")
        misbehave(self.how, self.left)
        return super().train(*examples)


class Sees(PointwiseJudge):
    """Says which devices there are for it."""

    def score(self, prompt: Any, completion: Any, policy: Any, call: Any) -> Opinion:
        right = completion.text == prompt.reference
        return Opinion(score=float(right), raw=os.environ.get("CUDA_VISIBLE_DEVICES", "all"))

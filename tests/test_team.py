"""Trainings of two processes beside those of one, on the CPU with gloo."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from roles.trainers.kto import Kto
from roles.trainers.options import Options
from roles.trainers.preference import Preference
from roles.trainers.reward import Reward
from roles.trainers.supervised import Supervised
from roles.trainers.team import dealt
from small_model import build, checkpoint, examples
from store.errors import UserError
from store.records import Call, Checkpoint, Example, Training

CALL = Call(seed=3, round=1, stage="train")
COUNT = 14
"""An epoch's last step has fewer micro-batches than the others."""
GIVEN = {"learning_rate": 1e-3, "batch_size": 8, "epochs": 2.0, "device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return replace(checkpoint(build(tmp_path_factory.mktemp("model") / "start")), id=1)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return replace(checkpoint(build(tmp_path_factory.mktemp("model") / "other", seed=5)), id=2)


def given(start: Checkpoint, trainer: Options, count: int = COUNT) -> list[Example]:
    found = examples(start.path, count, pairs=trainer.learns_from == "pair")
    if trainer.learns_from == "labelled":
        return [replace(each, kind="labelled", label=n % 3 > 0) for n, each in enumerate(found)]
    return [replace(each, weight=1.0 + n % 2) for n, each in enumerate(found)]


def train(
    trainer: Options,
    start: Checkpoint,
    into: Path,
    reference: Checkpoint | None = None,
    call: Call = CALL,
) -> Training:
    into.mkdir(exist_ok=True)
    made: Any = trainer
    return made.train(given(start, trainer), start, reference or start, into, call)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


KINDS = {
    "fused loss": lambda **more: Preference(**GIVEN, nll_weight=0.3, **more),
    "loss of TRL's": lambda **more: Preference(**GIVEN, loss=["ipo", "sigmoid"], **more),
    "imitation": lambda **more: Supervised(**GIVEN, **more),
    "held imitation": lambda **more: Supervised(**GIVEN, kl_weight=0.5, **more),
    "labelled": lambda **more: Kto(**GIVEN, **more),
    "reward model": lambda **more: Reward(**GIVEN, **more),
    "adapter": lambda **more: Preference(**GIVEN, lora_rank=4, **more),
    "adapter over 4 bits": lambda **more: Preference(
        **GIVEN, lora_rank=4, load_in_4bit=True, **more
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_take_the_steps_of_one(
    kind: str, start: Checkpoint, other: Checkpoint, tmp_path: Path
) -> None:
    reference = other if kind == "fused loss" else None
    alone, both = (
        train(KINDS[kind](micro_batch_size=2, processes=n), start, tmp_path / str(n), reference)
        for n in (1, 2)
    )
    assert len(both.steps) == 4
    assert both.status == alone.status == "trained"
    for first, second in zip(alone.steps, both.steps, strict=True):
        assert second.loss == pytest.approx(first.loss, rel=1e-4, abs=1e-6)
        assert second.metrics.keys() == first.metrics.keys()
        for name, value in first.metrics.items():
            assert second.metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    assert both.reference_logprobs.keys() == alone.reference_logprobs.keys()
    for example, found in alone.reference_logprobs.items():
        assert both.reference_logprobs[example] == pytest.approx(found, abs=1e-3)
    before = weights(start.path)
    ours, theirs = weights(tmp_path / "2"), weights(tmp_path / "1")
    moved = 0.0
    for name, theirs_own in theirs.items():
        assert torch.allclose(ours[name], theirs_own, rtol=0, atol=2e-5), name
        if name in before:
            moved = max(moved, (before[name] - theirs_own).abs().max().item())
    assert moved > 1e-3 or kind in ("adapter", "adapter over 4 bits", "reward model")
    assert sorted(each.name for each in (tmp_path / "2").iterdir()) == sorted(
        each.name for each in (tmp_path / "1").iterdir()
    )


def test_without_micro_batches_each_process_has_its_share(
    start: Checkpoint, tmp_path: Path
) -> None:
    assert Supervised(**GIVEN, processes=2).rows_at_once == 4
    whole = train(Supervised(**GIVEN), start, tmp_path / "1")
    shared = train(Supervised(**GIVEN, processes=2), start, tmp_path / "2")
    for first, second in zip(whole.steps, shared.steps, strict=True):
        assert second.loss == pytest.approx(first.loss, rel=1e-4)
    with pytest.raises(UserError, match=r"batch_size 8 is not a multiple of micro_batch_size 3"):
        Supervised(**GIVEN, processes=3)
    with pytest.raises(UserError, match="sorts all pairs of a step"):
        Preference(**GIVEN, loss="aot", processes=2)


def test_a_training_that_is_asked_to_stop_saves_and_goes_on_with_fewer(
    start: Checkpoint, tmp_path: Path
) -> None:
    undisturbed = train(Supervised(**GIVEN, micro_batch_size=2), start, tmp_path / "whole")
    steps: list[int] = []
    stopped = replace(
        CALL, progress=lambda step, _: steps.append(step), stopping=lambda: len(steps) >= 2
    )
    into = tmp_path / "into"
    with pytest.raises(KeyboardInterrupt):
        train(Supervised(**GIVEN, micro_batch_size=2, processes=2), start, into, call=stopped)
    assert [each.name for each in (into / "saves").glob("checkpoint-*")] == ["checkpoint-2"]
    gone_on = train(Supervised(**GIVEN, micro_batch_size=2), start, into)
    assert [each.step for each in gone_on.steps] == [1, 2, 3, 4]
    for first, second in zip(undisturbed.steps, gone_on.steps, strict=True):
        assert second.loss == pytest.approx(first.loss, rel=1e-4)
    ours, theirs = weights(into), weights(tmp_path / "whole")
    for name, theirs_own in theirs.items():
        assert torch.allclose(ours[name], theirs_own, rtol=0, atol=2e-5), name


def members() -> list[psutil.Process]:
    return [
        each
        for each in psutil.Process().children(recursive=True)
        if "roles.trainers.team" in each.cmdline()
    ]


def test_one_that_is_killed_ends_the_training_with_how(start: Checkpoint, tmp_path: Path) -> None:
    killed: list[int] = []

    def progress(step: int, _: int) -> None:
        if step == 1:
            (member,) = members()
            os.kill(member.pid, signal.SIGKILL)
            killed.append(member.pid)

    trainer = Supervised(**GIVEN, micro_batch_size=2, processes=2, save_every_s=0.0)
    with pytest.raises(ChildProcessError, match=r"process 1 of those .* ended by signal 9"):
        train(trainer, start, tmp_path / "into", call=replace(CALL, progress=progress))
    assert killed
    assert members() == []
    assert not torch.distributed.is_initialized()
    after = train(trainer, start, tmp_path / "into")
    assert [each.step for each in after.steps] == [1, 2, 3, 4]


def test_one_that_is_killed_before_it_joins_is_not_waited_for(
    start: Checkpoint, tmp_path: Path
) -> None:
    def kill() -> None:
        while not (there := members()):
            time.sleep(0.01)
        there[0].kill()

    aside = threading.Thread(target=kill)
    aside.start()
    with pytest.raises(ChildProcessError, match=r"process 1 of those .* ended by signal 9"):
        train(Supervised(**GIVEN, micro_batch_size=2, processes=2), start, tmp_path / "into")
    aside.join()
    assert members() == []


def test_what_one_lacks_all_are_told(start: Checkpoint, tmp_path: Path) -> None:
    bad = Preference(**{**GIVEN, "learning_rate": 1e30}, micro_batch_size=2, processes=2)
    made = train(bad, start, tmp_path / "into")
    assert made.status == "diverged"
    assert members() == []


def test_shares_are_put_in_the_order_of_the_whole() -> None:
    assert dealt([[0, 2, 4], [1, 3]]) == [0, 1, 2, 3, 4]
    assert dealt([["a"]]) == ["a"]

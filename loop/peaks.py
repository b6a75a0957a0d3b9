"""What each stage of a run has in memory at most, told from its configuration before it begins.

How long prompts are is not known before they are asked, so that is assumed and said. One policy at
most is in memory, and none while training; a judge that brings a model of its own holds it beside
the policy that wrote.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from loop import fitting, space
from loop.report import Table
from loop.screen import columns, line, put
from loop.settings import Config, Model, Role
from roles import footprint
from roles.footprint import Device, Footprint, Lengths
from roles.policy import devices, embedded, shape
from roles.policy.shape import Shape
from roles.policy.vllm import VllmEngine
from roles.trainers.options import Options
from store import checkpoints
from store.errors import UserError
from store.records import Sampling

PROMPT = 512
"""Tokens of a prompt where nobody says how many, or a quarter of the context."""
JUDGING = 512
"""Tokens of what a judge's question holds beside the prompt and an answer."""
READ_BY_REWARD_MODEL = 16384
"""Tokens that one reads at once (judges/reward_model.py, batch_tokens)."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PARTS = ("weights", "cache", "optimizer", "gradients", "activations")


def here(gpu_gib: float | None = None) -> Device:
    """The device that `auto` is on this machine; told of a GPU, one that has so much memory and
    computes in bfloat16, whether it is here or not."""
    if gpu_gib is not None:
        return Device("cuda", int(gpu_gib * 2**30), bfloat16=True)
    found = devices.find("auto")
    if found.type == "cuda":
        import torch

        there = torch.cuda.get_device_properties(found).total_memory
        return Device("cuda", there, devices.prefers_bfloat16(found))
    return Device("mps" if found.type == "mps" else "cpu", ram())


def ram() -> int:
    """Of this machine, or of the container that this process is in: what it may use."""
    there = int(psutil.virtual_memory().total)
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            told = Path(file).read_text().strip()
        except OSError:
            continue
        return min(there, int(told)) if told.isdecimal() else there
    return there


def peaks(
    config: Config,
    roles: Mapping[int, Any],
    device: Device,
    prompt: int | None = None,
    shapes: Mapping[str, Shape] | None = None,
) -> Table:
    """{device, bytes, spare_bytes, assumed, stages [{stage, model, and in bytes weights, cache,
    optimizer, gradients, activations, peak; fits, less}]}.

    prompt: tokens of the longest one; None is assumed. roles: what load_roles made of `config`.
    shapes: of the run's models, where they are known. A stage of a part that does not say what it
    does has None in place of numbers. fits: whether `peak` is within what the device has to spare.
    less: settings with which a stage that does not fit would.
    """
    planned = _Planned(config, roles, device, prompt, {**(shapes or {})})
    largest: dict[tuple[str, str], Table] = {}
    for each in planned.stages():
        key = each["stage"], each["model"]
        if key not in largest or (each["peak"] or 0) > (largest[key]["peak"] or 0):
            largest[key] = each
    order = ("generate", "judge", "train", "evaluate")
    lengths = planned.assumed
    return {
        "device": device.kind,
        "bytes": device.bytes,
        "assumed": f"prompts of {' or '.join(map(str, sorted(lengths)))} tokens at most, answers "
        "as long as they may be"
        + (f", judges' questions {JUDGING} tokens longer" if planned.questions else ""),
        "stages": sorted(largest.values(), key=lambda each: order.index(each["stage"])),
    }


@dataclass
class _Planned:
    config: Config
    roles: Mapping[int, Any]
    device: Device
    prompt: int | None
    shapes: dict[str, Shape | None]
    questions: bool = False
    """Whether a local model is asked a judge's question."""

    def __post_init__(self) -> None:
        self.assumed: set[int] = set()

    def stages(self) -> Iterator[Table]:
        config = self.config
        tracks = [*config.tracks(0).values(), *config.track.values()]
        for track in tracks:
            if track.generator.use not in ("demonstrations", "recorded"):
                generator = self.roles[id(track.generator)]
                yield self._sampled(
                    "generate", track.asks, _sampling(generator), getattr(generator, "n", None)
                )
            yield from self._judged(track.judge, track.model, track.asks, self._answers(track))
        for name in config.models:
            for number in (0, 1):
                if number or config.tracks(0):
                    yield self._trained(number, name)
        evaluate = config.evaluate
        for name, model in config.models.items():
            if getattr(self.roles[id(model.trainer)], "makes", "policy") != "policy":
                continue
            asked = [(evaluate.max_tokens, evaluate.samples)]
            asked += [(suite.max_tokens, 1) for suite in evaluate.suite.values()]
            for tokens, answers in asked:
                yield self._sampled("evaluate", name, Sampling(max_tokens=tokens), answers)
            for role in (evaluate.judge, *(suite.judge for suite in evaluate.suite.values())):
                for each in self._judged(role, name, name, evaluate.samples):
                    yield each | {"stage": "evaluate"}

    # One stage

    def _sampled(
        self,
        stage: str,
        name: str,
        sampling: Sampling | None,
        answers: int | None,
        *,
        path: str | None = None,
        question: int | None = None,
        prompts: int | None = None,
    ) -> Table:
        """question: tokens of what is asked, where that is more than a prompt."""
        model, engine = self._engine(name)
        batch_size = getattr(engine, "batch_size", None)
        size = self._shape(name) if path is None else _read(path)
        if size is None or sampling is None:
            return _row(stage, path or name, None)
        if isinstance(engine, VllmEngine):
            lengths = self._lengths(size, sampling.max_tokens, question)
            return self._by_vllm(stage, name, path, size, lengths)
        if not isinstance(answers, int) or not isinstance(batch_size, int):
            return _row(stage, path or name, None)
        count, lengths = answers, self._lengths(size, sampling.max_tokens, question)
        device = self._on(engine)

        def found(engine: Any) -> Footprint:
            return footprint.sampling(
                size,
                self._weight_bytes(model, engine, size, frozen=path is not None),
                device,
                lengths,
                prompts=prompts or self.config.batch_prompts,
                answers=count,
                batch_size=engine.batch_size,
                cache_gib=getattr(engine, "cache_gib", None),
                adapter=0 if path else self._adapter(model, size),
            )

        return self._of_engine(stage, path or name, engine, found, fitting.SPARE)

    def _by_vllm(
        self, stage: str, name: str, path: str | None, size: Shape, lengths: Lengths
    ) -> Table:
        model, engine = self._engine(name)
        if engine.url is not None:  # it is somebody else's, and may be anywhere
            return _row(stage, path or name, None)
        device = self._on(engine)
        shares = device.kind == "cuda" and engine.cache_gib is None

        def found(engine: VllmEngine) -> Footprint:
            return footprint.by_vllm(
                size,
                self._weight_bytes(model, engine, size, frozen=path is not None),
                device,
                lengths,
                share=engine.gpu_memory,
                cache_gib=engine.cache_gib,
                split=engine.tensor_parallel,
                adapter=0 if path else self._adapter(model, size),
            )

        share = engine.gpu_memory if shares else fitting.SPARE
        return self._of_engine(stage, path or name, engine, found, share)

    def _of_engine(
        self,
        stage: str,
        model: str,
        engine: Any,
        found: Callable[[Any], Footprint],
        share: float,
    ) -> Table:
        """share: of the device's memory, that tensors may take."""
        device = self._on(engine)
        table = self._told(stage, model, found(engine), device, share)
        if table["fits"] is False:
            table["less"] = fitting.smaller_sampling(engine, found, device)
        return table

    def _judged(self, role: Role, model: str, writer: str, answers: int) -> Iterator[Table]:
        """Of the models that the judge asks, where they are local, and of those that it brings."""
        judge, wrote = self.roles[id(role)], self._shape(writer)
        if wrote is None:
            return
        asked = (role.model, *getattr(judge, "models", ()))
        for each in dict.fromkeys(name for name in asked if name is not None):
            kind, _, of = each.partition(":")
            if kind == "server":
                continue
            path = of if kind == "checkpoint" and of not in ("", "base") else None
            name = of if kind in ("model", "base") else model
            if getattr(judge, "needs_tokens", False):
                yield self._scored(name, path)
                continue
            self.questions = True
            shown = self._lengths(wrote, self._longest(writer), None)
            yield self._sampled(
                "judge",
                next(iter(self.config.models)) if path else name,
                Sampling(max_tokens=getattr(judge, "max_tokens", 256)),
                getattr(judge, "votes", 1),
                path=path,
                question=shown.both + JUDGING,
                prompts=self.config.batch_prompts * answers,
            )
        for own in _own(judge):
            if (size := _read(own.folder)) is None:
                continue
            device = self._on(own)
            weight = 4 if device.kind == "cpu" else size.stored_bytes
            scored = footprint.scoring(size, weight, device, tokens=READ_BY_REWARD_MODEL)
            beside = self._weight_bytes(*self._engine(writer), wrote)
            policy = beside * wrote.parameters
            both = replace(scored, weights=scored.weights + policy, peak=scored.peak + policy)
            yield self._told("judge", str(own.folder), both, device)

    def _scored(self, name: str, path: str | None) -> Table:
        model_name = next(iter(self.config.models)) if path else name
        model, engine = self._engine(model_name)
        size = self._shape(name) if path is None else _read(path)
        if size is None:
            return _row("judge", path or name, None)
        if isinstance(engine, VllmEngine):
            lengths = self._lengths(size, self._longest(model_name), None)
            return self._by_vllm("judge", model_name, path, size, lengths)
        device = self._on(engine)
        weight = self._weight_bytes(model, engine, size, frozen=path is not None)
        return self._told("judge", path or name, footprint.scoring(size, weight, device), device)

    def _trained(self, number: int, name: str) -> Table:
        trainer = self.roles[id(self.config.trainer(number, name))]
        size, device = self._shape(name), self._on(trainer)
        if size is None or not isinstance(trainer, Options):
            return _row("train", name, None)
        lengths = self._lengths(size, self._longest(name), None)
        sides = 2 if trainer.learns_from == "pair" else 1
        held = trainer.learns_from != "demonstration" or getattr(trainer, "kl_weight", 0) > 0

        def found(options: Options) -> Footprint:
            return footprint.training(
                size,
                options,
                device,
                lengths,
                sides=sides,
                scores=held and options.makes == "policy",
            )

        table = self._told("train", name, found(trainer), device)
        if table["fits"] is False:
            table["less"] = fitting.smaller_training(trainer, found, device)
        return table

    def _told(
        self,
        stage: str,
        model: str,
        found: Footprint,
        device: Device,
        share: float = fitting.SPARE,
    ) -> Table:
        table = _row(stage, model, found)
        if device.bytes is not None:
            table["fits"] = fitting.fits(found, device, share)
        return table

    # What it needs

    def _engine(self, name: str) -> tuple[Model, Any]:
        model = self.config.models[name]
        return model, self.roles[id(model.engine)]

    def _on(self, part: Any) -> Device:
        """The device that a part names; `auto` is the one that is planned for.

        Of a part of the user's own, `device` may mean something else.
        """
        named = getattr(part, "device", getattr(part, "_device", "auto"))
        if getattr(named, "type", named) == "cpu" and self.device.kind != "cpu":
            return self._cpu
        return self.device

    @cached_property
    def _cpu(self) -> Device:
        return Device("cpu", ram())

    def _shape(self, name: str) -> Shape | None:
        """None where no model of transformers can be made of it: it is of another engine."""
        if name not in self.shapes:
            self.shapes[name] = _read(self.config.models[name].path)
        return self.shapes[name]

    def _adapter(self, model: Model, size: Shape) -> int:
        trainer = self.roles[id(model.trainer)]
        rank = getattr(trainer, "lora_rank", None)
        return 0 if rank is None else size.adapter(rank, trainer.lora_targets)

    def _weight_bytes(self, model: Model, engine: Any, size: Shape, *, frozen: bool = False) -> int:
        """Of a weight while a checkpoint of the model is sampled. What was trained is stored in
        float32, and `auto` takes it as it is stored."""
        asked = getattr(engine, "dtype", "auto")
        if asked in BYTES:
            return BYTES[asked]
        if self._on(engine).kind == "cpu":
            return 4
        trainer = self.roles[id(model.trainer)]
        adapts = getattr(trainer, "lora_rank", None) is not None and not model.fresh_adapter
        if isinstance(engine, VllmEngine):
            return 2  # which has bfloat16 for float32
        as_it_came = frozen or adapts or getattr(trainer, "save_dtype", "float32") == "start"
        return size.stored_bytes if as_it_came else 4

    def _longest(self, name: str) -> int:
        """Tokens of the longest answer that a model learns from or is judged by."""
        tracks = [*self.config.track.values(), *self.config.tracks(0).values()]
        made = (
            _sampling(self.roles[id(track.generator)])
            for track in tracks
            if name in (track.model, track.asks)
        )
        known = [each.max_tokens for each in made if each is not None]
        return max(known, default=self.config.evaluate.max_tokens)

    def _answers(self, track: Any) -> int:
        count = getattr(self.roles[id(track.generator)], "n", None)
        return count if isinstance(count, int) else 1

    def _lengths(self, size: Shape, answer: int, question: int | None) -> Lengths:
        """Within the context."""
        prompt = self.prompt or PROMPT
        if size.context is not None:
            prompt = prompt if self.prompt else min(prompt, size.context // 4)
            prompt = max(1, min(prompt, size.context - 1))
        if question is None:
            self.assumed.add(prompt)
        asked = question or prompt
        if size.context is None:
            return Lengths(asked, answer)
        asked = min(asked, size.context - 1)
        return Lengths(asked, min(answer, size.context - asked))


def _read(path: str | Path) -> Shape | None:
    if path == "embedded":
        return shape.of(embedded.configuration())
    try:
        return shape.read(checkpoints.locate(str(path), weights=False))
    except UserError:
        return None


def _sampling(generator: Any) -> Sampling | None:
    """The longest that a generator asks for, as far as it says."""
    parts = [_sampling(part) for part in getattr(generator, "parts", ())]
    own = [getattr(generator, name, None) for name in ("sampling", "answering")]
    known = [each for each in (*parts, *own) if isinstance(each, Sampling)]
    return max(known, key=lambda each: each.max_tokens, default=None)


def _own(judge: Any) -> Iterator[Any]:
    """The models that a judge loads itself, and those that its members do."""
    if getattr(judge, "own", None) is not None:
        yield judge.own
    for each in getattr(judge, "members", ()):
        yield from _own(getattr(each, "judge", None))


def _row(stage: str, model: str, found: Footprint | None) -> Table:
    numbers = dict.fromkeys((*PARTS, "peak")) if found is None else dataclasses.asdict(found)
    return {"stage": stage, "model": model, **numbers, "fits": None, "less": None}


def view(console: Console, found: Table) -> None:
    there = "" if found["bytes"] is None else f" of {space.shown(found['bytes'])}"
    line(console, f"memory at most on {found['device']}{there}, by stage:")
    names = ("weights", "keys, values", "optimizer", "gradients", "activations", "at once")
    grid = columns("stage", "model", *names, right=range(2, 8))
    for each in found["stages"]:
        sizes = (each[part] for part in (*PARTS, "peak"))
        cells = ["not known" if size is None else space.shown(size) for size in sizes]
        grid.add_row(each["stage"], each["model"], *cells)
    put(console, grid)
    line(console, f"  assumed: {found['assumed']}; Python and its libraries come on top")
    for each in found["stages"]:
        if each["fits"] is False:
            line(console, f"  {unfit(found, each)}")


def unfit(found: Table, stage: Table) -> str:
    """That a stage does not fit, and what would make it."""
    sets = stage["less"] or []
    would = "".join(f" --set {each}" for each in sets)
    help = f"; with{would} it would" if sets else ""
    return (
        f"{stage['stage']} of {stage['model']} takes {space.shown(stage['peak'])}, and "
        f"{found['device']} has {space.shown(found['bytes'])}, of which a tenth is for the rest"
        f"{help}"
    )

"""Sample and score a checkpoint with vLLM: in this process, or through a server.

vLLM is given token ids and gives token ids back; text is made of them here, by the checkpoint's own
tokenizer and chat template. Before anything is drawn from a checkpoint it is proven that vLLM has
that checkpoint: its folder is what the store recorded, the numbers that vLLM computes with are
those of the folder, and a chat becomes the tokens that it becomes here.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

import torch
from pydantic import Field

from roles import footprint
from roles.policy import adapters, fingerprint, vllm_version
from roles.policy.rows import Drawn, Ids, Row
from roles.policy.text import TextPolicy
from store import checkpoints
from store.errors import UserError
from store.records import Checkpoint, Message, Prompt, Sampling

Found = TypeVar("Found")
WORKER = "roles.policy.vllm_worker.Worker"
_QUESTION = "Why?  1234567890 éßø 漢字 🙂\n\tIs <b>it</b> {{so}}, don't \\you 'think'?"
PROBE = (
    Message(role="user", content=_QUESTION),
    Message(role="assistant", content="It is."),
    Message(role="user", content=_QUESTION),
)
"""A chat with something in it that tokenizers disagree on, and more turns than one."""
RAW = "raw_logprobs"
"""Before temperature and truncation, as the other engine tells them."""
TRIES = 3
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Of adapters, that vLLM makes room for."""
_VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}


class Gone(Exception):
    """vLLM has ended, or cannot be reached: its work can be done again by another."""


class Running(Protocol):
    """A vLLM that holds a model. Its methods raise UserError where asking again changes nothing,
    and Gone where another vLLM would do it."""

    @property
    def context(self) -> int:
        """Tokens that it takes of a text at most, prompt and answer."""
        ...

    def draw(
        self, rows: Sequence[Row], sampling: Sampling, end_ids: Ids, adapter: Checkpoint | None
    ) -> list[Drawn]:
        """What is drawn of the rows, in order, each with noise of its own seed."""
        ...

    def score(self, texts: Sequence[Ids]) -> list[list[float]]:
        """Of each text by the whole weights: log p of each token but the first, in nats."""
        ...

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """What a chat becomes by vLLM's own tokenizer and chat template."""
        ...

    def add(self, adapter: Checkpoint) -> None:
        """Read an adapter, in the place of one that is there."""
        ...

    def ask(self, method: str) -> list[Any]:
        """What each worker answers to a method of fingerprint.Worker."""
        ...

    def reload(self, folder: Path) -> None:
        """Read other weights of the same shapes in place of those that are there."""
        ...

    def sleep(self) -> None:
        """Give back what memory it holds. The next call is reload()."""
        ...

    def asleep(self) -> bool: ...

    def close(self) -> None:
        """End it. All its memory has returned."""
        ...


class VllmEngine:
    """Samples with vLLM, on the GPUs that this process sees, or on a CPU with vLLM's build for it.

    url: of a server that runs already, on this machine or on one that has the same files; None is
    a vLLM of this process' own. key_env: the environment variable with the key that it wants.
    serve: a vLLM of our own is a server as well, `vllm serve` on 127.0.0.1.
    dtype: "auto" is that of the stored weights, except that float32 is bfloat16 on a GPU.
    tensor_parallel: GPUs that one model is spread over.
    context: tokens of a text at most, prompt and answer; None is what the model says.
    gpu_memory: share of each GPU's memory that vLLM takes. cache_gib: of keys and values; None is
    what is left of gpu_memory, and of a CPU 4.
    sleep: while other models compute, vLLM gives its GPU memory back and stays up, where else it
    is ended.
    concurrency: of calls to a server. timeout_s: of a call, and of a server's start.
    extra: other arguments of vLLM's, by their names in Python, in place of ours where they meet.
    """

    writes_by_template = True

    def __init__(
        self,
        url: str | None = None,
        key_env: str | None = None,
        serve: bool = False,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        tensor_parallel: Annotated[int, Field(ge=1)] = 1,
        context: Annotated[int, Field(ge=2)] | None = None,
        gpu_memory: Annotated[float, Field(gt=0, le=1)] = 0.9,
        cache_gib: Annotated[float, Field(gt=0)] | None = None,
        sleep: bool = False,
        concurrency: Annotated[int, Field(ge=1)] = 256,
        timeout_s: Annotated[float, Field(gt=0)] = 1800.0,
        extra: dict[str, Any] = {},  # noqa: B006  (it is only read)
    ) -> None:
        if url is not None and serve:
            raise UserError("an engine has a url, of a server that runs, or serve=true, not both")
        vllm_version.check(elsewhere=url is not None)
        self.url, self.key_env, self.serve, self.dtype = url, key_env, serve, dtype
        self.tensor_parallel, self.context = tensor_parallel, context
        self.gpu_memory, self.cache_gib, self.sleep = gpu_memory, cache_gib, sleep
        self.concurrency, self.timeout_s, self.extra = concurrency, timeout_s, dict(extra)
        self._running: Running | None = None
        self._asleep = False
        self._begun: Checkpoint | None = None
        """Whose configuration and tokenizer vLLM was started with."""
        self._proven: set[str] = set()
        """Digests of the checkpoints that vLLM is proven to have."""
        self._whole: Path | None = None
        """The folder of the whole weights that it is proven to have."""
        self._reloads = False
        """Whether it takes other weights in place. On a CPU, where layers have copies of theirs, it
        does not change all of them."""

    def open(self, checkpoint: Checkpoint) -> VllmPolicy:
        """The checkpoint as a policy. vLLM reads it when something is first asked of it."""
        if not checkpoint.path.is_dir():
            raise UserError(f"no folder {str(checkpoint.path)!r} to open a checkpoint from")
        if checkpoints.is_reward_model(checkpoint.path):
            raise UserError(
                f"{checkpoint.path} is a reward model, which vLLM is not asked to run here; "
                'right is engine.use = "transformers" for that model'
            )
        return VllmPolicy(checkpoint, self)

    # For the policies

    def ready(self, policy: VllmPolicy) -> Running:
        """vLLM with the policy's checkpoint in it, which is proven."""
        checkpoint = policy.checkpoint
        if policy.checked and checkpoint.digest in self._proven and not self._asleep:
            assert self._running is not None  # what ends it forgets what was proven
            return self._running
        checkpoints.check(checkpoint)
        whole = adapters.base_path(checkpoint)
        try:
            running = self._with_weights(checkpoint, whole)
            if running.chat_ids(PROBE) != policy.probe_ids:
                raise UserError(
                    f"vLLM does not write a chat as {checkpoint.path} does: its tokenizer or chat "
                    "template is another; nothing was sampled with it"
                )
            if checkpoint.kind == "adapter":
                self._proven = set()
                running.add(checkpoint)
                of_workers = zip(*running.ask("ratchet_adapters"), strict=True)
                _prove(of_workers, checkpoint.path, fingerprint.of_adapter)
            if running.context < (policy.positions or 0):
                raise UserError(
                    f"vLLM takes {running.context} tokens of a text, and {checkpoint.path} has "
                    f"room for {policy.positions}; right is engine.context = {running.context}"
                )
        except BaseException:
            self.end()
            raise
        self._proven.add(checkpoint.digest)
        policy.checked = True
        return running

    def rest(self) -> None:
        """Give back what memory vLLM holds, for other models to compute in."""
        if self._running is None:
            return
        if self.sleep and not self._asleep:
            try:
                self._running.sleep()
            except Gone:
                self.end()
            else:
                self._asleep, self._whole, self._proven = True, None, set()
        elif not self.sleep:
            self.end()

    def end(self) -> None:
        """End vLLM, if it runs."""
        running, self._running = self._running, None
        self._asleep, self._begun, self._whole, self._proven = False, None, None, set()
        if running is not None:
            running.close()

    def _with_weights(self, checkpoint: Checkpoint, whole: Path) -> Running:
        """vLLM with these whole weights: as it is, with them in place of others, or begun anew."""
        if self._running is not None and not self._goes_on(checkpoint):
            self.end()
        if self._running is None:
            self._running = self._start(checkpoint, whole)
            self._begun, self._whole = checkpoint, None
            if self.url is not None:
                self._given(self._running, whole)
        elif self._asleep or self._whole != whole:
            self._proven, self._whole = set(), None
            self._running.reload(whole)
        if self._whole is None:
            workers = self._running.ask("ratchet_weights")
            _prove([workers], whole, fingerprint.of_folder)
            if (mode := workers[0]["logprobs"]) != RAW:
                raise UserError(f"this vLLM tells {mode}; right is: --logprobs-mode {RAW}")
            self._whole, self._reloads = whole, workers[0]["device"] != "cpu"
        self._asleep = False
        return self._running

    def _given(self, server: Running, whole: Path) -> None:
        """Give a server of somebody else's the weights, unless it has them."""
        if not server.asleep():
            workers = server.ask("ratchet_weights")
            if _unlike([workers], whole, fingerprint.of_folder) is None:
                return
            if workers[0]["device"] == "cpu":
                raise UserError(
                    f"the vLLM at {self.url} has other weights than those in {whole}, and on a CPU "
                    "they cannot be replaced; start it with that folder, or right is "
                    "engine.serve = true, without engine.url"
                )
        server.reload(whole)

    def _goes_on(self, checkpoint: Checkpoint) -> bool:
        """Whether a vLLM that runs can take the checkpoint without being begun anew."""
        begun = self._begun
        assert begun is not None
        if self._whole != adapters.base_path(checkpoint) and not self._reloads:
            return False
        return (
            _shape(adapters.base_path(begun)) == _shape(adapters.base_path(checkpoint))
            and begun.tokenizer_digest == checkpoint.tokenizer_digest
            and begun.template_digest == checkpoint.template_digest
            # With room for adapters it scores no texts, of whole weights neither.
            and begun.kind == checkpoint.kind
            and _rank(begun) >= _rank(checkpoint)
        )

    def _start(self, checkpoint: Checkpoint, whole: Path) -> Running:
        if self.url is None and self.cache_gib is None:
            # Which only a CPU's reads.
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(footprint.VLLM_CPU_CACHE_GIB))
        if self.url is None and not self.serve:
            from roles.policy.vllm_offline import Offline

            return Offline(self.arguments(checkpoint, whole), checkpoint.path)
        from roles.policy.vllm_server import Served, Started

        if self.url is None:
            arguments = self.arguments(checkpoint, whole)
            return Started(arguments, self.concurrency, self.timeout_s)
        key = os.environ.get(self.key_env, "") if self.key_env is not None else ""
        if self.key_env is not None and not key:
            raise UserError(
                f"the key of {self.url} is to be in the environment variable {self.key_env!r}, "
                "which is not set"
            )
        return Served(self.url, self.concurrency, self.timeout_s, key)

    def arguments(self, checkpoint: Checkpoint, whole: Path) -> dict[str, Any]:
        """What vLLM is told, by the names that its arguments have in Python."""
        table: dict[str, Any] = {
            "model": str(whole),
            "tokenizer": str(checkpoint.path),
            "dtype": self.dtype,
            "tensor_parallel_size": self.tensor_parallel,
            "gpu_memory_utilization": self.gpu_memory,
            "enable_prefix_caching": True,
            "generation_config": "vllm",  # else the folder's own would change what is sampled
            "seed": 0,
            "logprobs_mode": RAW,
            "worker_extension_cls": WORKER,
        }
        if not torch.cuda.is_available():
            # A prompt that is read in parts draws too early, and a CPU cannot take that back.
            table["enable_chunked_prefill"] = False
        if self.context is not None:
            table["max_model_len"] = self.context
        if self.cache_gib is not None:
            table["kv_cache_memory_bytes"] = int(self.cache_gib * 2**30)
        if self.sleep:
            table["enable_sleep_mode"] = True
        if checkpoint.kind == "adapter":
            rank = min((each for each in RANKS if each >= _rank(checkpoint)), default=RANKS[-1])
            table |= {"enable_lora": True, "max_lora_rank": rank}
        return table | self.extra


class VllmPolicy(TextPolicy):
    """One checkpoint, ready to sample and to score."""

    def __init__(self, checkpoint: Checkpoint, engine: VllmEngine) -> None:
        super().__init__(checkpoint)
        self._engine = engine
        self.checked = False
        """Whether its folder, of which it reads tokenizer and template, is as it was stored."""

    @property
    def checkpoint(self) -> Checkpoint:
        return self._checkpoint

    @cached_property
    def probe_ids(self) -> list[int]:
        """What PROBE becomes."""
        return self.prompt_ids(Prompt(messages=PROBE))

    @property
    def positions(self) -> int | None:
        """How many tokens of a text the loop may ask for; None when nothing says."""
        return self._positions

    def close(self) -> None:
        """vLLM goes on to the checkpoint that is opened next, or is given a rest."""

    def _draw(self, rows: Sequence[Row], sampling: Sampling) -> list[Drawn]:
        if not rows:
            return []
        return self._asked(lambda vllm: vllm.draw(rows, sampling, self._end_ids, self._adapter))

    def _score(
        self, starts: Sequence[Ids], answers: Sequence[Ids], dropout_seed: int | None
    ) -> list[list[float]]:
        if dropout_seed is not None:
            raise UserError(
                "vLLM has no dropout to score with; right is a judge without it, or "
                'engine.use = "transformers"'
            )
        if self._adapter is not None:
            raise UserError(
                f"vLLM scores no texts with an adapter, as {self._checkpoint.path} is (its "
                'log-probabilities of prompts leave it out); right is engine.use = "transformers"'
            )
        texts = {(*start, *answer): None for start, answer in zip(starts, answers, strict=True)}
        scored = self._asked(lambda vllm: vllm.score(list(texts)))
        found = dict(zip(texts, scored, strict=True))
        return [
            found[*start, *answer][len(start) - 1 :] if answer else []
            for start, answer in zip(starts, answers, strict=True)
        ]

    def _asked(self, ask: Callable[[Running], Found]) -> Found:
        """Asked anew of another vLLM where one has ended: equal seeds give equal answers."""
        for tried in range(1, TRIES + 1):
            try:
                return ask(self._engine.ready(self))
            except Gone as error:
                self._engine.end()
                if tried == TRIES:
                    raise UserError(f"{error}; vLLM was begun anew {TRIES - 1} times") from None
                warnings.warn(f"{error}; it is begun anew, and asked again", stacklevel=1)
        raise AssertionError("it answers or is given up")

    @property
    def _adapter(self) -> Checkpoint | None:
        return self._checkpoint if self._checkpoint.kind == "adapter" else None

    @cached_property
    def _positions(self) -> int | None:
        """One less than there are: to score a text vLLM wants room for a token behind it."""
        known = [each for each in (super()._positions, self._engine.context) if each is not None]
        return min(known) - 1 if known else None


def _prove(
    there: Iterable[Sequence[dict[str, Any]]],
    path: Path,
    expected: Callable[[Path, torch.dtype], int],
) -> None:
    """Raises UserError unless what lies in the folder is there: one of what the workers have."""
    if (said := _unlike(there, path, expected)) is not None:
        raise UserError(
            f"vLLM computes with other weights than those in {path} (fingerprint: {said}); nothing "
            "was sampled with them"
        )


def _unlike(
    there: Iterable[Sequence[dict[str, Any]]],
    path: Path,
    expected: Callable[[Path, torch.dtype], int],
) -> str | None:
    """In what the workers' fingerprints differ from that of the folder; None: one is the same."""
    said = "none"
    for workers in there:
        wanted = expected(path, getattr(torch, workers[0]["dtype"]))
        found = fingerprint.joined([each["weights"] for each in workers])
        if found == wanted:
            return None
        said = f"{found:016x}, and {wanted:016x} is right"
    return said


def _shape(folder: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {key: value for key, value in table.items() if key not in _VOLATILE}


def _rank(checkpoint: Checkpoint) -> int:
    """Of an adapter; 0 of whole weights."""
    return int(adapters.settings(checkpoint)["r"]) if checkpoint.kind == "adapter" else 0

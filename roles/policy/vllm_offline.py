"""vLLM in this process: its `LLM`, whose model is in a process of vLLM's own."""

from __future__ import annotations

import gc
import os
import signal
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import InvalidStateError
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from roles.policy import devices, vllm_worker
from roles.policy.rows import Drawn, Ids, Row
from roles.policy.vllm import Gone
from store.errors import UserError
from store.records import Checkpoint, Message, Sampling

GONE_S = 60.0
"""What vLLM's processes are given to end."""


class Offline:
    """See vllm.Running.

    arguments: of vLLM's, by their names in Python. folder: of the checkpoint, for what is said.
    """

    def __init__(self, arguments: dict[str, Any], folder: Path) -> None:
        # vLLM says at length what it does; its errors are enough. A setting of the user's stays.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        # A fork would hold what this process has open, such as the way to its driver.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        from vllm import LLM

        self._asleep = False
        self._numbers: dict[str, int] = {}
        """Of adapters, by their digests: vLLM has room for small numbers."""
        with _on_its_own(), _told(f"vLLM cannot open {folder}"):
            self._llm: Any = LLM(**arguments, disable_log_stats=True)
        self._core: Any = self._llm.llm_engine.engine_core
        manager = getattr(getattr(self._core, "resources", None), "engine_manager", None)
        self._processes = list(getattr(manager, "processes", ()))
        if self._processes:
            watched = (weakref.ref(self._core), [each.sentinel for each in self._processes])
            threading.Thread(target=_tell_who_waits, args=watched, daemon=True).start()

    @property
    def context(self) -> int:
        return int(self._llm.llm_engine.model_config.max_model_len)

    def draw(
        self, rows: Sequence[Row], sampling: Sampling, end_ids: Ids, adapter: Checkpoint | None
    ) -> list[Drawn]:
        """One request a row. What they begin with alike is in vLLM's prefix cache."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        with _told("vLLM does not draw"):
            asked = [
                SamplingParams(
                    **settings(row, sampling, end_ids),
                    logprobs=0,
                    detokenize=bool(sampling.stop),
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                for row in rows
            ]
        found = self._generate([row.prompt for row in rows], asked, adapter)
        return [_drawn(each.outputs[0]) for each in found]

    def score(self, texts: Sequence[Ids]) -> list[list[float]]:
        from vllm import SamplingParams

        asked = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        found = self._generate(texts, [asked] * len(texts), None)
        return [
            [at[token].logprob for at, token in zip(each.prompt_logprobs[1:], ids[1:], strict=True)]
            for each, ids in zip(found, texts, strict=True)
        ]

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        ids: list[int] = self._llm.get_tokenizer().apply_chat_template(
            [{"role": each.role, "content": each.content} for each in messages],
            tokenize=True,
            return_dict=False,
            add_generation_prompt=True,
        )
        return list(ids)

    def add(self, adapter: Checkpoint) -> None:
        engine = self._llm.llm_engine
        with _told(f"vLLM does not read {adapter.path}"):
            for there in engine.list_loras():
                engine.remove_lora(there)
            engine.add_lora(self._request(adapter))

    def ask(self, method: str) -> list[Any]:
        with _told("vLLM does not answer"):
            found: list[Any] = self._llm.collective_rpc(method)
        return found

    def reload(self, folder: Path) -> None:
        with _told(f"vLLM does not read {folder}"):
            if self._asleep:
                self._llm.wake_up(tags=["weights"])
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
            if self._asleep:
                self._llm.wake_up()
                self._asleep = False
            # What was kept of texts was computed with other weights.
            if not self._llm.reset_prefix_cache():
                raise Gone("vLLM keeps what it computed with other weights")

    def sleep(self) -> None:
        with _told("vLLM does not sleep"):
            self._llm.sleep(level=2)
        self._asleep = True

    def asleep(self) -> bool:
        return self._asleep

    def close(self) -> None:
        self._core.shutdown()
        for process in self._processes:
            process.join(GONE_S)
            if process.is_alive():
                process.kill()
                process.join()
        del self._llm, self._core
        gc.collect()
        devices.give_back()

    def _generate(
        self, texts: Sequence[Ids], asked: Sequence[Any], adapter: Checkpoint | None
    ) -> list[Any]:
        prompts = [{"prompt_token_ids": list(ids)} for ids in texts]
        lora = None if adapter is None else self._request(adapter)
        with _told("vLLM does not take a text"):
            found: list[Any] = self._llm.generate(
                prompts, list(asked), use_tqdm=False, lora_request=lora
            )
        for each in found:
            ended(each.outputs[0].finish_reason)
        return found

    def _request(self, adapter: Checkpoint) -> Any:
        from vllm.lora.request import LoRARequest

        number = self._numbers.setdefault(adapter.digest, len(self._numbers) + 1)
        return LoRARequest(adapter.digest, number, str(adapter.path))


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Raises Gone where vLLM has died, and UserError where it says what is wrong."""
    from vllm.exceptions import VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise Gone(f"vLLM has ended: {' '.join(str(error).split())}") from error
    except (ValueError, OSError, VLLMClientError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{what}: {said[:400]}") from error
    except RuntimeError as error:
        if "Engine core initialization failed" not in str(error):
            raise
        raise UserError(
            f"{what}: it ended while it was begun, for lack of memory unless it said otherwise "
            "above; engine.gpu_memory, engine.cache_gib and engine.context say how much it takes"
        ) from error


@contextmanager
def _on_its_own() -> Iterator[None]:
    """vLLM's processes, which are begun here, leave a Ctrl-C to the run, and end with this one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    os.environ[vllm_worker.DRIVER] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[vllm_worker.DRIVER]
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _tell_who_waits(core: weakref.ref[Any], processes: Sequence[int]) -> None:
    """When a process of vLLM's has died: vLLM itself tells who asks, and not who waits."""
    from vllm.v1.engine.exceptions import EngineDeadError

    wait(processes)
    found = core()
    if found is None:
        return
    found.resources.engine_dead = True
    found.outputs_queue.put_nowait(EngineDeadError())
    for each in list(found.utility_results.values()):
        with suppress(InvalidStateError):
            each.set_exception(EngineDeadError())


def ended(reason: str | None) -> None:
    """Raises Gone for an answer that was broken off, as by a vLLM that is being ended."""
    if reason not in ("stop", "length"):
        raise Gone(f"vLLM broke off an answer ({reason})")


def settings(row: Row, sampling: Sampling, end_ids: Ids) -> dict[str, Any]:
    """What vLLM is told of a row, offline and through a server. Nothing is left to a default that
    a model folder could change."""
    return {
        "n": 1,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "seed": row.seed % 2**63,
        "max_tokens": row.room,
        "stop": list(sampling.stop),
        "stop_token_ids": list(end_ids),
        "ignore_eos": True,  # end_ids has it, and the first of them is what is written
    }


def _drawn(output: Any) -> Drawn:
    tokens = list(output.token_ids)
    logps = [at[token].logprob for at, token in zip(output.logprobs, tokens, strict=True)]
    by_string = isinstance(output.stop_reason, str)
    return Drawn(tokens, logps, len(tokens) if by_string else None)

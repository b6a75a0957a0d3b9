"""vLLM in this process: its `LLM`, whose model is in a process of vLLM's own."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from roles.policy import devices
from roles.policy.rows import Drawn, Ids, Row
from roles.policy.vllm import Gone, number
from store.errors import UserError
from store.records import Checkpoint, Sampling

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
        from vllm import LLM

        self._asleep = False
        try:
            self._llm: Any = LLM(**arguments, disable_log_stats=True)
        except (ValueError, OSError) as error:
            said = " ".join(str(error).split())
            raise UserError(f"vLLM cannot open {folder}: {said[:400]}") from error

    def draw(
        self, rows: Sequence[Row], sampling: Sampling, end_ids: Ids, adapter: Checkpoint | None
    ) -> list[Drawn]:
        """One request a row. What they begin with alike is in vLLM's prefix cache."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

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

    def score(self, texts: Sequence[Ids], adapter: Checkpoint | None) -> list[list[float]]:
        from vllm import SamplingParams

        asked = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        found = self._generate(texts, [asked] * len(texts), adapter)
        return [
            [at[token].logprob for at, token in zip(each.prompt_logprobs[1:], ids[1:], strict=True)]
            for each, ids in zip(found, texts, strict=True)
        ]

    def chat_ids(self, question: str) -> list[int]:
        ids: list[int] = self._llm.get_tokenizer().apply_chat_template(
            [{"role": "user", "content": question}],
            tokenize=True,
            return_dict=False,
            add_generation_prompt=True,
        )
        return list(ids)

    def add(self, adapter: Checkpoint) -> None:
        self._llm.llm_engine.add_lora(_request(adapter))

    def ask(self, method: str) -> list[Any]:
        found: list[Any] = self._llm.collective_rpc(method)
        return found

    def reload(self, folder: Path) -> None:
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False
        # What was kept of texts was computed with other weights.
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM keeps what it computed with other weights")

    def sleep(self) -> None:
        self._llm.sleep(level=2)
        self._asleep = True

    def close(self) -> None:
        core = self._llm.llm_engine.engine_core
        manager = getattr(getattr(core, "resources", None), "engine_manager", None)
        core.shutdown()
        for process in getattr(manager, "processes", ()):
            process.join(GONE_S)
            if process.is_alive():
                process.kill()
                process.join()
        del self._llm
        gc.collect()
        devices.give_back()

    def _generate(
        self, texts: Sequence[Ids], asked: Sequence[Any], adapter: Checkpoint | None
    ) -> list[Any]:
        from vllm.v1.engine.exceptions import EngineDeadError

        prompts = [{"prompt_token_ids": list(ids)} for ids in texts]
        lora = None if adapter is None else _request(adapter)
        try:
            found: list[Any] = self._llm.generate(
                prompts, list(asked), use_tqdm=False, lora_request=lora
            )
        except EngineDeadError as error:
            raise Gone(f"vLLM has ended: {' '.join(str(error).split())}") from error
        return found


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


def _request(adapter: Checkpoint) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(str(number(adapter)), number(adapter), str(adapter.path))


def _drawn(output: Any) -> Drawn:
    tokens = list(output.token_ids)
    logps = [at[token].logprob for at, token in zip(output.logprobs, tokens, strict=True)]
    by_string = isinstance(output.stop_reason, str)
    return Drawn(tokens, logps, len(tokens) if by_string else None)

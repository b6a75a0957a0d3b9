"""vLLM behind `vllm serve`: one that runs already, or one that is started and ended here.

It is asked through /v1/completions, with token ids for a prompt. What its workers are asked goes
through /collective_rpc, which `vllm serve` has in its development mode.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.request import urlopen

from roles.policy import vllm_version
from roles.policy.completions import words_of
from roles.policy.rows import Drawn, Ids, Row
from roles.policy.server import run_async, shown_address
from roles.policy.settling import backoff_s
from roles.policy.vllm import WORKER, Gone
from roles.policy.vllm_offline import ended, settings
from roles.policy.vllm_worker import DRIVER
from roles.processes import python_path
from store.errors import UserError
from store.records import Checkpoint, Message, Sampling

Found = TypeVar("Found")
RETRIES = 5
"""How often a call is made again that failed in a way that may pass."""
POLLED_S = 0.5
LEAVE_S = 60.0
"""What a server is given to end in order."""
SERVER = "vllm.entrypoints.openai.api_server"
"""What `vllm serve` runs. That command wants a package of its name, which CPU builds lack."""
MODE = "VLLM_SERVER_DEV_MODE"
SERVE = f"{MODE}=1 vllm serve FOLDER --worker-extension-cls {WORKER}"
"""How one is started that says which weights it has."""
_PDEATHSIG = 1  # of prctl(2)


class Served:
    """See vllm.Running. A server that runs already, and stays when the run has ended.

    url: with or without /v1 at its end. key: that it wants, or "". timeout_s: of a call, and of
    waiting for a server that is away.
    """

    def __init__(self, url: str, concurrency: int, timeout_s: float, key: str = "") -> None:
        self._root = shown_address(url).removesuffix("/v1")
        self._key, self._timeout_s = key, timeout_s
        self._at_once = concurrency
        self._wait()
        version = str(self._get("/version")["version"])
        if (needed := vllm_version.unfit(version)) is not None:
            raise UserError(f"{self._root} is vLLM {version}, and {needed} is needed")
        listed = self._get("/v1/models")["data"]
        own = next(each for each in listed if not each.get("parent"))
        self._model, self.context = str(own["id"]), int(own["max_model_len"])
        self._adapters: set[str] = set()
        self._processes = self.ask("ratchet_process")

    def draw(
        self, rows: Sequence[Row], sampling: Sampling, end_ids: Ids, adapter: Checkpoint | None
    ) -> list[Drawn]:
        """A call for each row. What they begin with alike is in vLLM's prefix cache."""
        bodies = [
            {
                **settings(row, sampling, end_ids),
                "prompt": list(row.prompt),
                "logprobs": 0,
                "return_token_ids": True,
            }
            for row in rows
        ]
        drawn = []
        for said in self._completed(bodies, adapter):
            tokens = list(said["token_ids"])
            logps = list(said["logprobs"]["token_logprobs"])
            by_string = isinstance(said.get("stop_reason"), str)
            drawn.append(Drawn(tokens, logps, len(tokens) if by_string else None))
        return drawn

    def score(self, texts: Sequence[Ids]) -> list[list[float]]:
        bodies = [
            {"prompt": list(ids), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
            for ids in texts
        ]
        return [
            [
                at[str(token)]["logprob"]
                for at, token in zip(said["prompt_logprobs"][1:], ids[1:], strict=True)
            ]
            for said, ids in zip(self._completed(bodies, None), texts, strict=True)
        ]

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        said = [{"role": each.role, "content": each.content} for each in messages]
        asked = {"model": self._model, "messages": said}
        return list(self._post("/tokenize", asked)["tokens"])

    def add(self, adapter: Checkpoint) -> None:
        for there in self._get("/v1/models")["data"]:
            # Others' stay, where somebody else uses the server too; it has room for as many as it
            # was told (--max-loras).
            if there["id"] in (*self._adapters, adapter.digest):
                self._post("/v1/unload_lora_adapter", {"lora_name": there["id"]})
        body = {"lora_name": adapter.digest, "lora_path": str(adapter.path)}
        self._post("/v1/load_lora_adapter", body)
        self._adapters = {adapter.digest}

    def ask(self, method: str) -> list[Any]:
        try:
            said = self._post("/collective_rpc", {"method": method})
        except UserError as error:
            raise UserError(
                f"{self._root} does not say which weights it has ({error}); it is to be started "
                f"with Ratchet beside it, as {SERVE}"
            ) from None
        return list(said["results"])

    def reload(self, folder: Path) -> None:
        if self.asleep():
            self._post("/wake_up?tags=weights", None)
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self._post("/collective_rpc", body)
        self._post("/wake_up", None)
        # What was kept of texts was computed with other weights.
        if not self._post("/reset_prefix_cache?reset_running_requests=true", None)["success"]:
            raise Gone(f"{self._root} keeps what it computed with other weights")

    def sleep(self) -> None:
        self._post("/sleep?level=2", None)

    def asleep(self) -> bool:
        return bool(self._get("/is_sleeping")["is_sleeping"])

    def close(self) -> None:
        """Somebody else started it, and ends it."""

    # Calls

    def _completed(
        self, bodies: Sequence[dict[str, Any]], adapter: Checkpoint | None
    ) -> list[dict[str, Any]]:
        """The one choice of each completion, in order."""
        model = self._model if adapter is None else adapter.digest

        async def all_of(client: Any) -> list[dict[str, Any]]:
            free = asyncio.Semaphore(self._at_once)

            async def one(body: dict[str, Any]) -> dict[str, Any]:
                async with free:
                    said = await self._called(client, "post", "/v1/completions", body)
                choice: dict[str, Any] = said["choices"][0]
                ended(choice["finish_reason"])
                return choice

            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(body | {"model": model})) for body in bodies]
            return [task.result() for task in tasks]

        try:
            found = self._with_client(all_of)
        except UserError:
            self._stays()
            raise
        self._stays()
        return found

    def _stays(self) -> None:
        """Raises Gone where whoever runs the server has started it anew, with what weights it was
        first told to read."""
        if self.ask("ratchet_process") != self._processes:
            raise Gone(f"{self._root} was started anew since its weights were proven")

    def _get(self, path: str) -> Any:
        return self._with_client(lambda client: self._called(client, "get", path, None))

    def _post(self, path: str, body: dict[str, Any] | None) -> Any:
        return self._with_client(lambda client: self._called(client, "post", path, body))

    def _with_client(self, work: Callable[[Any], Awaitable[Found]]) -> Found:
        import openai

        async def done() -> Found:
            client = openai.AsyncOpenAI(
                base_url=self._root, api_key=self._key or "none", max_retries=0, timeout=None
            )
            try:
                return await work(client)
            finally:
                await client.close()

        try:
            return run_async(done())
        except ExceptionGroup as group:
            known, bugs = group.split((Gone, UserError))
            if known is None or bugs is not None:
                raise
            gone, wrong = known.split(Gone)
            raise cast(Any, gone or wrong).exceptions[0] from None

    async def _called(self, client: Any, how: str, path: str, body: dict[str, Any] | None) -> Any:
        """What the server answers, asked again while that may help. Raises Gone and UserError."""
        import openai

        said = ""
        for tried in range(RETRIES + 1):
            if tried:
                await asyncio.sleep(backoff_s(tried - 1))
            try:
                async with asyncio.timeout(self._timeout_s):
                    given = {} if how == "get" else {"body": body}
                    return await getattr(client, how)(path, cast_to=object, **given)
            except TimeoutError:
                said = f"no answer within {self._timeout_s:g} s"
            except openai.APIStatusError as error:
                said = words_of(error.body, self._key)
                if error.status_code >= 500 and self._unhealthy() is not None:
                    raise Gone(f"{self._root} is gone: {said}") from None
                if error.status_code not in (408, 409, 429, 502, 503, 504):
                    raise UserError(
                        f"{self._root}{path} answered {error.status_code}: {said}"
                    ) from None
            except openai.APIConnectionError as error:
                said = " ".join(str(error.__cause__ or error).split())
            if not self._alive():
                break
        raise Gone(f"{self._root} is gone: {said}")

    def _wait(self) -> None:
        """Until the server is ready. Raises UserError."""
        end = time.monotonic() + self._timeout_s
        while (said := self._unhealthy()) is not None:
            if not self._alive() or time.monotonic() > end:
                raise UserError(f"vLLM does not answer at {self._root}: {said}{self._log_end()}")
            time.sleep(POLLED_S)

    def _unhealthy(self) -> str | None:
        """What is wrong with it, by its own word; None: nothing."""
        try:
            with urlopen(f"{self._root}/health", timeout=5.0):
                return None
        except OSError as error:
            return " ".join(str(error).split())

    def _alive(self) -> bool:
        """Whether it can be back: of somebody else's server nobody knows."""
        return True

    def _log_end(self) -> str:
        return ""


class Started(Served):
    """One that is started and ended here, on 127.0.0.1. Its log is a file, named where it fails.

    arguments: of vLLM's, by their names in Python.
    """

    def __init__(self, arguments: dict[str, Any], concurrency: int, timeout_s: float) -> None:
        port = arguments.get("port") or _free_port()
        descriptor, name = tempfile.mkstemp(prefix="ratchet-vllm-", suffix=".log")
        self._log = Path(name)
        own = python_path() | {MODE: "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
        own[DRIVER] = str(os.getpid())
        told = ["--model", arguments["model"], "--host", "127.0.0.1", "--port", str(port)]
        with os.fdopen(descriptor, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", SERVER, *told, *_flags(arguments)],
                env={**os.environ, **own},
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C asks the run to stop after its batch
                preexec_fn=_end_with_its_parent if sys.platform == "linux" else None,
            )
        self._finalizer = weakref.finalize(self, _end, self._process)
        try:
            super().__init__(f"http://127.0.0.1:{port}", concurrency, timeout_s)
        except BaseException:
            self._finalizer()
            raise

    def close(self) -> None:
        self._finalizer()
        self._log.unlink(missing_ok=True)

    def _alive(self) -> bool:
        return self._process.poll() is None

    def _log_end(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        wrong = [line for line in lines if "Error" in line] or lines
        return f"; its log, {self._log}, ends: {wrong[-1][-400:] if wrong else ''}"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server in order, or else by force; its memory has returned then."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, how)
            with suppress(subprocess.TimeoutExpired):
                process.wait(LEAVE_S)
    # The memory is held by another process of the group.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _flags(arguments: dict[str, Any]) -> list[str]:
    """The arguments as `vllm serve` takes them."""
    flags = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if name in ("model", "port") or value is None:
            continue
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, dict | list):
            flags += [f"--{flag}", json.dumps(value)]
        else:
            flags += [f"--{flag}", str(value)]
    return flags


def _end_with_its_parent() -> None:
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGTERM)

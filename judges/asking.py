"""Ask many questions and wait for as many at once as is allowed.

Plain functions are asked one after the other, without an event loop. The first that turns out
to be async takes the rest with it into one.
"""

from __future__ import annotations

import asyncio
import atexit
import inspect
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from store.records import Call

_OWN = threading.local()
_BESIDE = ThreadPoolExecutor(max_workers=1, thread_name_prefix="judges")


def ask_all(questions: Sequence[Callable[[], Any]], *, limit: int, call: Call) -> list[Any]:
    """What each question returned, in order. The first exception ends it and is passed on."""
    answers: list[Any] = []
    for position, question in enumerate(questions):
        stop_when_told(call)
        answer = question()
        if inspect.iscoroutine(answer):
            rest = questions[position + 1 :]
            return answers + _run(_ask_async(answer, rest, position, limit, call))
        answers.append(answer)
        call.progress(position + 1, len(questions))
    return answers


async def _ask_async(
    begun: Coroutine[Any, Any, Any],
    questions: Sequence[Callable[[], Any]],
    done: int,
    limit: int,
    call: Call,
) -> list[Any]:
    gate = asyncio.Semaphore(limit)
    total = done + 1 + len(questions)

    async def ask(question: Callable[[], Any]) -> Any:
        nonlocal done
        async with gate:
            stop_when_told(call)
            answer = question()
            if inspect.iscoroutine(answer):
                answer = await answer
        done += 1
        call.progress(done, total)
        return answer

    asked = [lambda: begun, *questions]
    tasks = [asyncio.ensure_future(ask(question)) for question in asked]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _run(coroutine: Coroutine[Any, Any, list[Any]]) -> list[Any]:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _run_here(coroutine)
    # A notebook and an async graph have a loop of their own, and loops do not nest.
    return _BESIDE.submit(_run_here, coroutine).result()


def _run_here(coroutine: Coroutine[Any, Any, list[Any]]) -> list[Any]:
    """In this thread's one loop, which stays: a client that a judge keeps belongs to the loop in
    which it first connected."""
    if not hasattr(_OWN, "runner"):
        _OWN.runner = asyncio.Runner()
        atexit.register(_OWN.runner.close)
    answers: list[Any] = _OWN.runner.run(coroutine)
    return answers


def timed(method: Callable[..., Any], *given: Any, **named: Any) -> Callable[[], Any]:
    """A question that can be asked later: its answer and the seconds it took."""

    def ask() -> Any:
        began = time.perf_counter()
        returned = method(*given, **named)
        if isinstance(returned, Awaitable):
            return _awaited(returned, began)
        return returned, time.perf_counter() - began

    return ask


async def _awaited(returned: Awaitable[Any], began: float) -> tuple[Any, float]:
    answer = await returned
    return answer, time.perf_counter() - began


def unlike(asked: Sequence[int], judged: Sequence[int]) -> str | None:
    """How the candidates that were judged are not those asked about; None when they are.

    A dropped one must not shift the rest, so they are compared by id.
    """
    if sorted(asked) == sorted(judged):
        return None
    lost, strange = sorted({*asked} - {*judged}), sorted({*judged} - {*asked})
    return (
        f"was given {len(asked)} candidates and gave {len(judged)} judgements; "
        f"without one: {lost[:10]}; not asked: {strange[:10]}"
    )


def stop_when_told(call: Call) -> None:
    """Raises KeyboardInterrupt when somebody asked the run to stop."""
    if call.stopping():
        raise KeyboardInterrupt

"""Ask many questions and wait for as many at once as is allowed.

Plain functions are asked one after the other, without an event loop. The first that turns out
to be async takes the rest with it into one.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from store.records import Call


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

    return await asyncio.gather(ask(lambda: begun), *(ask(question) for question in questions))


def _run(coroutine: Coroutine[Any, Any, list[Any]]) -> list[Any]:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    # A notebook and an async graph have a loop of their own, and loops do not nest.
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


def stop_when_told(call: Call) -> None:
    """Raises KeyboardInterrupt when somebody asked the run to stop."""
    if call.stopping():
        raise KeyboardInterrupt

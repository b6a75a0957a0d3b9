"""A model server that keeps to each judge's form, or does not, as it is told: `form_server.py`.

The server is tests/model_server.py's. What becomes of a question hangs on its text alone, so what
the server was told to do can be counted on either side.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))

from model_server import Habits, ModelServer, Running

PLANS = {
    "in form": ("ok", 0.70),
    "no form": ("unparsed", 0.08),
    "cut off": ("unparsed", 0.06),
    "declines": ("refused", 0.08),
    "500": ("failed", 0.05),
    "hangs": ("timed_out", 0.03),
}
"""What is done with a question -> the status that its verdict is to have, and a share."""
HANGS_S = 5.0
WORDS = "What stands there was read twice and weighed."


def plan(question: str) -> str:
    """What becomes of a question."""
    share = int.from_bytes(hashlib.sha256(question.encode()).digest()[:7], "big") / 256**7
    for name, (_, part) in PLANS.items():
        share -= part
        if share < 0:
            return name
    return "in form"


def conclusion(question: str) -> tuple[str, Any]:
    """The field and the value that the question's form wants: what it shows last decides which."""
    draw = hashlib.sha256(f"conclusion {question}".encode()).digest()
    last = question.strip().splitlines()[-1]
    match re.match(r"(\w+):", last.strip()):
        case re.Match() as found:
            word = found[1].lower()
        case _:
            raise ValueError(f"the last line of a question names no form: {last!r}")
    if word == "same":
        return word, "yes" if draw[0] % 2 else "no"
    if word == "winner":
        return word, "AB"[draw[0] % 2]
    if word == "ranking":
        letters = re.findall(r"^Answer ([A-Z]):$", question, re.MULTILINE)
        return word, sorted(letters, key=lambda letter: draw[ord(letter) % 32])
    if word == "holds":
        return "holds", [1 + draw[0] % 2]
    return word, draw[0] % 6


class FormServer(ModelServer):
    async def _complete(self, body: dict[str, Any], key: str) -> tuple[int, Any, dict[str, str]]:
        question = body["messages"][-1]["content"]
        asked = plan(question)
        if asked == "500":
            return 500, {"error": {"message": "The server had an error"}}, {}
        if asked == "hangs":
            await asyncio.sleep(HANGS_S)
        status, said, headers = await super()._complete(body, key)
        choice = said["choices"][0]
        choice["message"]["content"] = self._said(question, asked, "response_format" in body)
        if asked == "declines":
            choice["message"] |= {"content": None, "refusal": "I do not judge that."}
        if asked == "cut off":
            choice["finish_reason"] = "length"
        return status, said, headers

    def _said(self, question: str, asked: str, structured: bool) -> str:
        field, value = conclusion(question)
        if asked == "no form":
            return WORDS
        if structured:
            return json.dumps({"justification": WORDS, field: value})
        if isinstance(value, list):
            between = " > " if field == "ranking" else ", "
            value = between.join(map(str, value))
        word = "Holds" if question.strip().splitlines()[-1].startswith("Holds") else field
        return f"{WORDS}\n{word.capitalize()}: {value}"


@contextmanager
def form_server(**habits: Any) -> Iterator[Running]:
    """A server process, ended at the end."""
    command = [sys.executable, str(Path(__file__)), json.dumps(habits)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield Running(int(process.stdout.readline()))
        finally:
            process.kill()


async def _main(habits: Habits) -> None:
    server = await asyncio.start_server(FormServer(habits).serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_main(Habits(**json.loads((sys.argv[1:] or ["{}"])[0]))))

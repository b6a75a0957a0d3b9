"""What small Llamas take in memory while they are trained or sampled, each beyond what the process
held before it.

`trained_peak.py FOLDER CASES`: CASES is a JSON list of {layers, options}, of a trainer, or of an
engine where they have `answers` to each prompt besides; printed are the peaks in bytes, with the
tokens of the longest prompt. One process, so that libraries are
imported once; memory is VmHWM of /proc, which is set back before each training.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import small_model
from roles.policy import devices
from roles.policy.encoding import prompt_ids
from roles.policy.transformers import TransformersEngine
from roles.trainers.preference import Preference
from store.records import Call, Example, Sampling

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4000,
    "max_position_embeddings": 1024,
}
PROMPT, ANSWER, PAIRS = "the sum of 17 and 25 " * 8, 128, 16


def examples(folder: Path) -> tuple[list[Example], int]:
    """Pairs of answers of ANSWER tokens, each behind a prompt of its own; tokens of a prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    made = []
    for each in small_model.examples(folder, PAIRS):
        prompt = small_model.question(f"{PROMPT}{each.asked_id:02}")
        chosen, rejected = (
            replace(side, token_ids=tuple((first + n) % 300 for n in range(ANSWER)))
            for first, side in enumerate((each.chosen, each.rejected))
        )
        made.append(replace(each, prompt=prompt, chosen=chosen, rejected=rejected))
    return made, max(len(prompt_ids(tokenizer, each.prompt)) for each in made)


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [each for each in lines if each.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def peak(folder: Path, layers: int, options: dict[str, Any], place: Path) -> dict[str, int]:
    start = small_model.build(folder, **SHAPE, num_hidden_layers=layers)
    asked, prompt = examples(start)
    trainer = Preference(**options, epochs=1, learning_rate=1e-5, device="cpu")
    checkpoint = small_model.checkpoint(start)
    with beyond() as bytes:
        trainer.train(asked, checkpoint, checkpoint, place, Call(seed=0, round=1))
    return {"bytes": bytes[0], "prompt": prompt}


def sampled(folder: Path, layers: int, answers: int, options: dict[str, Any]) -> dict[str, int]:
    start = small_model.build(folder, **SHAPE, num_hidden_layers=layers)
    asked, prompt = examples(start)
    checkpoint = small_model.checkpoint(start)
    seeds = [[1000 * n + m for m in range(answers)] for n in range(PAIRS)]
    with beyond() as bytes:
        policy = TransformersEngine(**options, device="cpu").open(checkpoint)
        prompts = [each.prompt for each in asked]
        policy.sample(prompts, sampling=Sampling(max_tokens=ANSWER), seeds=seeds)
    return {"bytes": bytes[0], "prompt": prompt}


@contextmanager
def beyond() -> Iterator[list[int]]:
    """What the process held at most beyond what it held before, in bytes, when it is over."""
    devices.give_back()
    Path("/proc/self/clear_refs").write_text("5")
    held, found = status("VmRSS"), list[int]()
    yield found
    found.append(status("VmHWM") - held)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    small: dict[str, Any] = {"layers": 1, "options": {"batch_size": 2}}
    cases = [small, small | {"answers": 1}, *json.loads(sys.argv[2])]
    found = [
        sampled(folder / f"model-{n}", each["layers"], each["answers"], each["options"])
        if "answers" in each
        else peak(folder / f"model-{n}", each["layers"], each["options"], folder / f"trained-{n}")
        for n, each in enumerate(cases)
    ]
    print(json.dumps(found[2:]))  # of the first, libraries would be counted

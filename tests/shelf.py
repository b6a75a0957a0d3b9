"""Every judge that the package offers, with as few options as it can be made with."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from roles import plugins
from roles.policy.embedded import build
from roles.protocols import Judge

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
SPECS: dict[str, str] = PROJECT["project"]["entry-points"]["loop.judges"]
"""Name -> module:Name, of all judges."""

FUNCTIONS = """
def length(completions, **columns):
    return [float(len(each[0]["content"])) for each in completions]

def reward_func(queries, prompts, labels):
    return [float(len(query) - len(prompt)) for query, prompt in zip(queries, prompts)]

def short(completion, **state):
    return 1.0 / (1 + len(completion[-1]["content"]))

class Shorter:
    def judge(self, prompts, completions, shuffle_order=True):
        return [int(len(second) < len(first)) for first, second in completions]
"""


def on_the_shelf(name: str, folder: Path, **more: Any) -> Judge:
    """The judge of this name. folder: for the files that it needs."""
    options = {**OPTIONS.get(name, lambda folder: {})(folder), **more}
    judge: Judge = plugins.load("judge", SPECS[name], options)
    return judge


def _functions(folder: Path, name: str) -> str:
    file = folder / "functions.py"
    file.write_text(FUNCTIONS)
    return f"{file}:{name}"


def _references(folder: Path) -> Path:
    rows = [
        {"question": f"{n} + {n}?", "answer": str(2 * n + n % 2), "label": n % 2 == 0}
        for n in range(5)
    ]
    file = folder / "references.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _reward_model(folder: Path) -> str:
    from transformers import AutoModelForSequenceClassification

    build(folder / "base", seed=0)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
    model.save_pretrained(folder / "base")
    return str(folder / "base")


OPTIONS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "made_as": lambda folder: {"scores": {"plain": 1.0}},
    "meta_ranking": lambda folder: {"references_path": _references(folder)},
    "openrlhf": lambda folder: {"function": _functions(folder, "reward_func")},
    "panel": lambda folder: {
        "members": {"one": {"use": SPECS["rubric"]}, "two": {"use": SPECS["verifier"]}}
    },
    "reward_model": lambda folder: {"path": _reward_model(folder), "device": "cpu"},
    "trl_judge": lambda folder: {"source": _functions(folder, "Shorter"), "kind": "pairwise"},
    "trl_reward": lambda folder: {"function": _functions(folder, "length")},
    "verifiers": lambda folder: {"rubric": _functions(folder, "short")},
}
"""Of those that cannot be made with none."""

ASKING: dict[str, dict[str, Any]] = {
    "rubric": {},
    "rubric, criteria": {"criteria": ["It is right.", "It is short."]},
    "rubric, brief": {"prompt": "rubric_brief"},
    "reference": {},
    "pairwise": {},
    "pairwise, ties": {"ties": True},
    "listwise": {},
    "meta": {},
    "mbr": {},
    "consistency": {"by": "model", "answer": "whole"},
    "meta_ranking": {"k": 3},
    "panel": {},
}
"""Judges that ask a model and read its reply -> options that make them do so."""

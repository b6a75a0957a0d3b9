"""Judges: each uses only what a plug-in could, and works without the loop.

`from judges import Rubric, group_of`, then `Rubric().judge([group_of("Why?", ["So."])], model)`.
"""

from importlib import import_module
from typing import Any

from judges.base import Opinion, PairwiseJudge, PointwiseJudge, Preference
from judges.bench import group_of
from judges.models import Models

SHELF = {
    "Code": "code",
    "Consistency": "consistency",
    "Human": "human",
    "ImplicitReward": "implicit_reward",
    "Listwise": "listwise",
    "Math": "math",
    "Mbr": "mbr",
    "Meta": "meta",
    "MetaRanking": "meta_ranking",
    "Pairwise": "pairwise",
    "Panel": "panel",
    "Recorded": "recorded",
    "Reference": "reference",
    "RewardModel": "reward_model",
    "Rubric": "rubric",
    "Verifier": "verifier",
}
"""Class -> the module that it is taken from when somebody asks for it."""

__all__ = ["Models", "Opinion", "PairwiseJudge", "PointwiseJudge", "Preference", "group_of"]


def __getattr__(name: str) -> Any:
    if name not in SHELF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{SHELF[name]}"), name)

"""Judges: each uses only what a plug-in could, and works without the loop."""

from judges.base import Opinion, PairwiseJudge, PointwiseJudge, Preference

__all__ = ["Opinion", "PairwiseJudge", "PointwiseJudge", "Preference"]

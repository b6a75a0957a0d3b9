"""Judges: each uses only what a plug-in could, and works without the loop."""

from judges.base import Opinion, PairwiseJudge, PointwiseJudge, Preference
from judges.models import Models

__all__ = ["Models", "Opinion", "PairwiseJudge", "PointwiseJudge", "Preference"]

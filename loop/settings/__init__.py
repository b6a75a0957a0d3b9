"""What a run may be told: frozen tables with a bound and a sentence for every setting.

A setting is marked operational when it may change during a run; a change of any other makes
another run. loop/config.py makes them of files.
"""

from loop.settings.base import OPERATIONAL, Frozen, Name, Role, Share, Tables, digest, is_frozen
from loop.settings.measuring import Alarms, Anchors, Bell, Command, Evaluate, Gate, Suite
from loop.settings.surroundings import (
    Budget,
    Cache,
    Checkpoints,
    Cluster,
    Isolated,
    Place,
    Server,
    Stage,
)
from loop.settings.tracks import ROLES, Mix, Model, Track, Warmup
from loop.settings.whole import OF_MEANS, Config, flat, of_place, operational

__all__ = [
    "OF_MEANS",
    "OPERATIONAL",
    "ROLES",
    "Alarms",
    "Anchors",
    "Bell",
    "Budget",
    "Cache",
    "Checkpoints",
    "Cluster",
    "Command",
    "Config",
    "Evaluate",
    "Frozen",
    "Gate",
    "Isolated",
    "Mix",
    "Model",
    "Name",
    "Place",
    "Role",
    "Server",
    "Share",
    "Stage",
    "Suite",
    "Tables",
    "Track",
    "Warmup",
    "digest",
    "flat",
    "is_frozen",
    "of_place",
    "operational",
]

"""The README's table *Your model on one GPU*: what each stage takes, computed from configurations.

`python tests/benchmarks/one_gpu.py [MODEL ...]`: a MODEL is a Hub id, of which config.json alone is
fetched, a folder, or a configuration file; left out, those in one_gpu/. Nothing is measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers import AutoConfig

from loop import casting, fitting, peaks
from loop import config as configuration
from roles.footprint import Device
from roles.policy import shape
from roles.policy.shape import Shape

HERE = Path(__file__).parent / "one_gpu"
SETTINGS = HERE / "gpu.toml"
GPUS = (8, 12, 16, 24, 32, 40, 48, 80, 141)
"""GiB of what is sold."""
EMBEDDED = ("model.path=embedded", "warmup.when=never")
"""What stands for the model, of which no more than the configuration may be here."""
STAGES = ("generate", "judge", "train", "evaluate")


def of(model: str) -> Shape:
    if not model.endswith(".json"):
        return shape.read(model)
    table = json.loads(Path(model).read_text())
    return shape.of(AutoConfig.for_model(**table))


def taken(size: Shape, *, low_rank: bool) -> dict[str, int]:
    """Stage -> bytes at most, with the settings of gpu.toml, or with all weights trained."""
    config = configuration.read(SETTINGS, sets=EMBEDDED)
    roles = casting.load_roles(config)
    if not low_rank:
        part = id(config.models["policy"].trainer)
        roles[part] = replace(roles[part], lora_rank=None)
    device = Device("cuda", 1 << 50, bfloat16=True)
    found = peaks.peaks(config, roles, device, shapes={"policy": size})
    return {each["stage"]: each["peak"] for each in found["stages"]}


def smallest(size: int) -> str:
    return next((f"{gib} GB" for gib in GPUS if size <= fitting.SPARE * gib * 2**30), "none")


def row(name: str, size: Shape) -> str:
    adapter, whole = (taken(size, low_rank=low_rank) for low_rank in (True, False))
    cells = [f"{adapter[stage] / 1e9:.1f}" for stage in STAGES]
    cells += [f"**{smallest(max(adapter.values()))}**", f"{whole['train'] / 1e9:.1f}"]
    cells += [f"**{smallest(max(whole.values()))}**"]
    return f"| {name} | {size.parameters / 1e9:.2f} B | {' | '.join(cells)} |"


def table(models: Sequence[str]) -> str:
    names = ("model", "weights", *STAGES, "one GPU of", "train, all weights", "one GPU of")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    rows = (row(Path(each).name.removesuffix(".json"), of(each)) for each in models)
    return "\n".join([*lines, *rows])


if __name__ == "__main__":
    print(table(sys.argv[1:] or sorted(map(str, HERE.glob("*.json")))))

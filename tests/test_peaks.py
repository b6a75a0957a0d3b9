"""What `loop plan` says of the memory that each stage takes, and the README's table of it."""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import one_gpu

import small_model
from loop import casting, peaks, space
from loop import config as configuration
from roles.footprint import Device
from roles.policy import embedded, shape
from roles.policy.decoding import Decoder
from roles.policy.folders import load_whole
from roles.policy.shape import Shape
from test_doctor import installed

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
GPU = Device("cuda", 24 << 30, bfloat16=True)
PUBLISHED = {
    "Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen2.5-7B-Instruct": 7_615_616_512,
}
"""Weights, as the Hub counts them in the models' safetensors."""


def qwen(name: str) -> Shape:
    return one_gpu.of(str(one_gpu.HERE / f"{name}.json"))


def stages(
    *sets: str, device: Device = GPU, size: Shape | None = None, prompt: int | None = None
) -> dict[str, dict[str, Any]]:
    config = configuration.read(sets=["model.path=embedded", "warmup.when=never", *sets])
    roles = casting.load_roles(config)
    shapes = {} if size is None else {"policy": size}
    found = peaks.peaks(config, roles, device, prompt, shapes)
    return {f"{each['stage']} {each['model']}": each for each in found["stages"]}


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_are_counted_from_a_configuration(name: str) -> None:
    assert qwen(name).parameters == PUBLISHED[name]


def test_a_folder_is_counted_as_its_weights_are(tmp_path: Path) -> None:
    folder = small_model.build(tmp_path / "model")
    size = shape.read(folder)
    assert size.parameters == space.count_weights(folder)
    assert 4 * size.cached == Decoder(load_whole(folder, "float32")).bytes_per_token
    counted = shape.of(embedded.configuration()).parameters
    assert counted <= space.EMBEDDED_WEIGHTS <= 1.02 * counted


def test_an_adapter_is_counted_as_peft_makes_it(tmp_path: Path) -> None:
    from roles.policy import adapters

    folder = small_model.build(tmp_path / "model")
    model = load_whole(folder, "float32")
    for targets in (adapters.ALL_LINEAR, ["q_proj", "down_proj"]):
        laid = load_whole(folder, "float32")
        adapters.add(laid, rank=3, alpha=6, dropout=0.0, targets=targets, seed=0)
        trained = sum(each.numel() for each in laid.parameters() if each.requires_grad)
        assert shape.read(folder).adapter(3, targets) == trained
    assert shape.of(model.config).linear == shape.read(folder).linear


def test_every_option_that_says_what_is_in_memory_is_heeded() -> None:
    size = qwen("Qwen2.5-0.5B-Instruct")
    plain = stages(size=size)
    train, generate = plain["train policy"], plain["generate policy"]
    weights = size.parameters
    assert (train["optimizer"], train["gradients"]) == (8 * weights, 4 * weights)
    assert generate["weights"] == 4 * weights  # what is trained is stored in float32
    narrow = stages("engine.dtype=bfloat16", size=size)["generate policy"]
    assert narrow["weights"] == 2 * weights
    assert narrow["cache"] == generate["cache"] // 2
    for gib, cache in ((0.1, int(0.1 * 2**30)), (0.01, (512 + 8) * 4 * size.cached)):
        # Within the bound, but for one completion, which is always sampled.
        bounded = stages(f"engine.cache_gib={gib}", size=size)["generate policy"]
        assert bounded["cache"] == cache
    for smaller in (
        "trainer.micro_batch_size=1",
        "trainer.gradient_checkpointing=true",
        "trainer.lora_rank=8",
    ):
        assert stages(smaller, size=size)["train policy"]["peak"] < train["peak"], smaller
    low_rank = stages("trainer.lora_rank=8", size=size)
    assert low_rank["train policy"]["weights"] < 2.1 * weights  # the base passes in bfloat16
    assert low_rank["generate policy"]["weights"] < 2.1 * weights  # and stays as it came
    four_bits = stages("trainer.lora_rank=8", "trainer.load_in_4bit=true", size=size)
    assert four_bits["train policy"]["weights"] < low_rank["train policy"]["weights"]
    assert stages(size=size, device=Device("cpu"))["generate policy"]["weights"] == 4 * weights
    longer = stages("generator.max_tokens=64", size=size)
    assert longer["generate policy"]["cache"] > generate["cache"]
    assert longer["train policy"]["activations"] > train["activations"]
    assert stages(size=size, prompt=1024)["train policy"]["peak"] > train["peak"]
    assert stages("trainer.dtype=float32", size=size)["train policy"]["peak"] > train["peak"]


def test_vllm_takes_its_share_or_what_it_is_told_to(tmp_path: Path, monkeypatch: Any) -> None:
    if importlib.util.find_spec("vllm") is None:
        installed(tmp_path, "vllm", "0.32.0", f"torch=={metadata.version('torch')}")
        monkeypatch.syspath_prepend(str(tmp_path))
    size, use = qwen("Qwen2.5-7B-Instruct"), "engine.use=vllm"
    found = stages(use, size=size)["generate policy"]
    assert found["weights"] == 2 * size.parameters  # in bfloat16, unless it is told otherwise
    assert found["peak"] == int(0.9 * GPU.bytes)
    assert found["fits"]
    small = stages(use, "engine.gpu_memory=0.5", size=size)["generate policy"]
    assert not small["fits"]  # the weights alone are more
    assert stages(use, *small["less"], size=size)["generate policy"]["fits"]
    told = stages(use, "engine.cache_gib=2.0", size=size)["generate policy"]
    assert told["cache"] == 2 << 30
    halves = stages(use, "engine.tensor_parallel=2", size=size)["generate policy"]
    assert halves["weights"] == size.parameters
    on_a_cpu = stages(use, size=size, device=Device("cpu"))["generate policy"]
    assert (on_a_cpu["weights"], on_a_cpu["cache"]) == (4 * size.parameters, 4 << 30)
    elsewhere = stages(use, "engine.url=http://127.0.0.1:1", size=size)["generate policy"]
    assert elsewhere["peak"] is None


def test_a_judge_takes_memory_where_it_asks_a_local_model(tmp_path: Path) -> None:
    base = ("judge.use=rubric", "filter.use=best_worst")
    assert "judge policy" not in stages()
    assert "judge policy" in stages(*base, "judge.model=round")
    served = 'server.there={url="http://127.0.0.1:1/v1"}'
    assert "judge policy" not in stages(*base, served, "judge.model=server:there")
    other = small_model.build(tmp_path / "judge", num_hidden_layers=4)
    asked = stages(*base, f"judge.model=checkpoint:{other}")[f"judge {other}"]
    assert asked["weights"] == 4 * space.count_weights(other)  # stored in float32


def test_a_stage_that_does_not_fit_says_with_what_it_would() -> None:
    size = qwen("Qwen2.5-7B-Instruct")
    train = stages("engine.dtype=bfloat16", size=size)["train policy"]
    assert train["fits"] is False
    assert train["less"][-1] == "trainer.lora_rank=16"
    again = stages("engine.dtype=bfloat16", *train["less"], size=size)
    assert {each["fits"] for each in again.values()} == {True}


def test_the_table_in_the_readme_is_what_is_computed() -> None:
    models = sorted(map(str, one_gpu.HERE.glob("*.json")))
    (shown,) = re.findall(r"^<!-- one gpu -->\n(.*?)\n<!-- /one gpu -->$", README, re.M | re.S)
    assert shown == one_gpu.table(models)


def test_the_settings_in_the_readme_are_those_of_the_table() -> None:
    assert f"```toml\n{one_gpu.SETTINGS.read_text()}```\n" in README

"""`loop doctor` finds each fault that is planted, says what it is in a line, and what to type."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import save_file

import small_model
from model_server import running
from test_cli import copied, finished, here, type_

__all__ = ["copied", "finished", "here"]


def found(*arguments: object, code: int) -> dict[str, dict[str, Any]]:
    """What was looked at -> the finding; of several of one name the worst."""
    told = json.loads(type_("doctor", *arguments, "--json", code=code).stdout)
    assert told["ok"] == (code == 0)
    worse = ("ok", "note", "wrong")
    ordered = sorted(told["findings"], key=lambda each: worse.index(each["state"]))
    assert (ordered[-1]["state"] == "wrong") == (code == 2)
    for each in ordered:
        assert each["state"] != "wrong" or each["type"], each
        assert "\n" not in each["said"] + (each["type"] or "")
    return {each["what"]: each for each in ordered}


@pytest.fixture
def model(here: Path) -> Path:
    return small_model.build(here / "model")


def of(model: Path) -> tuple[str, str]:
    return "--set", f"model.path={model}"


def without_template(model: Path) -> Path:
    settings = model / "tokenizer_config.json"
    (model / "chat_template.jinja").unlink(missing_ok=True)
    kept = json.loads(settings.read_text())
    kept.pop("chat_template", None)
    settings.write_text(json.dumps(kept))
    return model


def test_nothing_is_wrong_with_what_runs(here: Path, model: Path) -> None:
    seen = found(*of(model), code=0)
    names = ["python", "packages", "vllm", "device", "compiler", "model", "template"]
    assert set(seen) == {*names, "parts", "memory", "disk", "store"}
    assert seen["model"]["said"].startswith(f"{sum_of_weights(model):,} weights in 2 layers")
    said = type_("doctor", *of(model)).stdout.splitlines()
    assert len(said) == len(seen) + 1
    assert said[-1] == "nothing stands in the way"
    assert [path.name for path in here.iterdir()] == ["model"]  # and nothing was written


def sum_of_weights(model: Path) -> int:
    from loop import space

    return space.count_weights(model)


def test_a_chat_template_that_is_missing_and_one_that_is_given(here: Path, model: Path) -> None:
    wrong = found(*of(without_template(model)), code=2)["template"]
    assert "has no chat template" in wrong["said"]
    assert wrong["type"].endswith("--set model.template_path=FILE.jinja")
    (here / "chatml.jinja").write_text(small_model.CHATML)
    given = ("--set", "model.template_path=chatml.jinja")
    assert found(*of(model), *given, code=0)["template"]["state"] == "ok"


def test_a_judge_whose_own_model_has_no_template(here: Path, model: Path) -> None:
    judge = without_template(small_model.build(here / "judge"))
    sets = ("judge.use=rubric", f"judge.model=checkpoint:{judge}", "filter.use=best_worst")
    seen = found(*of(model), *(part for each in sets for part in ("--set", each)), code=2)
    assert seen["template"]["state"] == "ok"
    wrong = seen[f"template {judge}"]
    assert "has no chat template" in wrong["said"]
    assert wrong["type"] == f"cp FILE.jinja {judge}/chat_template.jinja"


def test_a_model_folder_without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    seen = found(*of(model), code=2)
    assert "has no weights that are loaded" in seen["model"]["said"]
    assert seen["model"]["type"] == f"hf download HUB_ID --local-dir {model}"
    assert "parts" not in seen  # which would say the same again
    wrong = found("--set", "model.path=some/model", code=2)["model"]
    assert wrong["type"] == "hf download some/model"


def test_a_disk_without_room(here: Path, model: Path) -> None:
    # What a checkpoint takes is read from the weights' header: here it tells of more than there is.
    import numpy as np

    save_file({"weight": np.zeros(1, dtype=np.float32)}, model / "model.safetensors")
    content = (model / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["weight"]["shape"] = [1 << 50]
    told = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(len(told).to_bytes(8, "little") + told)
    wrong = found(*of(model), code=2)["disk"]
    assert "GB free at" in wrong["said"]
    assert wrong["type"].endswith("--runs /OTHER/DISK")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_small_disk_is_seen_where_runs_go(here: Path, model: Path) -> None:
    (here / "small").mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "small"], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr}")
    try:
        assert found(*of(model), "--runs", "small/runs", code=2)["disk"]["said"].startswith(
            "1.0 MB"
        )
    finally:
        subprocess.run(["umount", "small"], check=True)


def served(here: Path, url: str, *more: str) -> Path:
    file = here / "served.toml"
    lines = ["[server.there]", f'url = "{url}"', *more]
    lines += ["[judge]", 'use = "rubric"', 'model = "server:there"', "[filter]", 'use="best_worst"']
    file.write_text("\n".join(lines))
    return file


def test_a_judge_server_that_is_down(here: Path) -> None:
    with socket.socket() as taken:  # bound and not listening
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        file = served(here, f"http://127.0.0.1:{port}/v1", 'model = "judge"')
        wrong = found("--config", file, code=2)["server there"]
    assert f"the connection to http://127.0.0.1:{port}/v1 failed" in wrong["said"]
    assert wrong["type"] == f"vllm serve judge --port {port}"


def test_a_judge_server_that_has_another_model(here: Path, monkeypatch: Any) -> None:
    with running(models=["judge"], key="sk-right") as server:
        file = served(here, server.url, 'model = "other"', 'key_env = "KEY_OF_THERE"')
        lacking = found("--config", file, code=2)["server there"]
        assert lacking["type"] == "export KEY_OF_THERE=KEY"
        monkeypatch.setenv("KEY_OF_THERE", "sk-right")
        wrong = found("--config", file, code=2)["server there"]
        assert wrong["said"] == f"{server.url} has judge, and asked is other"
        assert wrong["type"] == f"loop doctor --config {file} --set server.there.model=judge"
        right = ("--set", "server.there.model=judge")
        assert found("--config", file, *right, code=0)["server there"]["state"] == "ok"
        monkeypatch.setenv("KEY_OF_THERE", "sk-wrong")
        assert "answered 401" in found("--config", file, *right, code=2)["server there"]["said"]


def installed(place: Path, name: str, version: str, *requires: str) -> None:
    """What a package's installation says of it."""
    folder = place / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {r}" for r in requires)]
    (folder / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines, ""]))


def test_versions_that_do_not_go_together(here: Path, monkeypatch: Any) -> None:
    installed(here / "site", "torch", "2.9.0")
    installed(here / "site", "vllm", "0.32.0", "torch==2.13.0")
    monkeypatch.syspath_prepend(str(here / "site"))
    seen = found(code=2)
    assert seen["torch"]["said"] == "2.9.0 is installed, and torch<2.14,>=2.13 is needed"
    assert seen["torch"]["type"] == "pip install 'torch<2.14,>=2.13'"
    assert seen["vllm"]["state"] == "note"  # nothing here asks for it
    assert seen["vllm"]["said"] == "0.32.0 is built for torch==2.13.0, and torch is 2.9.0"
    assert seen["vllm"]["type"] == "pip install --upgrade 'ratchet-loop[vllm]'"


@contextmanager
def vllm_at(version: str) -> Iterator[str]:
    """A server that says which vLLM it is, and nothing else."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            said = json.dumps({"version": version}).encode()
            self.send_response(200 if self.path == "/version" else 404)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_vllm_of_ones_own_is_asked_which_it_is_and_none_is_needed_here(here: Path) -> None:
    def seen(url: str, code: int) -> dict[str, dict[str, str]]:
        return found("--set", "engine.use=vllm", "--set", f"engine.url={url}", code=code)

    with vllm_at("0.32.0") as url:
        right = seen(f"{url}/v1", 0)
        assert right["vllm"]["state"] == "ok"
        assert right[f"vllm at {url}"]["said"] == "it answers, 0.32.0"
    gone = seen(url, 2)[f"vllm at {url}"]
    assert "it does not say its version: " in gone["said"]
    assert gone["type"].startswith("VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER --worker-extension")
    with vllm_at("0.31.2") as url:
        wrong = seen(url, 2)[f"vllm at {url}"]
    assert wrong["said"] == "it is 0.31.2, and vllm<0.33,>=0.32 is needed"
    assert wrong["type"] == "pip install --upgrade 'vllm<0.33,>=0.32'"


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (None, "it is not installed"),
        ("0.31.2", "0.31.2 is installed, and vllm<0.33,>=0.32 is needed"),
        ("0.32.0", f"0.32.0 is built for torch==2.9.0, and torch is {torch.__version__}"),
    ],
)
def test_a_run_with_a_vllm_that_does_not_fit_is_refused_in_a_sentence(
    here: Path, monkeypatch: Any, version: str | None, said: str
) -> None:
    if version is not None:
        installed(here / "site", "vllm", version, "torch==2.9.0")
    monkeypatch.syspath_prepend(str(here / "site"))
    ended = type_("start", "--set", "engine.use=vllm", code=2)
    right = "right is: pip install --upgrade 'ratchet-loop[vllm]'"
    assert ended.stderr.strip().endswith(f"engine 'vllm' needs vLLM, and {said}; {right}")
    assert not (here / "runs").exists()


def test_a_package_and_a_python_that_are_missing(here: Path, monkeypatch: Any) -> None:
    installed(here / "site", "ratchet-loop", "1.0.0", "absent-package>=2")
    metadata = next((here / "site").iterdir()) / "METADATA"
    metadata.write_text(metadata.read_text().rstrip() + "\nRequires-Python: >=4.0\n")
    monkeypatch.syspath_prepend(str(here / "site"))
    seen = found(code=2)
    assert seen["absent-package"]["said"] == "not installed, and absent-package>=2 is needed"
    assert seen["absent-package"]["type"] == "pip install 'absent-package>=2'"
    assert seen["python"]["type"].startswith("make start PYTHON=")
    assert set(seen) == {"absent-package", "python", "configuration"}  # the rest could not be seen


def test_no_compiler_on_the_path(here: Path) -> None:
    """In a process of its own: which fold there is is found out once in each."""
    (here / "bin").mkdir()
    own = os.environ | {"PATH": str(here / "bin"), "XDG_CACHE_HOME": str(here / "cache")}
    own = {key: value for key, value in own.items() if key not in ("CC", "RATCHET_FOLD")}
    command = [sys.executable, "-m", "loop", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=own)
    assert done.returncode == 0, done.stderr  # torch folds as well, only slower
    (note,) = [each for each in json.loads(done.stdout)["findings"] if each["what"] == "compiler"]
    assert note["state"] == "note"
    assert "there is no C compiler (cc, gcc or clang)" in note["said"]
    assert note["type"] == "sudo apt-get install gcc"
    done = subprocess.run(command, capture_output=True, text=True, env=own | {"RATCHET_FOLD": "c"})
    assert done.returncode == 2, done.stderr
    (wrong,) = [each for each in json.loads(done.stdout)["findings"] if each["state"] == "wrong"]
    assert (wrong["what"], wrong["type"]) == ("compiler", "unset RATCHET_FOLD")


def test_a_model_that_is_too_large_for_the_gpu(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    large = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    large |= {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000}
    (model / "config.json").write_text(json.dumps(config | large | {"dtype": "bfloat16"}))
    sets = ("--set", "engine.dtype=bfloat16", "--set", "trainer.batch_size=8")
    wrong = found(*of(model), *sets, "--gpu", 24, code=2)["memory"]
    assert wrong["said"].startswith("train of policy takes ")
    assert wrong["type"].endswith("--set trainer.lora_rank=16")
    mended = [part for part in wrong["type"].split()[2:] if part != "doctor"]
    assert found(*mended, "--gpu", 24, code=0)["memory"]["state"] == "ok"


def test_a_setting_that_is_none(here: Path) -> None:
    seen = found("--set", "judge.use=verifyer", code=2)
    assert "did you mean 'verifier'?" in seen["parts"]["said"]
    assert seen["parts"]["type"] == "loop doctor --set judge.use=verifyer"
    seen = found("--set", "rounds=-1", code=2)
    assert seen["configuration"]["said"].startswith("rounds: ")


def test_a_device_that_is_not_there(here: Path) -> None:
    import torch

    missing = "cuda" if not torch.cuda.is_available() else "mps"
    wrong = found("--set", f"engine.device={missing}", code=2)["device"]
    assert f"no device '{missing}' on this machine" in wrong["said"]


def test_a_run_that_is_there_and_one_whose_store_is_damaged(copied: Path) -> None:
    seen = found(copied, code=0)
    assert seen["store"]["said"].startswith(f"{copied / 'loop.db'}, ")
    (copied / "loop.db").write_bytes(b"no database at all, and longer than a header of one" * 99)
    for file in copied.glob("loop.db-*"):
        file.unlink()
    wrong = found(copied, code=2)["store"]
    assert (wrong["type"], "is not a SQLite database" in wrong["said"]) == ("loop start", True)
    shutil.rmtree(copied)
    assert "no run in" in found(copied, code=2)["store"]["said"]

"""Checkpoints on disk: a folder under its name is complete, and is what was recorded."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from store import checkpoints
from store.errors import UserError

TOKENIZER = {"model": {"vocab": {"a": 0}}, "padding": None, "truncation": None}


def write(folder: Path) -> Path:
    """A model's files, weights included."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    save_file({"weight": torch.arange(8.0)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def final(tmp_path) -> Path:
    return checkpoints.folder(tmp_path, 3, "policy")


def published(final: Path) -> Path:
    write(checkpoints.aside(final))
    checkpoints.publish(final)
    return final


def test_what_is_written_aside_gets_its_name_when_it_is_complete(final):
    part = write(checkpoints.aside(final))
    files = {file.name: file.read_bytes() for file in part.iterdir()}
    assert not final.exists()
    checkpoints.publish(final)
    assert {file.name: file.read_bytes() for file in final.iterdir()} == files
    assert not part.exists()
    assert final.name == "round-0003-policy"


WRITING = """
import os, signal, sys
from pathlib import Path
from store import checkpoints

final, at = Path(sys.argv[1]), sys.argv[2]

def kill(event, arguments):
    if event == at:
        os.kill(os.getpid(), signal.SIGKILL)

part = checkpoints.aside(final)
part.mkdir(parents=True)
for name in ("config.json", "model.safetensors"):
    (part / name).write_bytes(bytes(1 << 20))
sys.addaudithook(kill)
checkpoints.publish(final)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("at", "complete"), [("open", False), ("os.rename", False), ("nothing", True)]
)
def test_a_killed_write_never_shows_under_the_final_name(final, at, complete):
    command = [sys.executable, "-c", WRITING, str(final), at]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert final.exists() == complete
    assert checkpoints.aside(final).exists() != complete
    if complete:
        sizes = {file.name: file.stat().st_size for file in final.iterdir()}
        assert sizes == {"config.json": 1 << 20, "model.safetensors": 1 << 20}


@pytest.mark.parametrize("name", ["training_args.bin", "inner/optimizer.pt", "rng_state.pth"])
def test_a_pickle_is_refused_by_name(final, name):
    file = write(checkpoints.aside(final)) / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"\x80\x04.")
    with pytest.raises(RuntimeError, match=f"safetensors only, found .*{file.name}"):
        checkpoints.publish(final)
    assert not final.exists()


def test_a_finished_checkpoint_is_not_written_over(final):
    published(final)
    (write(checkpoints.aside(final)) / "config.json").write_text("other")
    with pytest.raises(OSError, match="not empty"):
        checkpoints.publish(final)
    assert (final / "config.json").read_text() == "{}"


def test_a_byte_more_or_another_changes_the_digest(final):
    made = checkpoints.measure(published(final), "policy", parent_id=7)
    assert (made.model, made.path, made.parent_id, made.status) == ("policy", final, 7, "trained")
    assert made.bytes == sum(file.stat().st_size for file in final.iterdir())
    assert checkpoints.measure(final, "policy", parent_id=7) == made
    assert checkpoints.intact(made)
    weights = final / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert not checkpoints.intact(made)
    content[-1] ^= 1
    weights.write_bytes(content)
    assert checkpoints.intact(made)
    (final / "generation_config.json").touch()
    assert not checkpoints.intact(made)
    shutil.rmtree(final)
    assert not checkpoints.intact(made)


def test_the_digest_tells_what_a_file_is_called_and_where_it_ends(tmp_path):
    digests = set()
    for number, files in enumerate(
        ({"a": "12", "b": "3"}, {"a": "1", "b": "23"}, {"a": "123"}, {"b": "12", "a": "3"})
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_text(content)
        digests.add(checkpoints.measure(folder, "policy").digest)
    assert len(digests) == 4


def test_how_the_training_went_is_no_part_of_the_digest(final):
    before = checkpoints.measure(published(final), "policy")
    (final / checkpoints.TRAINING).write_text("{}")
    assert checkpoints.measure(final, "policy") == before
    assert checkpoints.intact(before)


def test_a_tokenizer_that_has_padded_a_batch_is_the_same_tokenizer(final):
    before = checkpoints.measure(published(final), "policy")
    padded = json.dumps(TOKENIZER | {"padding": {"strategy": "BatchLongest"}}, indent=2)
    (final / "tokenizer.json").write_text(padded)
    after = checkpoints.measure(final, "policy")
    assert after.tokenizer_digest == before.tokenizer_digest
    assert after.digest != before.digest
    other = json.dumps(TOKENIZER | {"model": {"vocab": {"a": 0, "b": 1}}})
    (final / "tokenizer.json").write_text(other)
    assert checkpoints.measure(final, "policy").tokenizer_digest != before.tokenizer_digest


def test_a_tokenizer_of_other_files_has_a_digest_too(final):
    published(final)
    (final / "tokenizer.json").unlink()
    found = {checkpoints.measure(final, "policy").tokenizer_digest}
    for content in ("a", "b"):
        (final / "vocab.txt").write_text(content)
        found.add(checkpoints.measure(final, "policy").tokenizer_digest)
    assert len(found) == 3


def test_a_template_has_one_digest_wherever_it_is_kept(final):
    template = checkpoints.measure(published(final), "policy").template_digest
    (final / "chat_template.jinja").unlink()
    none = checkpoints.measure(final, "policy").template_digest
    kept = {"chat_template": "{{ messages }}"}
    (final / "tokenizer_config.json").write_text(json.dumps(kept))
    assert checkpoints.measure(final, "policy").template_digest == template != none


def test_a_removed_checkpoint_is_gone_and_an_interrupted_removal_is_finished(final, tmp_path):
    checkpoints.remove(published(final))
    assert list(final.parent.iterdir()) == []
    checkpoints.remove(final)
    published(final).rename(final.with_name(final.name + ".gone"))
    checkpoints.sweep(tmp_path)
    assert list(final.parent.iterdir()) == []


def test_a_name_is_removed_again_after_a_removal_that_was_interrupted(final):
    published(final).rename(final.with_name(final.name + ".gone"))
    checkpoints.remove(published(final))
    assert list(final.parent.iterdir()) == []


def test_the_best_is_a_relative_link_that_moves_with_the_run(final, tmp_path):
    root = tmp_path / "run"
    first, second = (published(checkpoints.folder(root, number, "policy")) for number in (1, 2))
    best = root / "checkpoints" / "best"
    checkpoints.link_best(root, first)
    assert best.resolve() == first.resolve()
    (root / "checkpoints" / "best.new").symlink_to("left by a kill")
    checkpoints.link_best(root, second)
    assert os.readlink(best) == second.name
    moved = root.rename(tmp_path / "moved")
    assert (moved / "checkpoints" / "best" / "config.json").is_file()
    assert {path.name for path in (moved / "checkpoints").iterdir()} == {
        "best",
        first.name,
        second.name,
    }


def test_the_best_may_lie_outside_of_a_run_behind_a_link(tmp_path):
    base = write(tmp_path / "models" / "base")
    (tmp_path / "disk" / "far" / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs").symlink_to("disk/far")
    checkpoints.link_best(tmp_path / "runs" / "run", base)
    assert (tmp_path / "disk/far/run/checkpoints/best").resolve() == base


LINKING = """
import itertools, sys
from pathlib import Path
from store import checkpoints
root = Path(sys.argv[1])
print("linking", flush=True)
for name in itertools.cycle("ab"):
    checkpoints.link_best(root, root / "checkpoints" / name)
"""


def test_there_is_a_best_at_every_moment_while_it_changes(tmp_path):
    for name in "ab":
        write(tmp_path / "checkpoints" / name)
    checkpoints.link_best(tmp_path, tmp_path / "checkpoints" / "a")
    command = [sys.executable, "-c", LINKING, str(tmp_path)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "linking\n"
        seen = {os.readlink(tmp_path / "checkpoints" / "best") for _ in range(20_000)}
    finally:
        other.kill()
        other.wait()
    assert seen == {"a", "b"}


def test_a_model_folder_is_found_as_it_is(tmp_path, monkeypatch):
    model = write(tmp_path / "model")
    assert checkpoints.locate(str(model)) == model.resolve()
    monkeypatch.chdir(tmp_path)
    assert checkpoints.locate("model") == model.resolve()
    assert checkpoints.locate("./model") == model.resolve()


@pytest.mark.parametrize(
    "path", ["/no/such/model", "/model", "./model", "../model", "~/model", "a/b/c"]
)
def test_a_missing_folder_is_not_asked_of_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^no model folder '{path}'$"):
        checkpoints.locate(path)


def test_a_folder_without_a_model_is_refused_with_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"is not a model folder: it has no config\.json"):
        checkpoints.locate(str(tmp_path))


def model(folder: Path) -> Path:
    """A model as transformers writes it, as far as its files are looked at."""
    write(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def sharded(folder: Path) -> Path:
    model(folder)
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for number, name in enumerate(names):
        save_file({f"weight_{number}": torch.arange(8.0)}, folder / name)
    weights = {f"weight_{number}": name for number, name in enumerate(names)}
    (folder / checkpoints.INDEX).write_text(json.dumps({"weight_map": weights}))
    return folder


def test_a_model_in_one_file_or_in_shards_is_found(tmp_path):
    for made in (model(tmp_path / "one"), sharded(tmp_path / "shards")):
        assert checkpoints.locate(str(made)) == made.resolve()


def test_a_model_without_weights_is_refused_and_pickles_are_said_how_to_convert(tmp_path):
    made = model(tmp_path / "model")
    (made / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no weights that are loaded: no model\.safetensors"):
        checkpoints.locate(str(made))
    (made / "pytorch_model.bin").write_bytes(b"p")
    with pytest.raises(UserError, match=r"but pytorch_model\.bin\. .*save_pretrained\(other\)"):
        checkpoints.locate(str(made))


def test_a_shard_that_is_listed_and_missing_is_named(tmp_path):
    made = sharded(tmp_path / "model")
    (made / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of the 2 files .* model-00002-of-00002\."):
        checkpoints.locate(str(made))


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid", None])
def test_weights_that_are_not_all_there_are_refused(tmp_path, content):
    made = model(tmp_path / "model")
    file = made / "model.safetensors"
    file.write_bytes(file.read_bytes()[:20] if content is None else content)
    with pytest.raises(UserError, match=r"is not a safetensors file, or not all of one: .* LFS"):
        checkpoints.locate(str(made))


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    made = model(tmp_path / "model")
    (made / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer \(a tokenizer\.json, or"):
        checkpoints.locate(str(made))
    (made / "tokenizer.model").write_bytes(b"sentencepiece")
    assert checkpoints.locate(str(made)) == made.resolve()


def test_an_adapter_is_no_model_to_begin_from(tmp_path):
    made = model(tmp_path / "model")
    (made / "adapter_config.json").write_text('{"base_model_name_or_path": "/base"}')
    with pytest.raises(UserError, match=r"is an adapter, .* merge it into its base first"):
        checkpoints.locate(str(made))
    assert checkpoints.measure(made, "policy").kind == "adapter"


def test_an_adapter_is_the_same_wherever_its_base_lies(tmp_path):
    made = model(tmp_path / "model")
    config = made / "adapter_config.json"
    found = []
    for path, rank in (("/base", 8), ("/another/base", 8), ("/base", 16)):
        config.write_text(json.dumps({"base_model_name_or_path": path, "r": rank}))
        found.append(checkpoints.measure(made, "policy"))
    assert (found[0].digest, found[0].bytes) == (found[1].digest, found[1].bytes)
    assert found[0].digest != found[2].digest


def test_a_folder_with_another_template_shares_its_weights(tmp_path):
    made = sharded(tmp_path / "model")
    kept = {"chat_template": "{{ old }}", "eos_token": "<|end|>", "note": "naïve"}
    (made / "tokenizer_config.json").write_text(json.dumps(kept))
    (made / "pytorch_model.bin").write_bytes(b"p")
    (made / "additional_chat_templates").mkdir()
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{% generation %}{{ m }}{% endgeneration %}"
        "{% if m %}{% break %}{% endif %}{% endfor %}"
    )
    into = tmp_path / "run" / "base"
    checkpoints.with_template(made, template, into)
    assert (into / "chat_template.jinja").read_bytes() == template.read_bytes()
    assert json.loads((into / "tokenizer_config.json").read_text()) == {
        "eos_token": "<|end|>",
        "note": "naïve",
    }
    names = {path.name for path in made.iterdir()}
    assert {path.name for path in into.iterdir()} == names - {
        "pytorch_model.bin",
        "additional_chat_templates",
    }
    for file in into.glob("*.safetensors"):
        assert file.is_symlink()
        assert file.samefile(made / file.name)
    assert checkpoints.locate(str(into)) == into.resolve()
    before, after = (checkpoints.measure(path, "policy") for path in (made, into))
    assert before.tokenizer_digest == after.tokenizer_digest
    assert before.template_digest != after.template_digest


def test_a_template_that_cannot_be_parsed_is_named_with_its_line(tmp_path):
    made = model(tmp_path / "model")
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}\n{{ m }}\n{% endif %}")
    with pytest.raises(UserError, match=r"chat\.jinja, line 3, is not a Jinja template: .*endif"):
        checkpoints.with_template(made, template, tmp_path / "into")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoints.with_template(made, tmp_path / "none.jinja", tmp_path / "into")
    assert not (tmp_path / "into").exists()


def hub_cache(home: Path, name: str) -> Path:
    """A model as the Hub's client keeps what it has downloaded. Returns the snapshot."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    kept = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = kept / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (kept / "blobs").mkdir()
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(commit)
    for number, file in enumerate(sorted(model(home / "written").iterdir())):
        blob = kept / "blobs" / str(number)
        file.rename(blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_a_hub_model_that_was_downloaded_is_found_offline(tmp_path):
    snapshot = hub_cache(tmp_path, "some-lab/some-model")
    code = "import sys; from store import checkpoints; print(checkpoints.locate(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "some-lab/some-model"],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).samefile(snapshot)


@pytest.mark.parametrize("path", ["", " "])
def test_no_path_at_all_is_refused(path):
    with pytest.raises(UserError, match=r"^model\.path is empty"):
        checkpoints.locate(path)


@pytest.mark.parametrize(
    ("content", "words"), [(b"{", "as JSON"), (b"\xff", "as JSON"), (b"[1]", "not a JSON table")]
)
def test_a_model_whose_configuration_is_not_a_table_is_refused(tmp_path, content, words):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"config\.json .*{words}"):
        checkpoints.locate(str(tmp_path))


def test_a_change_is_found_whatever_time_it_claims(final):
    made = checkpoints.measure(published(final), "policy")
    weights = final / "model.safetensors"
    for _ in range(2):
        checkpoints.check(made)
    before = weights.stat()
    weights.write_bytes(weights.read_bytes()[::-1])
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match=r"the content of .* is not what it was"):
        checkpoints.check(made)
    weights.write_bytes(weights.read_bytes()[::-1])
    checkpoints.check(made)
    shutil.rmtree(final)
    with pytest.raises(UserError, match="no folder"):
        checkpoints.check(made)


@pytest.mark.parametrize("name", ["nobody/has-this-model", "no-such-model", "not a name/at all"])
def test_a_hub_model_that_is_not_here_is_one_sentence_when_offline(name, tmp_path):
    code = (
        "import sys\nfrom store import checkpoints\nfrom store.errors import UserError\n"
        "try:\n    checkpoints.locate(sys.argv[1])\nexcept UserError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"no model {name!r}: there is no such folder, and the Hub")
    assert done.stdout.count("\n") == 1


def test_an_adapter_of_a_run_that_was_moved_names_its_base_where_it_is_now(tmp_path):
    made, base = tmp_path / "made", tmp_path / "moved" / "base"
    made.mkdir()
    base.mkdir(parents=True)
    config = made / "adapter_config.json"
    config.write_text(json.dumps({"r": 4, "base_model_name_or_path": "/before/base"}))
    (made / "adapter_model.safetensors").write_bytes(b"weights")
    found = replace(checkpoints.measure(made, "policy"), base_path=base)
    checkpoints.rebase(found)
    assert json.loads(config.read_text()) == {"r": 4, "base_model_name_or_path": str(base)}
    assert checkpoints.intact(found)
    before = config.stat().st_mtime_ns
    checkpoints.rebase(found)  # nothing to do, so nothing is written
    assert config.stat().st_mtime_ns == before

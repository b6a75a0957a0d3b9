"""Asking a checkpoint, and taking it away: `loop sample` and `loop export`, on a real small run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loop import meant, run
from roles.policy.transformers import TransformersEngine
from runs import loop
from store import checkpoints
from store.database import Store
from store.records import Call, Message, Prompt, Sampling
from test_cli import answered, here, refused, type_
from test_readme import SMALL
from test_report import change

__all__ = ["here"]
ASKED = 'How many times does the letter "e" appear in the text: "between these"?'


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warm-up and one round of the embedded model, which gains. Read it, do not change it."""
    runs = tmp_path_factory.mktemp("trained") / "runs"
    sets = [part for each in (*SMALL, "rounds=1") for part in ("--set", each)]
    done = loop("start", "--runs", runs, *sets)
    assert done.returncode == 0, done.stdout + done.stderr
    [root] = runs.iterdir()
    said = f'use it: loop sample "PROMPT", loop compare {root} OTHER, loop export FOLDER\n'
    assert said in done.stdout
    return root


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """The run, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "runs" / trained.name, symlinks=True))


def folder_of(root: Path, which: str) -> Path:
    store = Store(root / run.DATABASE)
    found = meant.checkpoint(store, "policy", which)
    store.close()
    return found.path


# sample


def test_the_best_answers_beside_what_the_rounds_began_from(trained: Path) -> None:
    found = answered("sample", trained, ASKED, "--n", 3)
    assert (found["prompt"], found["seed"], found["sampling"]["max_tokens"]) == (ASKED, 0, 8)
    base, best = found["checkpoints"]
    assert (base["which"], base["round"], best["which"], best["round"]) == ("base", 0, "best", 1)
    for each in (base, best):
        assert each["gone"] is None
        assert len({answer["seed"] for answer in each["answers"]}) == 3
    assert [each["seed"] for each in base["answers"]] == [each["seed"] for each in best["answers"]]
    said = type_("sample", trained, ASKED, "--n", 3).stdout
    began, ended = said.split("\n\n")[1:]
    assert began.startswith(f"what the rounds began from (round 0, accepted): {base['path']}\n")
    assert ended.startswith(f"the best checkpoint (round 1, accepted): {best['path']}\n")
    for number, answer in enumerate(best["answers"], 1):
        tokens = answer["tokens"]
        assert re.search(rf"^  {number}, {tokens} tokens?, (stop|cut off): ", ended, re.M)


def test_the_answers_are_those_of_the_checkpoint(trained: Path) -> None:
    """Asked without the loop, with the seeds that were told."""
    settings = ("--n", 2, "--temperature", 0.7, "--max-tokens", 5, "--seed", 3)
    best = answered("sample", trained, ASKED, *settings)["checkpoints"][1]
    store = Store(trained / run.DATABASE)
    prompt = Prompt(messages=(Message(role="user", content=ASKED),))
    policy = TransformersEngine().open(meant.checkpoint(store, "policy", "1"))
    store.close()
    seeds = [Call(seed=3, stage="sample").seed_for(prompt.digest, index) for index in range(2)]
    sampling = Sampling(temperature=0.7, max_tokens=5)
    [alone] = policy.sample([prompt], sampling=sampling, seeds=[seeds])
    policy.close()
    assert [each["text"] for each in best["answers"]] == [each.text for each in alone]
    assert [each["finish_reason"] for each in best["answers"]] == [
        each.finish_reason for each in alone
    ]


def test_one_seed_gives_one_answer_and_another_others(trained: Path) -> None:
    once = answered("sample", trained, ASKED, "--n", 8)
    assert answered("sample", trained, ASKED, "--n", 8) == once
    other = answered("sample", trained, ASKED, "--n", 8, "--seed", 1)
    assert other["checkpoints"][1]["answers"] != once["checkpoints"][1]["answers"]
    greedy = answered("sample", trained, ASKED, "--n", 8, "--temperature", 0)
    assert len({each["text"] for each in greedy["checkpoints"][1]["answers"]}) == 1


def test_a_prompt_alone_is_for_the_newest_run_and_a_dash_is_stdin(
    trained: Path, here: Path
) -> None:
    (here / "runs").symlink_to(trained.parent)
    assert answered("sample", ASKED)["run"] == trained.name
    asked = loop("sample", "-", "--json", input=f"{ASKED}\n")
    assert json.loads(asked.stdout) == answered("sample", ASKED)
    said = refused("sample", trained.name)
    assert said == f'loop: no prompt: `loop sample {trained.name} "PROMPT"` asks that run\n'


def test_the_base_alone_has_nothing_beside_it(trained: Path) -> None:
    found = answered("sample", trained, ASKED, "--checkpoint", "base")
    assert [each["which"] for each in found["checkpoints"]] == ["base"]
    assert answered("sample", trained, ASKED, "--checkpoint", "0")["checkpoints"][0]["round"] == 0


def test_a_base_that_was_deleted_is_said_and_the_best_answers(copied: Path) -> None:
    change(copied, "UPDATE checkpoint SET status = 'pruned' WHERE id = 2")
    found = answered("sample", copied, ASKED)["checkpoints"]
    assert "deleted when newer ones came (checkpoints.keep_last)" in found[0]["gone"]
    assert (found[0]["answers"], len(found[1]["answers"])) == ([], 1)
    assert "  no answers: its weights were deleted" in type_("sample", copied, ASKED).stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((ASKED, "--checkpoint", "given"), "embedded-policy cannot be used: its weights were "),
        ((ASKED, "--checkpoint", "given"), "there are those of the rounds 0, 1\n"),
        ((ASKED, "--checkpoint", "7"), "no round 7; the run has 2 rounds, from 0"),
        ((ASKED, "--checkpoint", "first"), "best, base, given or the number of a round, found 'f"),
        ((ASKED, "--model", "polcy"), "no model named 'polcy'; did you mean 'policy'?"),
        (("",), "the prompt is empty"),
        (("word " * 900,), "tokens, which leaves no room for an answer in the context of"),
    ],
)
def test_what_cannot_be_asked_is_a_sentence(
    trained: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    found = type_("sample", trained, *arguments, code=2)
    assert sentence in found.stderr
    assert found.stdout == ""


def test_a_checkpoint_whose_training_diverged_or_whose_folder_is_gone(copied: Path) -> None:
    checkpoints.remove(folder_of(copied, "1"))
    assert "cannot be used: its folder is not there" in refused("sample", copied, ASKED)
    change(copied, "UPDATE checkpoint SET status = 'diverged' WHERE id = 3")
    said = refused("sample", copied, ASKED, "--checkpoint", 1)
    assert "its training met a number that is not finite; there are those of the rounds 0" in said


# export


def greedy_answers(root: Path, count: int) -> list[dict[str, Any]]:
    """What the best checkpoint said greedily when it was evaluated."""
    store = Store(root / run.DATABASE)
    found = store.query(
        "SELECT messages, text FROM candidate JOIN asked ON asked.id = asked_id "
        "JOIN prompt ON prompt.id = prompt_id "
        "WHERE purpose = 'greedy' AND checkpoint_id = 3 LIMIT :count",
        count=count,
    )
    store.close()
    return [row | {"messages": json.loads(row["messages"])} for row in found]


def test_an_exported_folder_answers_through_plain_transformers(
    trained: Path, tmp_path: Path
) -> None:
    """As it did when it was evaluated, with everything of the run gone from its folder."""
    into = tmp_path / "deep" / "mine"
    found = answered("export", trained, into)
    assert (found["round"], found["kind"], found["into"]) == (1, "full", str(into))
    assert found["bytes"] == sum(file.stat().st_size for file in into.iterdir())
    assert all(stat.S_ISREG(file.lstat().st_mode) for file in into.iterdir())
    from transformers import pipeline

    answer = pipeline("text-generation", str(into))
    for row in greedy_answers(trained, 10):
        said = answer(row["messages"], max_new_tokens=8, do_sample=False)
        assert said[0]["generated_text"][-1]["content"] == row["text"]


def test_what_export_says_to_type_next_can_be_typed(trained: Path, tmp_path: Path) -> None:
    into = tmp_path / "it's mine"
    found = type_("export", trained, into)
    words = shlex.split(found.stdout.split("\nnext: ")[1])
    assert words[:2] == ["python3", "-c"]
    done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_card_says_what_it_is(trained: Path, tmp_path: Path) -> None:
    found = answered("export", trained, tmp_path / "mine")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: "transformers"\npipeline_tag: "text-generation"\n')
    assert f"# {trained.name}, policy, round 1\n" in card
    assert f"gain {found['gain']:+.3f}, 95 % interval [{found['low']:+.3f}" in card
    assert "`verifier` on 64 test prompts" in card
    started = answered("compare", trained, trained)["metrics"][0]
    assert found["gain"] == pytest.approx(started["a"] - started["a_base"])
    began = answered("export", trained, tmp_path / "base", "--checkpoint", "base")
    assert began["gain"] is None
    assert (
        "it is the checkpoint that the rounds began from"
        in (tmp_path / "base" / "README.md").read_text()
    )


def test_a_folder_that_is_not_empty_is_left_as_it_is(trained: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    type_("export", trained, mine)  # an empty one is taken
    before = {file.name: file.read_bytes() for file in mine.iterdir()}
    assert "is not empty; name another folder, or replace it with --force" in refused(
        "export", trained, mine, "--checkpoint", "base"
    )
    assert {file.name: file.read_bytes() for file in mine.iterdir()} == before
    (mine / "more.txt").touch()
    found = answered("export", trained, mine, "--checkpoint", "base", "--force")
    assert found["round"] == 0
    assert not (mine / "more.txt").exists()
    weights = (mine / "model.safetensors").read_bytes()
    assert weights == (folder_of(trained, "base") / "model.safetensors").read_bytes()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    said = refused("export", trained, tmp_path / "other", "--force")
    assert "holds something else than a model, so --force does not replace it" in said
    assert sorted(each.name for each in tmp_path.iterdir()) == ["mine", "other"]


def test_an_export_cannot_replace_the_run_that_it_comes_from(copied: Path) -> None:
    for into in (copied.parent, copied, copied / "checkpoints" / "best", copied / "mine"):
        said = refused("export", copied, into, "--force")
        assert "what is exported" in said
    assert json.loads(type_("verify", copied, "--json").stdout)["ok"]


def test_damaged_weights_are_not_exported(copied: Path, tmp_path: Path) -> None:
    with (folder_of(copied, "best") / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    said = refused("export", copied, tmp_path / "mine")
    assert "is not as it was written; `loop verify" in said
    assert not (tmp_path / "mine").exists()


def test_a_place_that_cannot_be_written_leaves_nothing(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is there and no folder" in refused("export", trained, tmp_path / "file")
    assert "cannot write" in refused("export", trained, tmp_path / "file" / "mine")
    (tmp_path / "mine.part").mkdir()
    assert "mine.part is there, which an export is written in" in refused(
        "export", trained, tmp_path / "mine"
    )
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "mine.part"]
    assert "no folder to export into" in refused("export", trained)


def test_pickles_are_not_exported(copied: Path, tmp_path: Path) -> None:
    best = folder_of(copied, "best")
    (best / "optimizer.pt").touch()
    changed = checkpoints.measure(best, "policy")
    change(copied, f"UPDATE checkpoint SET digest = '{changed.digest}' WHERE id = 3")
    said = refused("export", copied, tmp_path / "mine")
    assert "holds optimizer.pt, which could run code when it is loaded" in said
    assert not (tmp_path / "mine.part").exists()


def test_a_card_that_was_there_is_kept_beside(copied: Path, tmp_path: Path) -> None:
    best = folder_of(copied, "best")
    (best / "README.md").write_text("what it was")
    changed = checkpoints.measure(best, "policy")
    change(copied, f"UPDATE checkpoint SET digest = '{changed.digest}' WHERE id = 3")
    type_("export", copied, tmp_path / "mine")
    assert (tmp_path / "mine" / "base-README.md").read_text() == "what it was"
    assert "improved in rounds by Ratchet" in (tmp_path / "mine" / "README.md").read_text()


def test_an_adapter_is_exported_merged_into_its_base(copied: Path, tmp_path: Path) -> None:
    """And needs no peft: the folder says what the adapter says."""
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM, pipeline

    best = folder_of(copied, "best")
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    laid = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(best), lora)
    for name, weights in laid.named_parameters():
        if "lora_B" in name:  # loud, so that it says something else than its base
            torch.nn.init.normal_(weights)
    adapter = copied / "checkpoints" / "round-0001-adapter"
    shutil.copytree(best, adapter, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    laid.save_pretrained(adapter)
    store = Store(copied / run.DATABASE)
    measured = checkpoints.measure(adapter, "policy", parent_id=3)
    kept = replace(measured, kind="adapter", base_id=3, status="rejected")
    stored = store.add_checkpoint(store.round(1).id, kept)
    store.close()
    found = answered("export", copied, tmp_path / "mine", "--checkpoint", 1)
    assert (found["checkpoint"], found["kind"]) == (stored.id, "adapter")
    assert not list((tmp_path / "mine").glob("adapter_*"))
    assert "an adapter, merged into its base" in (tmp_path / "mine" / "README.md").read_text()
    answer = pipeline("text-generation", str(tmp_path / "mine"))
    told = set()
    for row in greedy_answers(copied, 10):
        text = row["messages"][-1]["content"]
        asked = ("sample", copied, text, "--temperature", 0, "--max-tokens", 8)
        found = answered(*asked, "--checkpoint", 1)["checkpoints"][-1]["answers"][0]
        said = answer(row["messages"], max_new_tokens=8, do_sample=False)[0]["generated_text"]
        assert said[-1]["content"] == found["text"]
        told.add(found["text"] == row["text"])
    assert False in told
    with (best / "model.safetensors").open("ab") as file:
        file.write(b"\x00")
    assert f"{best} is not as it was written" in refused(
        "export", copied, tmp_path / "other", "--checkpoint", 1
    )

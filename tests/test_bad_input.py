"""Every mistake that can be made before a run: one sentence, exit code 2, and nothing written.

`python tests/test_bad_input.py` prints the table, each sentence as it is really said.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))

from loop import config as configuration
from loop import run, space
from loop.cli import app
from test_report import SMALL, build

Make = Callable[[Path], None]


@dataclass(frozen=True)
class Mistake:
    """A command that cannot be obeyed, the files that it is typed beside, and what is said."""

    name: str
    typed: str
    said: str
    """A regular expression."""
    made: Make | dict[str, str | bytes] | None = None


# What the commands are typed beside


@cache
def model() -> Path:
    """A model folder; copied and then broken."""
    from roles.policy import embedded

    made = Path(tempfile.mkdtemp()) / "model"
    embedded.build(made, 0)
    return made


@cache
def old_run() -> Path:
    return build(Path(tempfile.mkdtemp()))


def model_without(*patterns: str) -> Make:
    def make(here: Path) -> None:
        shutil.copytree(model(), here / "model")
        for pattern in patterns:
            for file in (here / "model").glob(pattern):
                file.unlink()

    return make


def model_with(name: str, content: bytes) -> Make:
    def make(here: Path) -> None:
        shutil.copytree(model(), here / "model")
        (here / "model" / name).write_bytes(content)

    return make


def model_without_template(here: Path) -> None:
    shutil.copytree(model(), here / "model")
    (here / "model" / "chat_template.jinja").unlink()
    settings = here / "model" / "tokenizer_config.json"
    kept = json.loads(settings.read_text())
    kept.pop("chat_template", None)
    settings.write_text(json.dumps(kept))


def a_run(here: Path) -> None:
    shutil.copytree(old_run(), here / "runs" / "old", symlinks=True)


def a_run_with(*statements: str) -> Make:
    def make(here: Path) -> None:
        a_run(here)
        with sqlite3.connect(here / "runs/old/loop.db") as connection:
            for statement in statements:
                connection.execute(statement)
        connection.close()

    return make


def a_run_whose_database_is(content: bytes) -> Make:
    def make(here: Path) -> None:
        a_run(here)
        (here / "runs/old/loop.db").write_bytes(content)

    return make


def a_database_of_another_program(here: Path) -> None:
    (here / "runs/old").mkdir(parents=True)
    connection = sqlite3.connect(here / "runs/old/loop.db")
    with connection:
        connection.execute("CREATE TABLE bookmark (title TEXT)")
    connection.close()


def empty_folder(name: str) -> Make:
    return lambda here: (here / name).mkdir(parents=True)


DATA = "--set proposer.use=roles.proposers.dataset:Dataset --set proposer.path=prompts.jsonl"
JUDGE = "import judges\nclass Mine(judges.PointwiseJudge):\n"
SCORE = "    def score(self, prompt, completion, policy, call):\n        return 1.0\n"
GOOD = '{"prompt": "Why?", "answer": "7"}\n'
MISTAKES = [
    # The configuration
    Mistake("no such file", "--config mine.toml", r"no configuration file mine\.toml"),
    Mistake(
        "a folder as configuration",
        "--config mine.toml",
        r"mine\.toml",
        empty_folder("mine.toml"),
    ),
    Mistake(
        "a file that cannot be read",
        "--config /proc/self/mem",
        r"/proc/self/mem cannot be read: Input/output error",
    ),
    Mistake(
        "not TOML",
        "--config loop.toml",
        r"loop\.toml is not TOML: .*line 2",
        {"loop.toml": "seed = 1\nrounds = = 3\n"},
    ),
    Mistake(
        "not UTF-8",
        "--config loop.toml",
        r"loop\.toml is not TOML: .*codec can't decode",
        {"loop.toml": b'[judge]\nuse = "caf\xe9"\n'},
    ),
    Mistake(
        "a key twice",
        "--config loop.toml",
        r"loop\.toml is not TOML: Cannot overwrite a value",
        {"loop.toml": "seed = 1\nseed = 2\n"},
    ),
    Mistake(
        "an unknown setting",
        "--config loop.toml",
        r"no setting named 'ronds'; did you mean 'rounds'\?",
        {"loop.toml": "ronds = 3\n"},
    ),
    Mistake(
        "an unknown setting in a table",
        "--set gate.min_gian=0.1",
        r"no setting named 'gate\.min_gian'; did you mean 'gate\.min_gain'\?",
    ),
    Mistake(
        "below its bound", "--set rounds=-1", r"rounds: .*greater than or equal to 0, found -1"
    ),
    Mistake(
        "above its bound",
        "--set gate.resamples=9_000_000",
        r"gate\.resamples: .*less than or equal",
    ),
    Mistake("a word for a number", "--set seed=many", r"seed: .*valid integer, found 'many'"),
    Mistake("a set without =", "--set rounds", r"--set takes key=value, .* found 'rounds'"),
    Mistake("no table", "--set judge=3", r"judge is a table, found 3"),
    Mistake(
        "a judge under test",
        "--set evaluate.judge.model=round",
        r"evaluate: every model of the run is under test, and none grades itself",
    ),
    Mistake(
        "a track of no model",
        "--set track.critic.model=nobody",
        r"track 'critic' is of model 'nobody', which is not there",
    ),
    Mistake(
        "a model without a track",
        "--set models.second.path=embedded",
        r"no track makes examples for model 'second'",
    ),
    Mistake("an unknown recipe", "--recipe irpp", r"no recipe named 'irpp'; did you mean 'irpo'\?"),
    Mistake("a run's name", "--name a/b", r"a run's name has letters, digits and .*, found 'a/b'"),
    # The parts
    Mistake("an engine", "--set engine.use=trasformers", r"no engine named .* mean 'transformers'"),
    Mistake("a judge", "--set judge.use=verifyer", r"no judge named .*mean 'verifier'"),
    Mistake("a filter", "--set filter.use=best_wurst", r"no filter named .* mean 'best_worst'"),
    Mistake("a trainer", "--set trainer.use=preferense", r"no trainer named .*mean 'preference'"),
    Mistake("a generator", "--set generator.use=samplr", r"no generator named .* mean 'sampler'"),
    Mistake(
        "a proposer",
        "--set proposer.use=reasoning_gim",
        r"no proposer named 'reasoning_gim'; did you mean 'reasoning_gym'\?",
    ),
    Mistake(
        "the judge of the gate",
        "--set evaluate.judge=verifyer",
        r"no judge named 'verifyer'; did you mean 'verifier'\?",
    ),
    Mistake(
        "a task",
        """--set 'proposer.tasks=[{name="spell_backwards"}]'""",
        r"no reasoning-gym task named 'spell_backwards'; did you mean 'spell_backward'\?",
    ),
    Mistake(
        "an unknown option",
        "--set generator.temprature=1",
        r"generator 'sampler' has no option 'temprature'; did you mean 'temperature'\?",
    ),
    Mistake(
        "an option of another kind",
        "--set generator.n=many",
        r"generator 'sampler', option 'n': .*integer.*found 'many'",
    ),
    Mistake(
        "a judge of no model",
        "--set judge.model=model:critic",
        r"judge 'verifier' asks the model 'model:critic'; there are: round, model:policy",
    ),
    Mistake(
        "a plug-in that is not there",
        "--set judge.use=mine.py:Mine",
        r"no file '.*mine\.py' to take a judge from",
    ),
    Mistake(
        "a plug-in that is not Python",
        "--set judge.use=mine.py:Mine",
        r"judge '.*mine\.py:Mine' cannot be loaded: SyntaxError: .* \(mine\.py:2\)",
        {"mine.py": "class Mine:\n    def judge(:\n"},
    ),
    Mistake(
        "a plug-in that fails",
        "--set judge.use=mine.py:Mine",
        r"cannot be loaded: ModuleNotFoundError: No module named 'nowhere' \(mine\.py:1\)",
        {"mine.py": "import nowhere\n"},
    ),
    Mistake(
        "a class that is not there",
        "--set judge.use=mine.py:Mime",
        r"no judge in .*mine\.py named 'Mime'; did you mean 'Mine'\?",
        {"mine.py": JUDGE + SCORE},
    ),
    Mistake(
        "a class that is no judge",
        "--set judge.use=mine.py:Mine",
        r"'.*mine\.py:Mine' is not a judge: it has no method score",
        {"mine.py": JUDGE + "    pass\n"},
    ),
    Mistake(
        "a module that is not there",
        "--set judge.use=nowhere:Mine",
        r"no module named 'nowhere' to take a judge from; for a file write its path",
    ),
    # Data
    Mistake(
        "a line that is not JSON",
        DATA,
        r"prompts\.jsonl:3 is not a line of JSON",
        {"prompts.jsonl": GOOD * 2 + '{"prompt": "Why?\n' + GOOD},
    ),
    Mistake(
        "a line without the column",
        DATA,
        r"prompts\.jsonl:2: no column named 'prompt'; did you mean 'promt'\?",
        {"prompts.jsonl": GOOD + '{"promt": "Why?", "answer": "7"}\n'},
    ),
    Mistake(
        "an empty file", DATA, r"prompts\.jsonl' has no prompts: it is empty", {"prompts.jsonl": ""}
    ),
    Mistake("no file", DATA, r"cannot read prompts from '.*prompts\.jsonl': No such file"),
    Mistake(
        "a file that is not UTF-8",
        DATA,
        r"prompts\.jsonl.* not UTF-8",
        {"prompts.jsonl": b'{"prompt": "caf\xe9"}\n'},
    ),
    # Models
    Mistake("no model", "--set model.path=./model", r"no model folder '.*model'"),
    Mistake(
        "a folder that is no model",
        "--set model.path=model",
        r"model is not a model folder: it has no config\.json",
        empty_folder("model"),
    ),
    Mistake(
        "a configuration that is not JSON",
        "--set model.path=model",
        r"config\.json cannot be read as JSON",
        model_with("config.json", b"{"),
    ),
    Mistake(
        "no weights",
        "--set model.path=model",
        r"model has no weights",
        model_without("*.safetensors"),
    ),
    Mistake(
        "weights that are a pointer",
        "--set model.path=model",
        r"model\.safetensors is not a safetensors file, or not all of one",
        model_with("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
    ),
    Mistake(
        "weights that are damaged",
        "--set model.path=model",
        r"model\.safetensors is damaged",
        model_with("model.safetensors", (64).to_bytes(8, "little") + bytes(100)),
    ),
    Mistake(
        "no tokenizer",
        "--set model.path=model",
        r"model has no tokenizer",
        model_without("tokenizer*"),
    ),
    Mistake(
        "no chat template",
        "--set model.path=model",
        r"has no chat template; put a chat_template\.jinja beside",
        model_without_template,
    ),
    Mistake(
        "a model with an encoder",
        "--set model.path=model",
        r"the model in '.*model' is of the kind 't5', which reads a prompt with an encoder",
        model_with("config.json", b'{"model_type": "t5", "is_encoder_decoder": true}'),
    ),
    Mistake(
        "a truth value for a number",
        "--set engine.cache_gib=true",
        r"engine 'transformers', option 'cache_gib': it is a number \(found true\)",
    ),
    Mistake(
        "a device that is not there",
        "--set engine.device=mps",
        r"no device 'mps' on this machine",
    ),
    Mistake(
        "a template that is none",
        "--set model.path=model --set model.template_path=chat.jinja",
        r"chat\.jinja, line 1, is not a Jinja template",
        lambda here: (
            model_without_template(here),
            (here / "chat.jinja").write_text("{% for each in messages %}"),
        )[0],
    ),
    # Runs
    Mistake("no such run", "nowhere", r"no run in nowhere: it has no loop\.db"),
    Mistake(
        "a folder without a database",
        "runs/old",
        r"no run in runs/old: it has no loop\.db",
        empty_folder("runs/old"),
    ),
    Mistake(
        "a database that is none",
        "runs/old",
        r"runs/old/loop\.db is not a SQLite database",
        a_run_whose_database_is(b"not a database, but long enough to look like one" * 100),
    ),
    Mistake(
        "an empty database",
        "runs/old",
        r"runs/old/loop\.db holds no run",
        a_run_whose_database_is(b""),
    ),
    Mistake(
        "another program's database",
        "runs/old",
        r"runs/old/loop\.db holds no run: it is another program's",
        a_database_of_another_program,
    ),
    Mistake(
        "a newer database",
        "runs/old",
        r"the database has schema version 99, this Ratchet knows \d+: install",
        a_run_with("INSERT INTO schema_version VALUES (99, 'later', '2030-01-01')"),
    ),
    Mistake(
        "a run of other settings",
        "runs/old --set generator.n=5 --set seed=9",
        r"runs/old is another run than that; these settings cannot change: "
        r"seed: 0 -> 9; track\.main\.generator\.n: 4 -> 5\. Leave RUN out",
        a_run,
    ),
    Mistake(
        "a name for a run that has one",
        "runs/old --name other",
        r"--name is for a new run, and runs/old is to be gone on with",
        a_run,
    ),
    # The disk
    Mistake(
        "a disk that is too small",
        "--set checkpoints.keep_last=1000000000 --set rounds=0",
        r"the disk of runs/ has [\d.,]+ \w+ free, and this run needs about [\d.,]+ GB .*"
        r"set a lower checkpoints\.keep_last",
    ),
    Mistake(
        "a file where runs should be",
        "--runs runs",
        r"cannot make a run directory under runs: .*Not a directory",
        {"runs": ""},
    ),
    Mistake(
        "a place where nothing can be written",
        "--runs /sys/runs",
        r"cannot make a run directory under /sys/runs: ",
    ),
]


@contextmanager
def typed_in(here: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(here)
    try:
        yield
    finally:
        os.chdir(before)


def lay(mistake: Mistake, here: Path) -> None:
    if callable(mistake.made):
        mistake.made(here)
        return
    for name, content in (mistake.made or {}).items():
        (here / name).write_bytes(content.encode() if isinstance(content, str) else content)


def listing(here: Path) -> dict[str, str]:
    """What lies in a folder, all the way down; Python's own cache of a plug-in aside."""
    found = {}
    for path in sorted(here.rglob("*")):
        if "__pycache__" not in path.parts:
            kind = "file" if path.is_file() else "folder"
            held = hashlib.sha256(path.read_bytes()).hexdigest() if kind == "file" else ""
            changed = path.lstat().st_mtime_ns if kind == "file" else 0
            found[str(path.relative_to(here))] = f"{kind} {changed} {held}"
    return found


def answer(mistake: Mistake, command: str, here: Path) -> str:
    """The one sentence, checked to be one, and that nothing was written."""
    before = listing(here)
    with typed_in(here):
        found = CliRunner().invoke(app, [command, *shlex.split(mistake.typed)])
    assert found.exit_code == 2, f"{found.exit_code}: {found.output}\n{found.exception!r}"
    assert found.stdout == ""
    assert found.stderr.startswith("loop: ")
    assert found.stderr.count("\n") == 1, found.stderr
    assert "Traceback" not in found.stderr
    assert listing(here) == before
    return found.stderr.removeprefix("loop: ").strip()


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_one_sentence_and_nothing_is_written(tmp_path: Path, mistake: Mistake) -> None:
    lay(mistake, tmp_path)
    assert re.search(mistake.said, answer(mistake, "start", tmp_path))


def of_plan(mistake: Mistake) -> bool:
    """Plan takes no run and asks for no room."""
    of_run = mistake.typed.startswith(("nowhere", "runs/old", "--name", "--runs"))
    of_room = "keep_last" in mistake.typed
    return not of_run and not of_room


@pytest.mark.parametrize(
    "mistake",
    [each for each in MISTAKES if of_plan(each)],
    ids=lambda mistake: mistake.name,
)
def test_plan_says_of_a_mistake_what_start_says(tmp_path: Path, mistake: Mistake) -> None:
    lay(mistake, tmp_path)
    assert re.search(mistake.said, answer(mistake, "plan", tmp_path))


@pytest.mark.parametrize(
    "name", ["an unknown setting", "a line that is not JSON", "a newer database"]
)
def test_the_command_itself_says_it_without_a_traceback(tmp_path: Path, name: str) -> None:
    [mistake] = [each for each in MISTAKES if each.name == name]
    lay(mistake, tmp_path)
    before = listing(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "loop", "start", *shlex.split(mistake.typed)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert re.search("^loop: .*" + mistake.said, done.stderr)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("command", ["status", "rounds", "verify", "stop", "show 1", "why 1"])
@pytest.mark.parametrize(
    "name", ["a database that is none", "an empty database", "a newer database"]
)
def test_reading_a_database_that_is_none_is_a_sentence_too(
    tmp_path: Path, command: str, name: str
) -> None:
    [mistake] = [each for each in MISTAKES if each.name == name]
    lay(mistake, tmp_path)
    verb, *rest = command.split()
    told = Mistake(name, " ".join([*rest, "runs/old"]), mistake.said)
    assert re.search(mistake.said, answer(told, verb, tmp_path))


# Room on the disk


def test_the_room_that_is_asked_for_is_what_the_embedded_model_takes() -> None:
    from safetensors.torch import load_file

    weights = load_file(model() / "model.safetensors")
    counted = sum(each.numel() for each in weights.values())
    assert counted == space.count_weights(model())
    assert counted <= space.EMBEDDED_WEIGHTS <= counted * 1.02


def test_more_checkpoints_prompts_and_models_ask_for_more_room() -> None:
    def total(*sets: str) -> int:
        config = configuration.read(sets=[*SMALL, *sets])
        return space.needed(config, run.load_roles(config)).total

    least = total()
    for more in ("prompts=60", "evaluate.gate_prompts=500", "generator.n=40"):
        assert total(more) > least
    assert total("rounds=9", "checkpoints.keep_last=6") > total("rounds=9")
    one = total("rounds=0", "checkpoints.keep_last=7")
    assert total("rounds=0", "checkpoints.keep_last=8") - one == 4 * space.EMBEDDED_WEIGHTS
    assert total("trainer.lora_rank=4") < least


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    print("| what is wrong | typed | answered |\n|---|---|---|")
    for each in MISTAKES:
        with tempfile.TemporaryDirectory() as folder:
            lay(each, Path(folder))
            said = answer(each, "start", Path(folder)).replace("|", "\\|").replace(folder, "HERE")
        print(f"| {each.name} | `loop start {each.typed}` | {said} |")

"""People's own data: every file and format it comes in, and one sentence for what is wrong."""

import csv
import json
import os
import subprocess
import sys
import time
from datetime import date, datetime
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet
from trl.data_utils import extract_prompt

from judges.recorded import Recorded as RecordedJudge
from roles.filters.best_worst import BestWorst
from roles.filters.right_wrong import RightWrong
from roles.generators.recorded import Recorded
from roles.policy.embedded import build
from roles.policy.transformers import TransformersEngine
from roles.proposers.dataset import Dataset
from runs import SCRIPTED, everything, loop, scripted_toml, start
from store.errors import UserError
from store.records import Call, Candidate, Checkpoint, Group, Message, Prompt
from test_proposers import Past, propose, write

USER = {"role": "user", "content": "What colour is the sky?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def says(text):
    return {"role": "assistant", "content": text}


def read(path, count=99, **options):
    return propose(Dataset(path, shuffle=False, **options), count)


def turns(prompt):
    return [(turn.role, turn.content) for turn in prompt.messages]


PAIR = {"chosen": "Blue.", "rejected": "Green."}
FORMATS = {
    "prompt": ({"prompt": "Sky?"}, [("user", "Sky?")], None),
    "prompt, conversational": (
        {"prompt": [SYSTEM, USER]},
        [("system", "Be brief."), ("user", USER["content"])],
        None,
    ),
    "completion": (
        {"prompt": "The sky is", "completion": " blue."},
        [("user", "The sky is")],
        {"completion": " blue."},
    ),
    "completion, conversational": (
        {"prompt": [USER], "completion": [says("Blue.")]},
        [("user", USER["content"])],
        {"completion": "Blue."},
    ),
    "label": (
        {"prompt": "Sky?", "completion": "Green.", "label": False},
        [("user", "Sky?")],
        {"completion": "Green.", "label": False},
    ),
    "label, conversational": (
        {"prompt": [USER], "completion": [says("Blue.")], "label": True},
        [("user", USER["content"])],
        {"completion": "Blue.", "label": True},
    ),
    "preference": ({"prompt": "Sky?", **PAIR}, [("user", "Sky?")], PAIR),
    "preference, conversational": (
        {"prompt": [USER], "chosen": [says("Blue.")], "rejected": [says("Green.")]},
        [("user", USER["content"])],
        PAIR,
    ),
    "preference, implicit prompt": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        [("user", "The sky is")],
        {"chosen": " blue.", "rejected": " green."},
    ),
    "preference, implicit prompt, conversational": (
        {"chosen": [SYSTEM, USER, says("Blue.")], "rejected": [SYSTEM, USER, says("Green.")]},
        [("system", "Be brief."), ("user", USER["content"])],
        PAIR,
    ),
    "preference, the prompt a text beside conversations": (
        {
            "prompt": USER["content"],
            "chosen": [USER, says("Blue.")],
            "rejected": [USER, says("Green.")],
        },
        [("user", USER["content"])],
        PAIR,
    ),
    "messages": (
        {"messages": [USER, says("Blue."), {"role": "user", "content": "Now?"}, says("Red.")]},
        [("user", USER["content"]), ("assistant", "Blue."), ("user", "Now?")],
        {"completion": "Red."},
    ),
}


def as_jsonl(path, rows):
    return write(path.with_suffix(".jsonl"), *rows)


def as_json(path, rows):
    path = path.with_suffix(".json")
    path.write_text(json.dumps(rows, indent=1))
    return path


def as_parquet(path, rows):
    path = path.with_suffix(".parquet")
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def as_csv(path, rows, by=","):
    path = path.with_suffix(".csv" if by == "," else ".tsv")
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys(), delimiter=by)
        table.writeheader()
        table.writerows(rows)
    return path


def as_tsv(path, rows):
    return as_csv(path, rows, by="\t")


def as_saved(path, rows):
    datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


def as_folder(path, rows):
    path.mkdir()
    for number, row in enumerate(rows):
        as_parquet(path / f"part-{number}", [row])
    return path


@pytest.mark.parametrize("wrote", [as_jsonl, as_json, as_parquet, as_saved, as_folder])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_the_same_from_every_kind_of_file(tmp_path, wrote, name):
    row, messages, answers = FORMATS[name]
    rows = [{**row, "source": "people", "level": level} for level in (3, 4)][:1]
    (prompt,) = read(wrote(tmp_path / "rows", rows))
    assert turns(prompt) == messages
    assert prompt.reference is None
    recorded = {} if answers is None else {"recorded": [answers]}
    assert prompt.columns == {"source": "people", "level": 3, **recorded}
    assert json.loads(json.dumps(prompt.columns)) == prompt.columns


@pytest.mark.parametrize("wrote", [as_csv, as_tsv])
@pytest.mark.parametrize(
    "name",
    [name for name, (row, *_) in FORMATS.items() if all(type(v) is not list for v in row.values())],
)
def test_a_table_of_texts_has_the_standard_formats(tmp_path, wrote, name):
    row, messages, answers = FORMATS[name]
    (prompt,) = read(wrote(tmp_path / "rows", [{**row, "note": "two\nlines", "empty": ""}]))
    assert turns(prompt) == messages
    recorded = {} if answers is None else {"recorded": [answers]}
    assert prompt.columns == {"note": "two\nlines", "empty": None, **recorded}


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("The sky is blue.", "The sky is green."),
        ("The sky is blue", "The sky is black"),
        ("Q: a", "Q: ab"),
        ("same text", "same text"),
        ("word one", "word  one"),
    ],
)
def test_the_prompt_of_two_texts_is_what_trl_takes_for_it(tmp_path, chosen, rejected):
    theirs = extract_prompt({"chosen": chosen, "rejected": rejected})
    (prompt,) = read(write(tmp_path / "a.jsonl", {"chosen": chosen, "rejected": rejected}))
    assert prompt.messages[0].content == theirs["prompt"]
    assert prompt.columns["recorded"] == [
        {"chosen": theirs["chosen"], "rejected": theirs["rejected"]}
    ]


def test_the_rows_of_a_prompt_are_gathered_and_say_what_is_their_own(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green.", "by": "Ann", "lang": "en"},
        {"prompt": "Sea?", "chosen": "Wet.", "rejected": "Dry.", "by": "Ann", "lang": "en"},
        {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Red.", "by": "Bo", "lang": "en"},
        {"prompt": "Sky?", "chosen": "Azure.", "rejected": "Red.", "lang": "en", "task": "look"},
    )
    sky, sea = read(path)
    assert sky.columns == {
        "by": "Ann",
        "lang": "en",
        "recorded": [
            {"chosen": "Blue.", "rejected": "Green."},
            {"chosen": "Blue.", "rejected": "Red.", "by": "Bo"},
            {"chosen": "Azure.", "rejected": "Red.", "by": None, "task": "look"},
        ],
    }
    assert len(sea.columns["recorded"]) == 1


def test_a_reference_that_differs_stands_with_its_row(tmp_path):
    rows = [{"prompt": "Sky?", **PAIR, "answer": answer} for answer in ("blue", "azure")]
    (prompt,) = read(write(tmp_path / "a.jsonl", *rows))
    assert prompt.reference == "blue"
    assert prompt.columns["recorded"] == [PAIR, {**PAIR, "answer": "azure"}]


def test_a_column_that_means_nothing_in_a_format_may_be_missing_in_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": "b", "label": "hard"})
    assert [prompt.columns for prompt in read(path)] == [{}, {"label": "hard"}]


def test_a_reference_can_be_the_recorded_answer_and_is_none_unless_asked(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "2 + 2?", "completion": [says("4")]})
    assert read(path)[0].reference is None
    (prompt,) = read(path, reference="completion")
    assert (prompt.reference, prompt.columns) == ("4", {"recorded": [{"completion": "4"}]})


def test_the_columns_own_answer_is_the_reference_without_being_named(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "2 + 2?", "answer": 4})
    assert read(path, prompt="question")[0].reference == "4"


def test_a_system_prompt_is_put_before_prompts_that_have_none(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "Sky?"}, {"prompt": [SYSTEM, USER]})
    first, second = read(path, system="Be kind.")
    assert turns(first) == [("system", "Be kind."), ("user", "Sky?")]
    assert turns(second)[0] == ("system", "Be brief.")


def test_dates_are_kept_as_text(tmp_path):
    row = {"prompt": "Sky?", "day": date(2024, 2, 29), "at": [{"time": datetime(2024, 2, 29, 12)}]}
    (prompt,) = read(as_parquet(tmp_path / "a", [row]))
    assert prompt.columns == {"day": "2024-02-29", "at": [{"time": "2024-02-29T12:00:00"}]}


BAD_ROWS = [
    ('{"prompt": ', r"a\.jsonl:1 is not a line of JSON"),
    ('{"prompt": ' + "[" * 100_000, r"a\.jsonl:1 is not a line of JSON"),
    ('{"prompt": "a"}\n\n[1]\n', r"a\.jsonl:3 is not an object"),
    ('{"promt": "a"}', "no column named 'prompt'; did you mean 'promt'"),
    ('{"prompt": "a", "answer": 1}\n{"prompt": "b", "anser": 1}', ":2: no column .* 'anser'"),
    ('{"prompt": "a"}\n{"prompt": "b", "chosen": "c"}', r":2 has a column 'chosen', which the f"),
    ('{"prompt": "a", "answer": ["b"]}', "a text or a number"),
    ('{"prompt": "a", "answer": NaN}', "a finite number"),
    ('{"prompt": 3}', r"a\.jsonl:1: the prompt is a text or a list"),
    ('{"prompt": null}', r"a\.jsonl:1: the prompt is a text or a list"),
    ('{"prompt": []}', r"a\.jsonl:1"),
    ('{"prompt": [{"role": "boss", "content": "x"}]}', "role: Input should be"),
    ('{"prompt": [{"role": "user"}]}', r"a\.jsonl:1.* content: "),
    ('{"prompt": " "}', "is empty"),
    ('{"prompt": "a", "completion": " "}', "column 'completion' is empty"),
    ('{"prompt": "a", "chosen": "b", "rejected": ""}', "column 'rejected' is empty"),
    ('{"prompt": "a", "chosen": "b"}', "no 'rejected'"),
    ('{"prompt": "a", "chosen": "b", "rejected": "c", "completion": "d"}', "two formats"),
    ('{"chosen": "b", "rejected": "c"}', "begin differently, so there is no prompt"),
    ('{"chosen": [{"role": "user", "content": "a"}], "rejected": "c"}', "begin with different"),
    ('{"prompt": "a", "completion": "b", "label": "good"}', "'label' is true or false"),
    ('{"prompt": "a", "completion": "b", "label": null}', "'label' is true or false"),
    ('{"completion": "b"}', "no column named 'prompt'"),
    ('{"messages": "a"}', "is a list of turns"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "ends with the assistant's answer"),
    ('{"text": "Once upon a time"}', "does not say where its prompt ends"),
    ('{"prompt": "a", "recorded": 1}', "rename it"),
    ('{"prompt": "a", "weight": [NaN]}', "column 'weight' holds nan"),
    ('{"prompt": "a", "weight": {"x": 1e999}}', "column 'weight' holds inf"),
    ("\n\n", "it is empty"),
    ("", "it is empty"),
]


@pytest.mark.parametrize(("text", "words"), BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line_in_one_sentence(tmp_path, text, words):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as found:
        Dataset(path)
    assert "\n" not in str(found.value)


def test_an_answer_of_several_turns_is_refused_with_its_row(tmp_path):
    long = [says("Blue."), USER, says("Still blue.")]
    rows = [{"prompt": [USER], "completion": one} for one in ([says("Blue.")], long)]
    with pytest.raises(UserError, match=r"a\.parquet, row 2: column 'completion' is one turn"):
        Dataset(as_parquet(tmp_path / "a", rows))
    pair = {"chosen": [USER, *long], "rejected": [USER, says("Green.")]}
    with pytest.raises(UserError, match=r":1: column 'chosen', after the turns both begin with"):
        Dataset(write(tmp_path / "a.jsonl", pair))


def test_bytes_and_what_else_json_cannot_hold_are_refused_with_their_column(tmp_path):
    with pytest.raises(UserError, match=r"row 1: column 'image' holds b'.*drop the column"):
        Dataset(as_parquet(tmp_path / "a", [{"prompt": "a", "image": b"\x00"}]))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "prompt,answer\nx,1\n\ny,2,3\n", r"a\.csv:4 has 3 values for 2 columns"),
        ("a.csv", 'prompt,answer\n"two\nlines",1\ny\n', r"a\.csv:4 has 1 values for 2 columns"),
        ("a.csv", 'prompt\n"x" y\n', r"a\.csv:2 is not CSV"),
        ("a.csv", 'prompt\n"never closed\n', r"a\.csv:2 is not CSV"),
        ("a.csv", "prompt,prompt\nx,y\n", r"names each column, and differently"),
        ("a.csv", "prompt,x\n,y\n", r"a\.csv:2: the prompt is a text"),
        ("a.csv", "", "it is empty"),
        ("a.tsv", "prompt\tanswer\nx\n", r"a\.tsv:2 has 1 values"),
        ("a.json", "[{", r"a\.json is not JSON"),
        ("a.json", '[{"prompt": "a"}, 3]', r"a\.json, row 2 is not an object"),
        ("a.json", "[]", "it is empty"),
        ("a.json", "", "it is empty"),
        ("a.parquet", "PAR1 but not really", "cannot be read as Parquet"),
        ("a.parquet", "", "cannot be read as Parquet"),
        ("a.txt", "Why?", r"right endings are \.jsonl"),
        ("a.jsonl", b'{"prompt": "\xff"}', "is not UTF-8"),
        ("a.csv", b"prompt\n\xff\n", "is not UTF-8"),
    ],
)
def test_a_bad_file_is_named_in_one_sentence(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=words) as found:
        Dataset(path)
    assert "\n" not in str(found.value)


def test_lines_of_json_may_be_in_a_file_that_ends_in_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('\ufeff{"prompt": "a\u2028b"}\n{"prompt": "c"}\n')
    assert [prompt.messages[0].content for prompt in read(path)] == ["a\u2028b", "c"]


def test_a_prompt_in_a_table_may_be_long_and_an_ending_in_capitals(tmp_path):
    path = as_csv(tmp_path / "a", [{"prompt": "x" * 200_000}]).rename(tmp_path / "A.CSV")
    assert len(read(path)[0].messages[0].content) == 200_000


def test_parquet_that_is_spoiled_is_the_users_mistake(tmp_path):
    path = as_parquet(tmp_path / "a", [{"prompt": "a"}])
    whole = path.read_bytes()
    for spoiled in (whole[:-20], whole[:6] + b"\xff" * 24 + whole[30:]):
        path.write_bytes(spoiled)
        with pytest.raises(UserError, match=r"a\.parquet") as found:
            Dataset(path)
        assert "\n" not in str(found.value)


def test_a_folder_is_read_by_name_and_what_is_not_read_is_said(tmp_path, caplog):
    write(tmp_path / "b.jsonl", {"prompt": "second"})
    as_csv(tmp_path / "a", [{"prompt": "first"}])
    (tmp_path / "README.md").write_text("about")
    assert [prompt.messages[0].content for prompt in read(tmp_path)] == ["first", "second"]
    assert "README.md" in caplog.text
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="has no file to read prompts from"):
        Dataset(tmp_path / "none")


def test_the_splits_of_a_saved_data_set_can_be_those_of_a_run(tmp_path):
    parts = {
        name: datasets.Dataset.from_list([{"prompt": f"{name} {n}"} for n in range(3)])
        for name in ("train", "train_prefs", "held")
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved")[0].messages[0].content == "train 0"
    proposer = Dataset(tmp_path / "saved", split={"train": "train_prefs", "test": "held"})
    assert propose(proposer, 9)[0].messages[0].content.startswith("train_prefs")
    assert [one.messages[0].content for one in propose(proposer, 2, "test")] == ["held 0", "held 1"]
    with pytest.raises(UserError, match="did you mean 'train_prefs'"):
        Dataset(tmp_path / "saved", split="train_pref")
    with pytest.raises(UserError, match="no split of a run named 'tests'; did you mean 'test'"):
        Dataset(tmp_path / "saved", split={"tests": "held"})
    for option in ("split", "subset"):
        with pytest.raises(UserError, match=f"no {option}"):
            Dataset(write(tmp_path / "a.jsonl", {"prompt": "a"}), **{option: "main"})


def test_a_saved_folder_that_is_broken_is_the_users_mistake(tmp_path):
    as_saved(tmp_path / "saved", [{"prompt": "a"}])
    (tmp_path / "saved" / "data-00000-of-00001.arrow").write_text("not arrow")
    with pytest.raises(UserError, match="cannot be read as a data set saved"):
        Dataset(tmp_path / "saved")


def test_a_data_set_on_the_hub_that_cannot_be_had_is_one_sentence():
    with pytest.raises(UserError, match=r"'some-one/no-such-data': there is no such file") as found:
        Dataset(Path("some-one/no-such-data"))
    assert "\n" not in str(found.value)


def test_a_data_set_of_the_hub_is_read_where_it_was_loaded_before(tmp_path):
    """In a process of its own: `datasets` takes the place of its cache when it is imported."""
    source = write(tmp_path / "a.jsonl", {"prompt": "Sky?", **PAIR})
    program = """
import shutil, sys
from pathlib import Path
import datasets
from roles.proposers.rows import read_rows

made = datasets.load_dataset("json", data_files=sys.argv[1], split="train")
made = Path(made.cache_files[0]["filename"])
cache = Path(sys.argv[2]) / "some-one___things" / "default" / "0.0.0" / ("a" * 40)
shutil.copytree(made.parent, cache)
(cache / made.name).rename(cache / "things-train.arrow")
print(list(read_rows(Path("some-one/things"))))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(source), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.stdout.strip() == str([("some-one/things, row 1", {"prompt": "Sky?", **PAIR})]), (
        done.stderr
    )


def test_a_hundred_thousand_rows_take_seconds(tmp_path):
    rows = {
        "prompt": [f"What is {n} + 1?" for n in range(100_000)],
        "chosen": [str(n + 1) for n in range(100_000)],
        "rejected": ["?"] * 100_000,
        "score_chosen": [1.5] * 100_000,
    }
    parquet.write_table(pa.table(rows), tmp_path / "a.parquet")
    began = time.perf_counter()
    proposer = Dataset(tmp_path / "a.parquet")
    assert len(propose(proposer, 100_000)) == 100_000
    assert time.perf_counter() - began < 30


# The generator and the judge that read what was recorded.


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    path = tmp_path_factory.mktemp("embedded")
    build(path, seed=0)
    return TransformersEngine(device="cpu").open(
        Checkpoint(
            model="main", path=path, digest="d", tokenizer_digest="t", template_digest="c", bytes=1
        )
    )


def judged(prompt, texts, **options):
    """What the judge says of these answers: score and reason by text."""
    group = grouped(prompt, texts)
    found = RecordedJudge(**options).judge([group], None, Call())
    return {
        one.text: (each.score, each.reason)
        for one, each in zip(group.candidates, found, strict=True)
    }


def grouped(prompt, texts, asked=1):
    return Group(
        asked_id=asked,
        prompt=prompt,
        candidates=tuple(
            Candidate(
                id=100 * asked + n,
                asked_id=asked,
                index=n,
                text=text,
                token_ids=tuple(text.encode()),
            )
            for n, text in enumerate(texts)
        ),
    )


def of(*entries, **columns):
    return Prompt(
        messages=(Message(role="user", content="Sky?"),),
        columns={**columns, "recorded": list(entries)},
    )


def test_the_judge_scores_by_what_the_data_says():
    found = judged(
        of(PAIR, {"completion": "Red.", "label": False}, {"completion": "Grey."}),
        ["Blue.", "Green.", "Red.", "Grey."],
    )
    assert [score for score, _ in found.values()] == [1.0, 0.0, 0.0, 1.0]


def test_the_judge_abstains_on_what_the_data_does_not_have():
    found = judged(of(PAIR), ["blue."])
    assert found == {"blue.": (None, "the data does not have this answer")}


def test_rows_that_disagree_give_their_mean_and_the_reason_says_so():
    prompt = of(PAIR, {"chosen": "Red.", "rejected": "Blue."}, PAIR)
    score, reason = judged(prompt, ["Blue."])["Blue."]
    assert score == pytest.approx(2 / 3)
    assert reason == "the data has it 3 times and disagrees: the mean of chosen, rejected, chosen"


def test_recorded_scores_are_used_when_asked_for():
    prompt = of(PAIR, {**PAIR, "score_chosen": "7.5"}, score_chosen=8.5, score_rejected=3)
    found = judged(prompt, ["Blue.", "Green."], scores=True)
    assert [score for score, _ in found.values()] == [8.0, 3.0]
    for missing in ({}, {"score_chosen": "good"}, {"score_chosen": True}):
        with pytest.raises(UserError, match="needs a number in column 'score_chosen'"):
            judged(of(PAIR, **missing), ["Blue."], scores=True)


def test_peoples_preferences_become_pairs(tmp_path, policy):
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green."},
        {"prompt": "Sky?", "chosen": "Azure.", "rejected": "Red."},
        {"prompt": "Sea?", "chosen": "Wet.", "rejected": "Wet."},
    )
    prompts = read(path)
    written = Recorded().generate(prompts, policy, Call())
    groups = [
        grouped(prompt, [each.text for each in own], number)
        for number, (prompt, own) in enumerate(zip(prompts, written, strict=True), 1)
    ]
    judgements = RecordedJudge().judge(groups, policy, Call())
    one = BestWorst().select(groups, judgements, Past(), Call())
    assert [(each.chosen.text, each.rejected.text) for each in one.examples] == [("Blue.", "Red.")]
    assert [each.asked_id for each in one.dropped] == [2]
    several = RightWrong(pairs=2).select(groups, judgements, Past(), Call())
    assert {each.chosen.text for each in several.examples} == {"Blue.", "Azure."}


def test_a_run_learns_from_peoples_preferences(tmp_path):
    sums = [(a, b) for a in range(20) for b in range(10)]
    rows = [
        {"prompt": f"{a} + {b} = ?", "chosen": str(a + b), "rejected": str(a + b + 1 + again)}
        for again in range(2)
        for a, b in sums[: 200 - 100 * again]
    ]
    write(tmp_path / "people.jsonl", *({**row, "answer": row["chosen"]} for row in rows))
    file = scripted_toml(tmp_path)
    text = file.read_text().replace(f'proposer = "{SCRIPTED}:Sums"', "")
    text = text.replace(f'judge = "{SCRIPTED}:Exact"', 'judge = "judges.recorded:Recorded"', 1)
    file.write_text(
        'generator = "roles.generators.recorded:Recorded"\n'
        + text
        + '[proposer]\nuse = "roles.proposers.dataset:Dataset"\npath = "people.jsonl"\n'
    )
    root, outcome = start(file, tmp_path / "runs", ["rounds=1"])
    assert outcome.code == 0
    found = everything(root)
    texts = {row["id"]: row["text"] for row in found["candidate"]}
    chosen = {row["asked_id"]: texts[row["chosen_id"]] for row in found["example"]}
    answers = {row["id"]: row["reference"] for row in found["prompt"]}
    asked = {row["id"]: answers[row["prompt_id"]] for row in found["asked"]}
    assert len(chosen) == 24
    assert all(asked[place] == text for place, text in chosen.items())
    assert loop("verify", root).returncode == 0

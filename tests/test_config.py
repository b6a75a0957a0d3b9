"""From TOML to a Config: what comes over what, and what is said of a mistake."""

import json
import tomllib

import pytest
from pydantic import ValidationError

from loop import config, expanding, settings
from loop.settings import Role
from store.errors import UserError

DEFAULT = tomllib.loads((config.HERE / "default.toml").read_text())


@pytest.fixture
def file(tmp_path):
    """Writes a configuration file and returns its path."""

    def write(text: str, name: str = "loop.toml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


@pytest.fixture
def recipe():
    """A name for the one recipe that these tests know the contents of."""
    name = next((each for each in config.recipes() if each != "default"), None)
    if name is None:
        pytest.skip("no recipe yet")
    return name


# What comes over what


def test_told_nothing_the_default_is_what_runs():
    found = config.read()
    assert found == config.read(recipe="default")
    for key in ("rounds", "seed", "batch_prompts"):
        assert getattr(found, key) == DEFAULT[key]
    assert set(found.track) == {"main"}
    assert set(found.models) == {"policy"}
    assert found.models["policy"].path == "embedded"
    assert found.evaluate.judge == Role(use="verifier")


def test_the_default_is_under_the_file_and_the_file_under_set(file):
    own = file("rounds = 5\nseed = 7\n[gate]\npatience = 4\nmin_gain = 0.1")
    found = config.read(own, sets=["seed=9", "gate.min_gain=0.2"])
    assert (found.rounds, found.seed) == (5, 9)
    assert found.batch_prompts == DEFAULT["batch_prompts"]
    assert (found.gate.patience, found.gate.min_gain) == (4, 0.2)
    assert found.gate.undecided == DEFAULT["gate"]["undecided"]


def test_a_recipe_is_over_the_default_and_under_the_file(file, recipe):
    plain, own = config.read(recipe=recipe), file("seed = 11\n[gate]\nmin_gain = 0.3")
    changed = {each["key"] for each in config.differences(config.read(), plain)}
    assert changed - {"seed", "gate.min_gain"}, "a recipe says something of its own"
    over = config.read(own, recipe=recipe)
    assert {each["key"]: each["to"] for each in config.differences(plain, over)} == {
        "seed": 11,
        "gate.min_gain": 0.3,
    }


@pytest.mark.parametrize("name", config.recipes())
def test_every_recipe_is_a_configuration(name):
    assert config.read(recipe=name).rounds > 0


def test_tables_merge_and_lists_replace():
    lower = {"a": {"x": 1, "y": [1, 2]}, "b": 1}
    upper = {"a": {"y": [3]}, "c": {"z": 1}}
    assert expanding.merge(lower, upper) == {"a": {"x": 1, "y": [3]}, "b": 1, "c": {"z": 1}}
    assert lower == {"a": {"x": 1, "y": [1, 2]}, "b": 1}


def test_a_roles_options_are_kept_while_the_same_is_used_and_go_with_it(file):
    default = config.read().models["policy"].trainer.options
    same = config.read(file('[trainer]\nuse = "preference"\nbeta = 0.5'))
    assert same.models["policy"].trainer.options == default | {"beta": 0.5}
    other = config.read(file('[trainer]\nuse = "supervised"\nepochs = 2'))
    assert other.models["policy"].trainer == Role(use="supervised", epochs=2)
    mine = config.read(file('trainer = "mine.py:Trainer"\n'))
    assert mine.models["policy"].trainer.options == {}


def test_a_role_may_be_a_name_alone_and_get_options_later(file):
    own = file('judge = "exact"\n[evaluate]\njudge = "numeric"')
    found = config.read(own, sets=["judge.votes=3", "evaluate.judge.digits=2"])
    assert found.track["main"].judge == Role(use="exact", votes=3)
    assert found.evaluate.judge == Role(use="numeric", digits=2)
    options = config.read(sets=["evaluate.judge.scorer=numeric"]).evaluate.judge
    assert options == Role(use="verifier", scorer="numeric")
    assert config.read(sets=["filter.pairs=7", "filter=right_wrong"]).track[
        "main"
    ].filter.options == {"pairs": 7}


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("3", 3),
        ("0.5", 0.5),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ("{ a = 1 }", {"a": 1}),
        ('"3"', "3"),
        ("word", "word"),
        ("a b=c", "a b=c"),
        ("", ""),
    ],
)
def test_set_takes_a_toml_value_or_else_words(written, value):
    found = config.read(sets=[f"judge.option={written}"])
    assert found.track["main"].judge.options == {"option": value}


# Tracks and models


def test_what_a_track_leaves_out_falls_back_to_the_top(file):
    found = config.read(
        file(
            """
prompts = 12
[judge]
use = "rubric"
votes = 3
[track.critic]
prompts = 5
[track.critic.judge]
use = "meta"
[track.other.judge]
votes = 5
"""
        )
    )
    main, critic, other = (found.track[name] for name in ("main", "critic", "other"))
    assert (main.prompts, critic.prompts, other.prompts) == (12, 5, 12)
    assert main.judge == Role(use="rubric", votes=3)
    assert critic.judge == Role(use="meta")
    assert other.judge == Role(use="rubric", votes=5)
    assert critic.generator == other.generator == main.generator
    assert {each.model for each in found.track.values()} == {"policy"}


def test_what_a_model_leaves_out_falls_back_to_the_top(file):
    found = config.read(
        file(
            """
[trainer]
use = "preference"
beta = 0.3
[models.reward]
path = "embedded"
[models.reward.trainer]
beta = 0.4
[track.reward]
model = "reward"
"""
        )
    )
    policy, reward = found.models["policy"], found.models["reward"]
    assert (policy.trainer.options["beta"], reward.trainer.options["beta"]) == (0.3, 0.4)
    assert reward.engine == policy.engine
    assert found.trainer(1, "reward") == reward.trainer
    assert found.tracks(1) == found.track


def test_the_policy_may_be_named_among_the_models(file):
    named = file('[models.policy]\npath = "org/model"\n[models.other]\npath = "embedded"')
    made = config.read(named, sets=["track.more.model=other"])
    assert made.models["policy"] == config.read(sets=["model.path=org/model"]).models["policy"]
    assert list(made.models) == ["policy", "other"]
    assert made.warmup is None  # what is not embedded is not warmed up


def test_only_the_embedded_model_is_warmed_up_unless_it_is_said(file):
    embedded = config.read()
    warmup = embedded.tracks(0)["warmup"]
    assert list(embedded.tracks(0)) == ["warmup"]
    assert warmup.prompts == DEFAULT["warmup"]["prompts"]
    assert warmup.proposer == embedded.track["main"].proposer
    assert warmup.filter == Role.model_validate(DEFAULT["warmup"]["filter"])
    assert embedded.trainer(0, "policy") == embedded.warmup.trainer
    own = '[model]\npath = "somebody/model"\n'
    other = config.read(file(own))
    assert other.warmup is None
    assert other.tracks(0) == {}
    assert other.trainer(0, "policy") == other.models["policy"].trainer
    always = config.read(file(own + '[warmup]\nwhen = "always"\nprompts = 9'))
    assert always.tracks(0)["warmup"].prompts == 9
    assert config.read(sets=["warmup.when=never"]).warmup is None
    with pytest.raises(UserError, match=r"warmup\.when is .* found 'sometimes'"):
        config.read(sets=["warmup.when=sometimes"])


def test_how_the_rounds_choose_and_train_is_not_how_the_warm_up_does(file):
    alike = config.read(
        file(
            """
[filter]
use = "everything"
min_score = 1.0
[trainer]
use = "supervised"
kl_weight = 0.5
[judge]
use = "verifier"
scorer = "numeric"
"""
        )
    )
    assert alike.warmup == config.read().warmup
    other = config.read(file('[warmup]\njudge = { use = "length" }\n[judge]\nuse = "math"'))
    assert other.warmup is not None
    assert other.warmup.track["warmup"].judge.use == "length"


def test_a_warm_up_track_that_names_a_part_has_it_as_it_says(file):
    made = config.read(
        file(
            """
[warmup.generator]
use = "demonstrations"
cut = [2, 3]
mistakes = 0.5
[warmup.track.more.generator]
use = "demonstrations"
[warmup.track.same]
prompts = 7
[warmup.track.other.generator]
mistakes = 0.1
"""
        )
    )
    assert made.warmup is not None
    tracks = {name: each.generator.options for name, each in made.warmup.track.items()}
    assert tracks["more"] == {}
    assert tracks["same"] == tracks["warmup"]
    assert tracks["other"] == tracks["warmup"] | {"mistakes": 0.1}


def test_the_label_of_a_role_tells_its_options_and_model_apart():
    labels = [
        Role(use="rubric").label,
        Role(use="rubric", votes=3).label,
        Role(use="rubric", votes=5).label,
        Role(use="rubric", model="round").label,
        Role(use="rubric", model="model:critic").label,
    ]
    assert labels[0] == "rubric"
    assert len(set(labels)) == 5
    assert Role(use="rubric", b=1, a=2).label == Role(use="rubric", a=2, b=1).label


# Mistakes


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["ronds=3"], "no setting named 'ronds'; did you mean 'rounds'?"),
        (["gate.min_gan=0.1"], "no setting named 'gate.min_gan'; did you mean 'gate.min_gain'?"),
        (
            ["track.critic.promts=3"],
            "no setting named 'track.critic.promts'; did you mean 'track.critic.prompts'?",
        ),
        (["model.pth=x"], "did you mean 'models.policy.path'?"),
        (["warmup.promts=3"], "did you mean 'warmup.prompts'?"),
        (["evaluate.tempertaure=1"], "did you mean 'evaluate.temperature'?"),
        (["rounds=-1"], "rounds: Input should be greater than or equal to 0, found -1"),
        (["seed=2147483648"], "seed: Input should be less than 2147483648, found 2147483648"),
        (["seed=1.5"], "seed: Input should be a valid integer"),
        (["rounds=many"], "found 'many'"),
        (["batch_prompts=0"], "batch_prompts: Input should be greater than or equal to 1, found 0"),
        (["gate.min_gain=1.5"], "gate: min_gain is between -1 and 1, found"),
        (["gate.undecided=wait"], "gate.undecided: Input should be 'keep' or 'revert', found"),
        (["evaluate.temperature=0"], "evaluate.temperature: Input should be greater than 0"),
        (["prompts=0"], "track.main.prompts: Input should be greater than or equal to 1"),
        (["judge=3"], "judge is a table, found 3"),
        (["gate=3"], "gate is a table, found 3"),
        (["track.critic=3"], "track.critic is a table, found 3"),
        (["models.x=word"], "models.x is a table, found 'word'"),
        (["track.critic.judge=3"], 'track.critic.judge: a role is a table with a key "use"'),
        (["track.Main.prompts=3"], "track.Main: a name has lower-case letters, digits, - and _"),
        (["models.a b.path=x"], "models.a b: a name has lower-case letters"),
        (["rounds=true"], "rounds: Input should be a valid integer, found True"),
        (['rounds="3"'], "rounds: Input should be a valid integer, found '3'"),
        (["gate.min_gain=true"], "gate.min_gain: Input should be a valid number"),
        (["gate.target=nan"], "gate.target: Input should be a finite number"),
        (["evaluate.stop=x"], "evaluate.stop: Input should be a list, found 'x'"),
        (["rounds=1\nseed=99"], "--set takes one key=value"),
        (["warmup.when=never", "warmup.promts=1"], "did you mean 'warmup.prompts'?"),
        (["warmup.when=never", "warmup.prompts=0"], "warmup.prompts: Input should be greater"),
        (["warmup.when=never", "warmup.judge=3"], "warmup.judge: a role is a table with a key"),
        (["track.critic.model=nope"], "track 'critic' is of model 'nope', which is not there"),
        (["models.x.path=a"], "no track makes examples for model 'x'"),
        (["evaluate.judge.model=round"], "is under test, and none grades itself"),
        (["evaluate.judge.model=model:policy"], "is under test, and none grades itself"),
        (["rounds"], "--set takes key=value, as in judge.votes=3, found 'rounds'"),
        (["=3"], "--set takes key=value"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(sets, said):
    with pytest.raises(UserError) as raised:
        config.read(sets=sets)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_mistake_in_a_file_is_told_with_the_file(file, tmp_path):
    with pytest.raises(UserError, match=r"loop\.toml is not TOML: .*line 2"):
        config.read(file("rounds = 3\nseed = = 4"))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"bytes\.toml is not TOML"):
        config.read(tmp_path / "bytes.toml")
    for missing in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(UserError, match="no configuration file"):
            config.read(missing)
    with pytest.raises(UserError, match="no setting named 'jduge'; did you mean 'judge'"):
        config.read(file('[jduge]\nuse = "verifier"'))


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "bom.toml").write_bytes(b"\xef\xbb\xbfrounds = 7\n")
    assert config.read(tmp_path / "bom.toml").rounds == 7


def test_a_whole_number_may_stand_for_a_fraction_and_a_list_for_texts():
    found = config.read(sets=["gate.min_gain=0", "evaluate.stop=['a']"])
    assert (found.gate.min_gain, found.evaluate.stop) == (0.0, ("a",))
    assert isinstance(found.gate.min_gain, float)


def test_an_empty_model_path_is_not_the_folder_of_the_file():
    assert config.read(sets=["model.path="]).models["policy"].path == ""


def test_an_unknown_recipe_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="no recipe named 'defualt'; did you mean 'default'"):
        config.read(recipe="defualt")


# Paths


def test_paths_are_relative_to_the_file_that_names_them(file, tmp_path, monkeypatch):
    (tmp_path / "deep" / "model").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    own = """
judge = "my/judge.py:Judge"
[model]
path = "model"
[proposer]
use = "dataset"
path = "prompts.jsonl"
[generator]
use = "sampler"
prefix_path = "../prefix.txt"
"""
    found = config.read(file(own, "deep/loop.toml"))
    deep = tmp_path.resolve() / "deep"
    assert found.models["policy"].path == str(deep / "model")
    assert found.track["main"].judge.use == f"{deep}/my/judge.py:Judge"
    assert found.track["main"].proposer.options == {"path": str(deep / "prompts.jsonl")}
    assert found.evaluate.proposer == found.track["main"].proposer
    assert found.track["main"].generator.options["prefix_path"] == f"{deep}/../prefix.txt"
    (tmp_path / "elsewhere" / "mine").mkdir()
    named = config.read(file(own, "deep/loop.toml"), sets=["model.path=mine"])
    assert named.models["policy"].path == str(tmp_path.resolve() / "elsewhere" / "mine")


def test_a_path_may_begin_at_home_and_a_hub_name_stays_one(file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    own = '[model]\npath = "{}"\n'
    assert config.read(file(own.format("~/model"))).models["policy"].path == f"{tmp_path}/model"
    for name in ("somebody/model", "gpt2", "./none"):
        assert config.read(file(own.format(name))).models["policy"].path == name
    (tmp_path / "embedded").mkdir()
    assert config.read(file(own.format("embedded"))).models["policy"].path == "embedded"


# What is stored


def test_the_resolved_json_reads_back_equal():
    sets = ["judge.share=0.25", "evaluate.stop=['a', 'b']", "gate.target=0.9", "track.b.prompts=2"]
    sets += ["trainer.option={ deep = [1, { x = 2.0 }] }", "judge.when=2026-01-01T00:00:00"]
    for found in (config.read(), config.read(sets=sets)):
        stored = json.loads(json.dumps(found.model_dump(mode="json")))
        again = config.validate(stored)
        assert again.model_dump(mode="json") == stored
        assert again.identity == found.identity
        assert config.differences(found, again) == []
        for name, track in found.track.items():
            assert again.track[name].judge.label == track.judge.label


OPERATIONAL = ["rounds=99", "gate.patience=55", "gate.target=0.5", "budget.generated_tokens=7"]
OPERATIONAL += [
    "checkpoints.keep_last=44",
    "budget.cost=1.5",
    "cache.path=there.db",
    "cache.when=never",
]
OPERATIONAL += ['alarms.stop=["flips"]']
OPERATIONAL += [f"alarms.max_{each}=0.11" for each in ("unscored", "modal", "flips", "length")]
OPERATIONAL += ["alarms.max_drift=0.11", "alarms.min_votes=0.11", "alarms.min_kappa=0.11"]
OPERATIONAL += ["alarms.min_agreement=0.11", "isolation=process"]
OPERATIONAL += ["cluster.workers=2", "cluster.address=auto", "cluster.cpus=2.0"]
OPERATIONAL += ["cluster.gpus=1.0", "cluster.retries=0"]
IDENTITY = ["seed=11", "prompts=7", "batch_prompts=3", "judge.x=1", "evaluate.samples=99"]
IDENTITY += ["gate.min_gain=0.123", "trainer.beta=0.987", "warmup.prompts=7", "model.path=x/y"]
IDENTITY += ["track.b.prompts=8", "warmup.when=never", "judge.model=round"]


@pytest.mark.parametrize("setting", OPERATIONAL)
def test_a_run_stays_the_same_when_an_operational_setting_changes(setting):
    before, after = config.read(), config.read(sets=[setting])
    assert after.identity == before.identity
    (changed,) = config.differences(before, after)
    assert changed["key"] == setting.partition("=")[0]
    assert settings.operational(changed["key"])


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("engine.cache_gib=0.5", "models.policy.engine.cache_gib"),
        ("engine.batch_size=8", "models.policy.engine.batch_size"),
        ("engine.gpu_memory=0.5", "models.policy.engine.gpu_memory"),
        ("engine.url=http://127.0.0.1:8000", "models.policy.engine.url"),
        ("trainer.micro_batch_size=8", "models.policy.trainer.micro_batch_size"),
        ("warmup.trainer.gradient_checkpointing=true", "warmup.trainer.gradient_checkpointing"),
    ],
)
def test_what_bounds_memory_may_change_in_a_run_that_ran_out_of_it(setting, key):
    before, after = config.read(), config.read(sets=[setting])
    assert after.identity == before.identity
    assert [each["key"] for each in config.differences(before, after)] == [key]


@pytest.mark.parametrize("setting", IDENTITY)
def test_any_other_change_makes_another_run(setting):
    before, after = config.read(), config.read(sets=[setting])
    assert after.identity != before.identity
    assert not any(settings.operational(each["key"]) for each in config.differences(before, after))


def test_differences_name_each_setting_with_both_values():
    assert config.differences(config.read(), config.read()) == []
    one = config.read(sets=["rounds=3", "trainer.beta=0.1"])
    other = config.read(sets=["rounds=4", "trainer.beta=0.2", "judge.votes=3"])
    assert config.differences(one, other) == [
        {"key": "models.policy.trainer.beta", "from": 0.1, "to": 0.2},
        {"key": "rounds", "from": 3, "to": 4},
        {"key": "track.main.judge.votes", "from": None, "to": 3},
    ]


def test_every_setting_says_whether_it_is_operational():
    marked = {key for key in settings.flat(config.read()) if settings.operational(key)}
    assert marked == {setting.partition("=")[0] for setting in OPERATIONAL}


@pytest.mark.parametrize(
    ("setting", "key", "value"),
    [
        ("rounds=99", "rounds", 99),
        ("gate.patience=77", "gate.patience", 77),
        ("prompts=7", "track.main.prompts", 7),
        ("judge.votes=3", "track.main.judge.votes", 3),
        ("track.main.judge.votes=3", "track.main.judge.votes", 3),
        ("trainer.beta=0.987", "models.policy.trainer.beta", 0.987),
        ("model.path=x/y", "models.policy.path", "x/y"),
        ("warmup.prompts=5", "warmup.track.warmup.prompts", 5),
        ("evaluate.judge.digits=2", "evaluate.judge.digits", 2),
    ],
)
def test_a_stored_configuration_is_changed_by_the_names_of_a_file(setting, key, value):
    stored = config.validate(config.read().model_dump(mode="json"))
    changed = config.change(stored, [setting])
    assert [(each["key"], each["to"]) for each in config.differences(stored, changed)] == [
        (key, value)
    ]


def test_a_mistake_in_a_change_is_told_as_in_a_file():
    for setting, said in (
        ("rouns=9", "no setting named 'rouns'; did you mean 'rounds'?"),
        ("gate.patienc=9", "no setting named 'gate.patienc'; did you mean 'gate.patience'?"),
        ("rounds=-9", "rounds: Input should be greater than or equal to 0, found -9"),
        ("track=9", "track"),
    ):
        with pytest.raises(UserError) as raised:
            config.change(config.read(), [setting])
        assert said in str(raised.value)


def test_a_configuration_cannot_be_changed_in_place():
    with pytest.raises(ValidationError, match="frozen"):
        config.read().rounds = 4


SETS = ["evaluate.top_k=5", "evaluate.stop=['x']", "evaluate.max_tokens=16"]


def test_greedy_sampling_is_the_same_without_chance():
    evaluate = config.read(sets=SETS).evaluate
    sampled, greedy = evaluate.sampling(greedy=False), evaluate.sampling(greedy=True)
    assert (sampled.temperature, greedy.temperature) == (1.0, 0.0)
    assert (sampled.top_k, sampled.max_tokens, sampled.stop) == (5, 16, ("x",))
    assert (greedy.top_k, greedy.max_tokens, greedy.stop) == (5, 16, ("x",))


def test_options_stay_whichever_comes_first_of_them_and_the_part_that_has_them() -> None:
    sets = ["judge.model=round", "judge.votes=2", "judge.use=rubric"]
    one, other = config.read(sets=sets), config.read(sets=sets[::-1])
    assert one == other
    assert one.track["main"].judge.model == "round"
    assert one.track["main"].judge.options == {"votes": 2}

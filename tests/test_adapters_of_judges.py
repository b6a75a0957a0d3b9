"""Judges that people already have: files as their libraries' users write them, run as they are."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from judges.adapters.trl_reward import TrlReward
from loop import config
from roles import plugins
from runs import loop, scripted_toml, start
from store.database import Store
from store.errors import UserError
from store.records import Call, Candidate, Group, Judgement, Message, Prompt

CALL = Call(seed=1, round=3, stage="judge")


def group_of(*texts: str, first_id: int = 1, asked: str = "2 + 2?", **rest: Any) -> Group:
    prompt = Prompt(messages=(Message(role="user", content=asked),), **rest)
    return Group(
        asked_id=first_id,
        prompt=prompt,
        candidates=tuple(
            Candidate(id=first_id + n, asked_id=first_id, index=n, text=text, token_ids=(n, n + 1))
            for n, text in enumerate(texts)
        ),
    )


def load(name: str, **options: Any) -> Any:
    """As a configuration makes it."""
    return plugins.load("judge", name, options)


def scores(judgements: Sequence[Judgement]) -> list[float | None]:
    return [each.score for each in judgements]


REWARDS = '''
import asyncio
import math
from typing import List

SEEN = []


def length(completions, **kwargs):
    """The example of TRL's documentation."""
    return [-abs(20 - len(completion[0]["content"])) / 20 for completion in completions]


def listens(prompts, completions, **kwargs):
    SEEN.append((prompts, completions, kwargs))
    return [None for _ in completions]


def exact(completions, answer):
    return [float(c[0]["content"] == right) for c, right in zip(completions, answer)]


def plain(prompts: List[str], completions: List[str], **kwargs) -> List[float]:
    return [float(c.startswith(p)) for p, c in zip(prompts, completions)]


async def slow(completions, **kwargs):
    await asyncio.sleep(0)
    return [0.25] * len(completions)


def runs_its_own_loop(completions, **kwargs):
    return asyncio.run(slow(completions))


def logs(completions, log_extra, log_metric, trainer_state, **kwargs):
    log_extra("letters", [len(c[0]["content"]) for c in completions])
    log_metric("share", 0.5)
    return [trainer_state.global_step] * len(completions)


def only_sums(completions, topic, **kwargs):
    return [1.0 if each == "sums" else None for each in topic]


def not_a_number(completions, **kwargs):
    return [math.nan if "?" in c[0]["content"] else 1.0 for c in completions]


def drops_one(completions, **kwargs):
    return [1.0] * (len(completions) - 1)


def broken(completions, **kwargs):
    return [1 / 0 for _ in completions]


def tensor(completions, **kwargs):
    import torch
    return torch.ones(len(completions), dtype=torch.float32) / 4
'''


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    path = tmp_path / "rewards.py"
    path.write_text(REWARDS)
    return path


def reward(path: Path, *names: str, **options: Any) -> TrlReward:
    function: Any = f"{path}:{names[0]}" if len(names) == 1 else [f"{path}:{n}" for n in names]
    judge: TrlReward = load("trl_reward", function=function, **options)
    return judge


def test_a_reward_function_of_trls_documentation_runs_as_it_is(rewards: Path) -> None:
    said = reward(rewards, "length").judge([group_of("a" * 20, "a" * 10)], None, CALL)
    assert scores(said) == [0.0, -0.5]
    assert [each.candidate_id for each in said] == [1, 2]
    assert [each.verdicts[0].raw for each in said] == ["0.0", "-0.5"]


def test_the_functions_that_trl_ships_run_as_they_are() -> None:
    thinks = load("trl_reward", function="trl.rewards:think_format_reward")
    said = thinks.judge([group_of("<think>\nhm\n</think>\n4", "4")], None, CALL)
    assert scores(said) == [1.0, 0.0]
    right = load("trl_reward", function="trl.rewards:accuracy_reward", reference="solution")
    groups = [
        group_of(r"\boxed{\frac{2}{6}}", r"\boxed{\frac{1}{2}}", reference=r"\frac{1}{3}"),
        group_of("4", first_id=9, reference="no formula"),
    ]
    said = right.judge(groups, None, CALL)
    assert scores(said) == [1.0, 0.0, None]
    assert said[2].status == "abstained"
    assert "; solution " in said[0].verdicts[0].raw  # what it gave to log_extra
    long = load(
        "trl_reward",
        function="trl.rewards:get_soft_overlong_punishment",
        arguments={"max_completion_len": 3, "soft_punish_cache": 2},
    )
    assert scores(long.judge([group_of("two tokens each")], None, CALL)) == [-0.5]


def test_a_reward_function_gets_what_the_trainer_gives_it(rewards: Path) -> None:
    judge = reward(rewards, "listens")
    more = {"topic": "sums", "prompt": "the row's own"}
    groups = [
        group_of("4", "5", reference="4", columns=more),
        group_of("Rome", first_id=9, asked="Capital?", reference="Rome", columns={"level": 2}),
    ]
    said = judge.judge(groups, None, CALL)
    assert [each.status for each in said] == ["abstained"] * 3
    [(prompts, completions, rest)] = judge.functions[0].code.__globals__["SEEN"]
    assert prompts == [[{"role": "user", "content": "2 + 2?"}]] * 2 + [
        [{"role": "user", "content": "Capital?"}]
    ]
    assert completions == [[{"role": "assistant", "content": text}] for text in ("4", "5", "Rome")]
    assert rest["completion_ids"] == [[0, 1], [1, 2], [0, 1]]
    assert rest["answer"] == ["4", "4", "Rome"]
    assert rest["topic"] == ["sums", "sums", None]
    assert rest["level"] == [None, None, 2]
    assert rest["trainer_state"].global_step == 3
    assert "prompt" not in rest


def test_text_is_given_to_a_function_that_is_annotated_so(rewards: Path) -> None:
    said = reward(rewards, "plain").judge([group_of("2 + 2? 4", "4")], None, CALL)
    assert scores(said) == [1.0, 0.0]
    asked = reward(rewards, "listens", format="text")
    asked.judge([group_of("4")], None, CALL)
    assert asked.functions[0].code.__globals__["SEEN"][-1][1] == ["4"]


def test_functions_are_summed_by_weight_and_one_that_is_none_is_left_out(rewards: Path) -> None:
    judge = reward(rewards, "exact", "only_sums", weights=[2.0, 0.5])
    said = judge.judge(
        [
            group_of("4", "5", reference="4", columns={"topic": "sums"}),
            group_of("4", first_id=9, reference="4", columns={"topic": "words"}),
        ],
        None,
        CALL,
    )
    assert scores(said) == [2.5, 0.5, 2.0]
    assert said[2].reason == "no score from only_sums"
    assert [each.member for each in said[0].verdicts] == ["exact", "only_sums"]
    assert [each.status for each in said[2].verdicts] == ["ok", "abstained"]


def test_async_functions_run_beside_plain_ones_that_run_a_loop_of_their_own(rewards: Path) -> None:
    judge = reward(rewards, "slow", "runs_its_own_loop", "length")
    [said] = judge.judge([group_of("a" * 20)], None, CALL)
    assert [each.value for each in said.verdicts] == [0.25, 0.25, 0.0]
    assert said.score == 0.5


ASKS = """
import asyncio

PORT, connected = {port}, []


async def asks(completions, **kwargs):
    if not connected:
        connected.extend(await asyncio.open_connection("127.0.0.1", PORT))
    reader, writer = connected
    said = []
    for completion in completions:
        writer.write(completion[0]["content"].encode() + b"\\n")
        said.append(float(await reader.readline()))
    return said
"""


class Echo(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line)


def test_an_async_function_may_keep_its_connection_from_batch_to_batch(tmp_path: Path) -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        path = tmp_path / "asks.py"
        path.write_text(ASKS.format(port=server.server_address[1]))
        judge = reward(path, "asks")
        said = [scores(judge.judge([group_of("4", "5")], None, CALL)) for _ in range(3)]
        [*_, writer] = judge.functions[0].code.__globals__["connected"]
        writer.close()
        server.shutdown()
    assert said == [[4.0, 5.0]] * 3


def test_what_a_function_logs_of_an_answer_is_kept_in_the_verdict(rewards: Path) -> None:
    said = reward(rewards, "logs").judge([group_of("four", "4")], None, CALL)
    assert scores(said) == [3.0, 3.0]
    assert [each.verdicts[0].raw for each in said] == ["3.0; letters 4", "3.0; letters 1"]


def test_what_is_not_a_number_has_failed_and_is_no_score(rewards: Path) -> None:
    said = reward(rewards, "length", "not_a_number").judge([group_of("a?", "a")], None, CALL)
    assert [each.status for each in said] == ["failed", "ok"]
    assert said[0].reason == "not_a_number returned nan"
    assert [each.status for each in said[0].verdicts] == ["ok", "failed"]


def test_a_function_that_loses_an_answer_is_found(rewards: Path) -> None:
    with pytest.raises(RuntimeError, match=r"rewards.py:drops_one' was given 2 .* returned 1"):
        reward(rewards, "drops_one").judge([group_of("4", "5")], None, CALL)


def test_an_exception_of_the_users_is_let_out(rewards: Path) -> None:
    with pytest.raises(ZeroDivisionError) as raised:
        reward(rewards, "broken").judge([group_of("4")], None, CALL)
    assert str(raised.traceback[-1].path) == str(rewards)


def test_a_column_that_the_prompts_lack_is_named(rewards: Path) -> None:
    with pytest.raises(UserError, match=r"exact' wants 'answer', .* no such column; there are"):
        reward(rewards, "exact").judge([group_of("4")], None, CALL)


def test_a_tensor_is_a_list(rewards: Path) -> None:
    assert scores(reward(rewards, "tensor").judge([group_of("4", "5")], None, CALL)) == [0.25] * 2


def test_no_answers_are_no_judgements(rewards: Path) -> None:
    assert reward(rewards, "drops_one").judge([], None, CALL) == []


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"function": "gone.py:f"}, "no file 'gone.py' to take a reward function from"),
        ({"function": "accuracy"}, "names no reward function; right are "),
        ({"function": "math:pi"}, "cannot be called"),
        ({"function": "trl.rewards:think_reward"}, "no reward function in trl.rewards named"),
        ({"function": ["math:sin", "math:cos"], "weights": [1.0]}, "2 functions and 1 weights"),
        ({"function": ["math:sin", "math:cos"], "arguments": {}}, "a name of its own in a file"),
    ],
)
def test_what_cannot_be_a_reward_function_is_said_at_the_start(
    options: dict[str, Any], why: str
) -> None:
    with pytest.raises(UserError, match=why):
        load("trl_reward", **options)


def test_what_fails_in_the_users_file_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "unready.py"
    path.write_text("import math\n\nLIMIT = math.nothing\n")
    with pytest.raises(UserError, match=r"nothing' \(.*unready.py:3\)$"):
        load("trl_reward", function=f"{path}:f")
    path = tmp_path / "unmade.py"
    path.write_text("def make():\n    raise KeyError('a key')\n")
    with pytest.raises(UserError, match=r"'a key' \(.*unmade.py:2\)$"):
        load("trl_reward", function=f"{path}:make", arguments={})


def test_another_text_of_a_function_is_another_version_of_the_judge(tmp_path: Path) -> None:
    versions = set()
    for n in range(2):
        path = tmp_path / f"rewards{n}.py"
        path.write_text(f"def f(completions, **_):\n    return [{n}.0] * len(completions)\n")
        versions.add(reward(path, "f").version)
    assert len(versions) == 2


# What TRL's own base classes were, and what people wrote on them.
TRL_JUDGES = """
from abc import ABC, abstractmethod


class BaseJudge(ABC):
    @abstractmethod
    def judge(self, prompts, completions, shuffle_order=True):
        raise NotImplementedError


class BasePairwiseJudge(BaseJudge):
    pass


class BaseRankJudge(ABC):
    pass


class BaseBinaryJudge(BaseJudge):
    pass


class Longer(BasePairwiseJudge):
    asked = 0

    def judge(self, prompts, completions, shuffle_order=True):
        assert not shuffle_order
        type(self).asked += 1
        return [int(len(pair[1]) > len(pair[0])) for pair in completions]


class First(BasePairwiseJudge):
    def judge(self, prompts, completions, shuffle_order=True):
        return [0 for _ in prompts]


class Fails(BasePairwiseJudge):
    def judge(self, prompts, completions, shuffle_order=True):
        return [-1 if "?" in "".join(pair) else pair.index(max(pair)) for pair in completions]


class Odd(BasePairwiseJudge):
    def judge(self, prompts, completions, shuffle_order=True):
        return [2 for _ in prompts]


class Short(BasePairwiseJudge):
    def judge(self, prompts, completions, shuffle_order=True):
        return [0]


class Lengths(BaseRankJudge):
    def __init__(self, longest_first=True):
        self.longest_first = longest_first

    def judge(self, prompts, completions, shuffle_order=True):
        return [
            sorted(range(len(own)), key=lambda n: len(own[n]), reverse=self.longest_first)
            for own in completions
        ]


class AsShown(BaseRankJudge):
    def judge(self, prompts, completions, shuffle_order=True):
        return [[-1] if "?" in "".join(own) else list(range(len(own))) for own in completions]


class Twice(BaseRankJudge):
    def judge(self, prompts, completions, shuffle_order=True):
        return [[0, 0] for _ in completions]


class Gold(BaseBinaryJudge):
    def judge(self, prompts, completions, gold_completions=None, shuffle_order=True):
        return [
            -1 if right is None else int(said == right)
            for said, right in zip(completions, gold_completions)
        ]


class Unbased:
    def judge(self, prompts: list[str], completions: list[list[str]]) -> list[int]:
        return [0 if "good" in pair[0] else 1 for pair in completions]


class Untold:
    def judge(self, prompts, completions):
        return [1 for _ in prompts]
"""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "old.py"
    path.write_text(TRL_JUDGES)
    return path


def trl_judge(path: Path, name: str, **options: Any) -> Any:
    return load("trl_judge", source=f"{path}:{name}", **options)


def test_a_pairwise_judge_of_trl_is_asked_once_in_both_orders(old: Path) -> None:
    judge = trl_judge(old, "Longer")
    said = judge.judge([group_of("aaa", "aa", "a"), group_of("b", "bb", first_id=9)], None, CALL)
    assert scores(said) == [1.0, 0.5, 0.0, 0.0, 1.0]
    assert judge.function.code.__self__.asked == 1
    assert [len(each.verdicts) for each in said] == [2, 2, 2, 1, 1]


def test_one_that_always_likes_the_first_decides_nothing(old: Path) -> None:
    said = trl_judge(old, "First").judge([group_of("a", "b", "c")], None, CALL)
    assert [each.status for each in said] == ["abstained"] * 3


def test_minus_one_is_a_failure_and_no_tie(old: Path) -> None:
    judge = trl_judge(old, "Fails")
    said = judge.judge([group_of("a?", "b"), group_of("a", "b", first_id=9)], None, CALL)
    assert [each.status for each in said] == ["failed", "failed", "ok", "ok"]
    assert scores(said)[2:] == [0.0, 1.0]
    assert said[0].verdicts[0].status == "failed"


def test_a_rank_judges_score_is_the_mean_place_in_two_orders(old: Path) -> None:
    said = trl_judge(old, "Lengths").judge([group_of("a", "aaa", "aa")], None, CALL)
    assert scores(said) == [0.0, 1.0, 0.5]
    turned = trl_judge(old, "Lengths", arguments={"longest_first": False})
    assert scores(turned.judge([group_of("a", "aaa", "aa")], None, CALL)) == [1.0, 0.0, 0.5]
    said = trl_judge(old, "AsShown").judge([group_of("a", "b", "c")], None, CALL)
    assert scores(said) == [0.5] * 3
    assert [each.variance for each in said] == [0.25, 0.0, 0.25]


def test_a_rank_judge_that_fails_gives_no_score(old: Path) -> None:
    judge = trl_judge(old, "AsShown")
    said = judge.judge([group_of("a?", "b"), group_of("alone", first_id=9)], None, CALL)
    assert [each.status for each in said] == ["failed", "failed", "abstained"]
    with pytest.raises(RuntimeError, match=r"Twice' ranked 2 answers as \[0, 0\]"):
        trl_judge(old, "Twice").judge([group_of("a", "b")], None, CALL)


def test_a_binary_judge_is_told_the_right_answer(old: Path) -> None:
    judge = trl_judge(old, "Gold")
    said = judge.judge([group_of("4", "5", reference="4"), group_of("4", first_id=9)], None, CALL)
    assert scores(said) == [1.0, 0.0, None]
    assert said[2].status == "failed"


def test_the_kind_is_told_by_base_or_annotation_or_has_to_be_said(old: Path) -> None:
    kinds = {name: trl_judge(old, name).kind for name in ("Longer", "Lengths", "Gold", "Unbased")}
    assert kinds == {
        "Longer": "pairwise",
        "Lengths": "rank",
        "Gold": "binary",
        "Unbased": "pairwise",
    }
    with pytest.raises(UserError, match="set kind"):
        trl_judge(old, "Untold")
    said = trl_judge(old, "Untold", kind="binary").judge([group_of("a")], None, CALL)
    assert scores(said) == [1.0]
    said = trl_judge(old, "Unbased").judge([group_of("good", "bad")], None, CALL)
    assert scores(said) == [1.0, 0.0]


def test_what_a_trl_judge_may_not_say_is_found(old: Path) -> None:
    with pytest.raises(RuntimeError, match=r"Odd' of kind 'pairwise' said 2"):
        trl_judge(old, "Odd").judge([group_of("a", "b")], None, CALL)
    with pytest.raises(RuntimeError, match=r"Short' was asked of 2 and said 1"):
        trl_judge(old, "Short").judge([group_of("a", "b")], None, CALL)


OPENRLHF = """
import torch


def reward_func(queries, prompts, labels, **kwargs):
    said = [query[len(prompt):] for query, prompt in zip(queries, prompts)]
    reward = torch.tensor([float(one == label) for one, label in zip(said, labels)])
    return {
        "rewards": reward * 2 - 1,
        "scores": reward,
        "extra_logs": {"letters": torch.tensor([len(q) for q in queries]), "mean": reward.mean()},
    }


def plain(queries, prompts, labels):
    return torch.tensor([float(len(query)) for query in queries])


def shows(queries, prompts, solutions):
    print(repr(queries), repr(prompts), repr(solutions))
    return [0.0] * len(queries)
"""


@pytest.fixture
def openrlhf(tmp_path: Path) -> Path:
    path = tmp_path / "reward_func.py"
    path.write_text(OPENRLHF)
    return path


def test_a_reward_func_of_openrlhf_runs_as_it_is(openrlhf: Path) -> None:
    groups = [group_of("4", "5", reference="4")]
    said = load("openrlhf", function=str(openrlhf)).judge(groups, None, CALL)
    assert scores(said) == [1.0, -1.0]
    assert said[0].verdicts[0].raw == "1.0; letters 7"
    share = load("openrlhf", function=str(openrlhf), take="scores")
    assert scores(share.judge(groups, None, CALL)) == [1.0, 0.0]
    assert scores(load("openrlhf", function=f"{openrlhf}:plain").judge(groups, None, CALL)) == [
        7,
        7,
    ]


def test_a_reward_func_can_be_shown_the_control_tokens_of_a_model(
    openrlhf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for turn in messages %}<|{{ turn.role }}|>{{ turn.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    judge = load(
        "openrlhf", function=f"{openrlhf}:shows", template_path=str(template), end="<|end|>"
    )
    judge.judge([group_of("4")], None, CALL)
    prompt = "<|user|>2 + 2?\n<|assistant|>"
    assert capsys.readouterr().out == f"{[prompt + '4<|end|>']!r} {[prompt]!r} ['']\n"


def test_a_reward_func_without_the_entry_that_is_taken_is_named(tmp_path: Path) -> None:
    path = tmp_path / "half.py"
    path.write_text("def reward_func(queries, prompts, labels):\n    return {'scores': [1.0]}\n")
    judge = load("openrlhf", function=str(path))
    with pytest.raises(RuntimeError, match="returned no 'rewards'; it returned scores"):
        judge.judge([group_of("4")], None, CALL)


RUBRICS = '''
class Parser:
    def parse_answer(self, completion):
        return completion[-1]["content"].split()[-1]


class Rubric:
    """As the library has it now."""

    def __init__(self, funcs, weights=None, parser=None):
        self.funcs, self.weights = funcs, weights or [1.0] * len(funcs)
        self.parser = parser or Parser()
        self.class_objects = {"parser": self.parser}


class OlderRubric:
    def __init__(self, funcs, weights=()):
        self.reward_funcs, self.reward_weights = funcs, list(weights)
        self.class_objects = {}

    def get_reward_funcs(self):
        return self.reward_funcs


class RubricGroup(Rubric):
    def __init__(self, rubrics):
        super().__init__([])
        self.rubrics = rubrics


class Environment:
    def __init__(self, rubric):
        self.rubric = rubric


def right(parser, completion, answer):
    return float(parser.parse_answer(completion) == answer)


async def polite(completion, state, **kwargs):
    state["polite"] = "please" in completion[-1]["content"]
    return float(state["polite"])


def was_polite(state):
    return 1.0 if state["polite"] else 0.0


def level(info, task, topic):
    return info["level"] + len(task) + len(topic)


def shortest(completions, states) -> list[float]:
    letters = [len(each[-1]["content"]) for each in completions]
    return [float(each == min(letters)) for each in letters]


def broken(completion):
    raise KeyError("no such thing")


rubric = Rubric([right, polite, was_polite], [1.0, 0.5, 0.0])
older = OlderRubric([polite, was_polite])
both = RubricGroup([rubric, OlderRubric([shortest], [2.0])])
functions = [polite, was_polite]
unheard = Rubric([right], [0.0])


def load_environment(weight=1.0):
    return Environment(Rubric([right], [weight]))
'''


@pytest.fixture
def rubrics(tmp_path: Path) -> Path:
    path = tmp_path / "rubrics.py"
    path.write_text(RUBRICS)
    return path


def verifiers(path: Path, name: str, **options: Any) -> Any:
    return load("verifiers", rubric=f"{path}:{name}", **options)


ANSWERS = group_of("please 4", "it is 4", "5", reference="4")


def test_a_rubric_of_verifiers_runs_as_it_is(rubrics: Path) -> None:
    said = verifiers(rubrics, "rubric").judge([ANSWERS], None, CALL)
    assert scores(said) == [1.5, 1.0, 0.0]
    assert [each.member for each in said[0].verdicts] == ["right", "polite", "was_polite"]
    assert [each.value for each in said[0].verdicts] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "options", "right"),
    [
        ("older", {}, [2.0, 0.0, 0.0]),
        ("both", {}, [1.5, 1.0, 2.0]),
        ("functions", {}, [2.0, 0.0, 0.0]),
        ("functions", {"weights": [1.0, 0.25]}, [1.25, 0.0, 0.0]),
        ("polite", {}, [1.0, 0.0, 0.0]),
        ("shortest", {}, [0.0, 0.0, 1.0]),
        ("load_environment", {"arguments": {"weight": 3.0}}, [3.0, 3.0, 0.0]),
    ],
)
def test_what_holds_reward_functions_is_known_by_its_shape(
    rubrics: Path, name: str, options: dict[str, Any], right: list[float]
) -> None:
    assert scores(verifiers(rubrics, name, **options).judge([ANSWERS], None, CALL)) == right


def test_a_function_gets_the_datas_columns_by_name(rubrics: Path) -> None:
    columns = {"info": {"level": 2}, "topic": "sums"}
    said = verifiers(rubrics, "level").judge(
        [group_of("4", task="gsm8k", columns=columns)], None, CALL
    )
    assert scores(said) == [2 + 5 + 4]


def test_a_function_that_the_library_would_score_zero_is_let_out(rubrics: Path) -> None:
    with pytest.raises(KeyError, match="no such thing"):
        verifiers(rubrics, "broken").judge([group_of("4")], None, CALL)


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("unheard", {}, "no reward function with a weight"),
        ("rubric", {"weights": [1.0]}, "weights of its own"),
        ("functions", {"weights": [1.0]}, "2 functions and 1 weights"),
        ("__name__", {}, "is not a rubric"),
    ],
)
def test_what_is_no_rubric_is_said_at_the_start(
    rubrics: Path, name: str, options: dict[str, Any], why: str
) -> None:
    with pytest.raises(UserError, match=why):
        verifiers(rubrics, name, **options)


def test_a_run_is_judged_by_functions_named_beside_its_file(tmp_path: Path) -> None:
    """And what another judge, the gate's, says of them agrees."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    file = scripted_toml(tmp_path, "", 0.3)
    table = '[judge]\nuse = "trl_reward"\nfunction = ["rewards.py:exact", "rewards.py:slow"]\n'
    table += "weights = [1.0, 0.0]\n"
    kept = [line for line in file.read_text().splitlines() if not line.startswith("judge = ")]
    gate = kept.index("[evaluate]") + 1
    scripted = next(line for line in file.read_text().splitlines() if line.startswith("judge = "))
    file.write_text("\n".join([*kept[:gate], scripted, *kept[gate:]]) + f"\n{table}")
    root, outcome = start(file, tmp_path / "runs", sets=["rounds=1"])
    assert outcome.code == 0
    store = Store(root / "loop.db")
    rows = store.query(
        "SELECT score, text, reference FROM judgement JOIN candidate ON candidate.id = candidate_id"
        " JOIN asked ON asked.id = asked_id JOIN prompt ON prompt.id = prompt_id"
        " WHERE judge LIKE 'trl_reward%'"
    )
    members = store.query("SELECT DISTINCT member FROM verdict WHERE judge LIKE 'trl_reward%'")
    store.close()
    assert {row["score"] for row in rows} == {0.0, 1.0}
    assert all(row["score"] == (row["text"] == row["reference"]) for row in rows)
    assert {row["member"] for row in members} == {"exact", "slow"}


def test_code_is_named_relative_to_the_file_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    file = tmp_path / "own" / "loop.toml"
    file.write_text(
        '[judge]\nuse = "panel"\n'
        '[judge.members.a]\nuse = "trl_reward"\nfunction = ["a.py:f", "trl.rewards:g"]\n'
        '[judge.members.b]\nuse = "openrlhf"\nfunction = "b.py"\n'
        '[judge.members.c]\nuse = "trl_judge"\nsource = "../c.py:C"\n'
        '[judge.members.d]\nuse = "verifiers"\nrubric = "/d.py:rubric"\n'
        '[judge.members.e]\nuse = "mine.py:Mine"\nparts = [{ use = "e.py:E", a_path = "e.txt" }]\n'
    )
    members = config.read(file).track["main"].judge.options["members"]
    own = tmp_path / "own"
    assert members["a"]["function"] == [f"{own}/a.py:f", "trl.rewards:g"]
    assert members["b"]["function"] == f"{own}/b.py"
    assert members["c"]["source"] == f"{own}/../c.py:C"
    assert members["d"]["rubric"] == "/d.py:rubric"
    assert members["e"]["parts"] == [{"use": f"{own}/e.py:E", "a_path": f"{own}/e.txt"}]


def test_a_function_that_is_not_there_is_found_before_a_run_begins(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(REWARDS)
    sets = ("--set", "judge.use=trl_reward", "--set")
    done = loop("plan", *sets, "judge.function=rewards.py:lenght", cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean 'length'?" in done.stderr
    assert loop("plan", *sets, "judge.function=rewards.py:length", cwd=tmp_path).returncode == 0

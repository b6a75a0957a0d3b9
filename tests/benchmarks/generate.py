"""Sampling with the engine's own decode loop, beside `generate` of transformers as it comes.

    python tests/benchmarks/generate.py [--passes 5] [--threads 1] [--json FILE] [--runs FOLDER]

The model is a Llama of 8 layers, 512 wide, with grouped heads and a vocabulary of 32k, random
weights, float32. The prompts are the same token ids and every completion has its full length, so
both sides make the same number of tokens. What is timed draws at temperature 1; what must agree
first are the greedy tokens. Ours records log-probabilities beside, `generate` does not. It
multiplies float32 as fast as ours does, but in "as it comes".

The last table is a call of the engine as the default's rounds make it, texts in and texts out:
their task and the model that their warm-up leaves (made under --runs, where round.py finds it too),
whose answers end by themselves. "In order": prompts are padded as they come; "by length": sorted;
both multiply by torch's default, as the round of round.py does.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import passes
import rounds

NEW = 64
CANDIDATES = (4, 16)
VOCABULARY = 32_000


def _model(positions: int, vocabulary: int = VOCABULARY, hidden: int = 512, layers: int = 8) -> Any:
    """A Llama with grouped heads."""
    from transformers import GenerationConfig

    model = models.llama(
        vocabulary=vocabulary,
        hidden=hidden,
        layers=layers,
        positions=max(2048, positions),
        intermediate_size=hidden * 11 // 4,
        num_key_value_heads=hidden // 128,
        initializer_range=0.1,  # such that greedy tokens are no ties
        tie_word_embeddings=True,
    ).eval()
    model.generation_config = GenerationConfig()
    return model


def _prompts(
    lengths: list[int], common: int, vocabulary: int = VOCABULARY
) -> list[tuple[int, ...]]:
    import torch

    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    return [tuple(drawn[0][:common] + each[common:]) for each in drawn]


def ours(
    lengths: list[int], candidates: int, common: int = 0, new: int = NEW, **of: int
) -> passes.Pass:
    from roles.policy.decoding import Decoder
    from roles.policy.rows import Row
    from store.records import Sampling

    decoder = Decoder(_model(max(lengths) + new, **of))
    prompts = _prompts(lengths, common, of.get("vocabulary", VOCABULARY))
    rows = [
        Row(prompt, 1000 * place + number, new)
        for place, prompt in enumerate(prompts)
        for number in range(candidates)
    ]

    def drawn(temperature: float) -> list[int]:
        sampling = Sampling(temperature=temperature, max_tokens=new)
        found = decoder.decode(rows, sampling, end_ids=(), most=256, bytes_at_once=2**32)
        return [token for row in found for token in row.tokens]

    return passes.Pass(lambda: drawn(1.0), lambda: {"tokens": drawn(0.0)})


def generate(
    lengths: list[int], candidates: int, common: int = 0, new: int = NEW, **of: int
) -> passes.Pass:
    """Padded on the left, each prompt as often as it has candidates."""
    import torch

    model = _model(max(lengths) + new, **of)
    prompts = _prompts(lengths, common, of.get("vocabulary", VOCABULARY))
    width = max(lengths)
    ids = torch.tensor([[0] * (width - len(each)) + list(each) for each in prompts])
    mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in prompts])

    def drawn(sample: bool) -> list[int]:
        asked: dict[str, Any] = {"do_sample": False}
        inputs, of = ids, mask
        if sample:
            asked = {"do_sample": True, "top_k": 0, "num_return_sequences": candidates}
        else:
            inputs, of = ids.repeat_interleave(candidates, 0), mask.repeat_interleave(candidates, 0)
        found = model.generate(
            inputs, attention_mask=of, max_new_tokens=new, pad_token_id=0, **asked
        )
        tokens: list[int] = found[:, width:].flatten().tolist()
        return tokens

    return passes.Pass(lambda: drawn(True), lambda: {"tokens": drawn(False)})


def generate_fast(**of: Any) -> passes.Pass:
    return models.fast(generate(**of))


def embedded(start: str, engine: str) -> passes.Pass:
    """A call of the default's generator on the checkpoint `start`.

    Raises ValueError where answers do not end, which would be other work than a round's.
    """
    import reasoning_gym

    from roles.policy.transformers import TransformersEngine
    from store.records import Message, Prompt, Sampling

    opened: Any = TransformersEngine(device="cpu")
    if engine != "ours":
        import peer_engine

        opened = peer_engine.Generate(tuned=engine == "by length")
    policy = opened.open(models.checkpoint(Path(start)))
    default = rounds.DEFAULT
    [task] = default["proposer"]["tasks"]
    of_task = {key: value for key, value in task.items() if key != "name"}
    made = reasoning_gym.create_dataset(
        task["name"], size=default["batch_prompts"], seed=1, **of_task
    )
    asked = [Prompt(messages=(Message(role="user", content=each["question"]),)) for each in made]
    count, longest = default["generator"]["n"], default["generator"]["max_tokens"]
    seeds = [[count * place + n for n in range(count)] for place in range(len(asked))]

    def answers(temperature: float) -> list[Any]:
        sampling = Sampling(temperature=temperature, max_tokens=longest)
        groups = policy.sample(asked, sampling=sampling, seeds=seeds)
        return [each for group in groups for each in group]

    def agreement() -> passes.Figures:
        greedy = answers(0.0)
        ended = sum(each.finish_reason == "stop" for each in greedy)
        if ended < 0.9 * len(greedy):
            raise ValueError(f"{ended} of {len(greedy)} answers ended, of a model that was trained")
        return {"tokens": [token for each in greedy for token in each.token_ids]}

    return passes.Pass(lambda: answers(1.0), agreement)


def tables(settings: passes.Settings, start: Path) -> Iterator[passes.Table]:
    asked: dict[str, dict[str, Any]] = {
        f"{n} candidates of a prompt of 512 tokens, {NEW} new": {"lengths": [512], "candidates": n}
        for n in CANDIDATES
    }
    asked["a judge's verdicts: 16 prompts of 416 to 446 tokens, 384 of them a rubric, 16 new"] = {
        "lengths": [416 + 2 * n for n in range(16)],
        "candidates": 1,
        "common": 384,
        "new": 16,
    }
    asked["4 candidates of each of 4 prompts of 150 to 300 tokens, 32 new"] = {
        "lengths": [150, 200, 250, 300],
        "candidates": 4,
        "new": 32,
    }
    for title, of in asked.items():
        variants: dict[str, passes.Setup] = {"ours": (ours, of), "generate": (generate_fast, of)}
        if of["candidates"] <= min(CANDIDATES):  # elsewhere it would take minutes
            variants["generate as it comes"] = (generate, of)
        yield passes.compare(
            f"sampling {title}: 8 layers, hidden 512, vocabulary {VOCABULARY:,}, float32",
            variants,
            baseline="ours",
            agree={"tokens": 0},
            settings=settings,
            quoted={"generate": "ours"},
        )
    of_default = rounds.DEFAULT["generator"]
    yield passes.compare(
        f"sampling by `loop start`, {of_default['n']} candidates of each of "
        f"{rounds.DEFAULT['batch_prompts']} prompts, answers that end within "
        f"{of_default['max_tokens']} tokens: {rounds.SHAPE}, float32",
        {
            "ours": (embedded, {"start": str(start), "engine": "ours"}),
            "generate, in order": (embedded, {"start": str(start), "engine": "in order"}),
            "generate, by length": (embedded, {"start": str(start), "engine": "by length"}),
        },
        baseline="ours",
        agree={"tokens": 0},
        settings=settings,
        quoted={"generate, by length": "ours"},
    )


def main() -> None:
    parser = passes.parser()
    parser.add_argument("--runs", type=Path, default=Path("runs/costs/round"))
    asked = parser.parse_args()
    settings = passes.Settings(asked.passes, asked.threads, asked.limit_s)
    passes.show(tables(settings, rounds.warmed_up(asked.runs.resolve())), asked.json)


if __name__ == "__main__":
    main()

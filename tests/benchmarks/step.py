"""A whole DPO step, without the optimizer: body, head, loss and every gradient.

`python tests/benchmarks/step.py`; the options are those of passes.py. The model is a Llama of
hidden size 512 with 4 layers and a vocabulary of 32,000, random weights, trained whole; a batch is
4 pairs, prompts and answers of 96 to 160 tokens each, so half of a row is prompt. Everybody gets
the same ids and another model for the reference, so that the loss is not where it starts.

TRL default is its DPOTrainer as it comes: bfloat16, gradients checkpointed, the reference a second
model that runs in each step. Tuned: the reference computed beforehand, nothing checkpointed. Ours
computes the reference beforehand too; "with its reference" adds that pass to the step, as an epoch
of training pays it. Naive is transformers' own logits of the answers' tokens.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import passes
import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from roles.policy import adapters, embedded
from roles.trainers.guards import quiet
from roles.trainers.options import Options
from roles.trainers.pairs import PairTrainer
from roles.trainers.preference import Preference
from roles.trainers.reference import Scores
from roles.trainers.rows import Row, Tokens
from roles.trainers.training import Session
from store.records import Call, Checkpoint

BETA = 0.1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Sizes:
    """The tables' own, where nobody asks for others."""

    prompts: int = 4
    pairs: int = 1
    """Of each prompt."""
    prompt: tuple[int, int] = (96, 160)
    """Tokens, from and to."""
    answer: tuple[int, int] = (96, 160)
    vocabulary: int = 32_000
    hidden: int = 512
    layers: int = 4


OWN = Sizes()


def model(seed: int, rank: int = 0, sizes: Sizes = OWN) -> Any:
    torch.manual_seed(seed)
    heads = sizes.hidden // 64
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.hidden,
            intermediate_size=-(-8 * sizes.hidden // 96) * 32,
            num_hidden_layers=sizes.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=max(1024, sizes.prompt[1] + sizes.answer[1]),
            pad_token_id=0,
        )
    )
    if rank:
        adapters.add(
            made, rank=rank, alpha=2.0 * rank, dropout=0.0, targets="all-linear", seed=seed
        )
    return made


def rows(sizes: Sizes = OWN) -> list[Row]:
    chance = random.Random(0)

    def ids(lengths: tuple[int, int]) -> tuple[int, ...]:
        length = chance.randint(*lengths)
        return tuple(chance.randrange(1, sizes.vocabulary) for _ in range(length))

    found: list[Row] = []
    for _ in range(sizes.prompts):
        prompt = ids(sizes.prompt)
        for _ in range(sizes.pairs):
            chosen, rejected = ids(sizes.answer), ids(sizes.answer)
            sides = [Tokens(prompt, side, (True,) * len(side)) for side in (chosen, rejected)]
            found.append(Row(len(found), 1.0, *sides))
    return found


def _tokenizer(folder: Path) -> Any:
    embedded.build(folder, 0)
    return AutoTokenizer.from_pretrained(folder)


def _passed(trainer: Any, batch: dict[str, Any], before: Callable[[], Any] = int) -> passes.Pass:
    trainer.current_gradient_accumulation_steps = 1
    wrapped = trainer.accelerator.prepare_model(trainer.model)
    losses: list[float] = []

    def run() -> None:
        trainer.model.zero_grad()
        trainer._metrics["train"].clear()
        before()
        losses.append(trainer.training_step(wrapped, dict(batch)).item())

    return passes.Pass(run, lambda: _figures(losses[-1], trainer.model))


def _figures(loss: float, trained: Any) -> passes.Figures:
    grads = [each.grad.double().norm() for each in trained.parameters() if each.grad is not None]
    return {"loss": loss, "grad_norm": torch.stack(grads).norm().item()}


def ours(dtype: str, rank: int = 0, reference: bool = False, **of: Any) -> passes.Pass:
    sizes = Sizes(**of)
    found = rows(sizes)
    into = Path(tempfile.mkdtemp())
    start = Checkpoint(
        model="policy", path=into, digest="d", tokenizer_digest="t", template_digest="c", bytes=1
    )
    options: Options = Preference(beta=BETA, batch_size=len(found), device="cpu")
    call = Call(seed=0, round=1, stage="train")
    opened = Session(
        options, found, _tokenizer(into / "t"), start, into, call, "cpu", DTYPES[dtype]
    )
    opened.saves.mkdir()
    scores = Scores(opened.saves / "reference.json")
    with quiet():
        PairTrainer(model(1, sizes=sizes), opened, scores, False)
        trainer = PairTrainer(model(0, rank, sizes), opened, scores, False)
    batch = {"row": torch.arange(len(found))}
    trainer.step_batches = [batch]
    sides = {side for row in opened.rows for side in row.sides}
    return _passed(trainer, batch, (lambda: trainer._score(sides)) if reference else int)


def trl(dtype: str, tuned: bool, rank: int = 0, **of: Any) -> passes.Pass:
    sizes = Sizes(**of)
    folder = Path(tempfile.mkdtemp())
    said = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with quiet():
        # Its reference is computed for this batch, so not by what it calls precompute.
        trainer = DPOTrainer(
            model=model(0, rank, sizes),
            ref_model=model(1, sizes=sizes),
            args=DPOConfig(
                output_dir=str(folder),
                beta=BETA,
                bf16=dtype == "bfloat16",
                gradient_checkpointing=not tuned,
                use_cpu=True,
                report_to="none",
                max_length=None,
            ),
            train_dataset=said,
            processing_class=_tokenizer(folder / "t"),
        )
    batch = DataCollatorForPreference(pad_token_id=0)(
        [
            {
                "prompt_ids": list(row.chosen.prompt),
                "chosen_ids": list(row.chosen.answer),
                "rejected_ids": list(row.rejected.answer),
            }
            for row in rows(sizes)
            if row.rejected is not None
        ]
    )
    if tuned:
        found = trainer.compute_ref_log_probs(trainer.ref_model, batch)
        batch["ref_chosen_logps"], batch["ref_rejected_logps"] = found
        trainer.ref_model, trainer.precompute_ref_logps = None, True
    else:
        trainer.model.gradient_checkpointing_enable()
    return _passed(trainer, batch)


def naive(dtype: str) -> passes.Pass:
    trained, other = model(0), model(1)
    sides = [side for row in rows() for side in row.sides]
    padded = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(side.ids) for side in sides], batch_first=True
    )
    mask = torch.zeros_like(padded)
    wanted = torch.zeros_like(padded, dtype=torch.bool)
    for place, side in enumerate(sides):
        mask[place, : side.length] = 1
        wanted[place, len(side.prompt) : side.length] = True
    counts = [len(side.answer) for side in sides]

    def logps(scored: Any) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            hidden = scored.model(input_ids=padded, attention_mask=mask).last_hidden_state
            logits = scored.lm_head(hidden[:, :-1][wanted[:, 1:]])
        found = logits.float().log_softmax(-1).gather(1, padded[wanted][:, None])[:, 0]
        return torch.stack([each.sum() for each in found.split(counts)])

    with torch.no_grad():
        references = logps(other)
    del other
    losses: list[float] = []

    def run() -> None:
        trained.zero_grad()
        ratios = (logps(trained) - references).view(-1, 2)
        loss = -torch.nn.functional.logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1])).mean()
        loss.backward()
        losses.append(loss.item())

    return passes.Pass(run, lambda: _figures(losses[-1], trained))


def tables(settings: passes.Settings) -> Iterator[passes.Table]:
    for dtype, tolerance in (("bfloat16", 0.03), ("float32", 1e-3)):
        of = {"dtype": dtype}
        yield passes.compare(
            f"a DPO step, {dtype}, prompts half of the tokens",
            {
                "ours": (ours, of),
                "ours with its reference": (ours, of | {"reference": True}),
                "TRL tuned": (trl, of | {"tuned": True}),
                "TRL default": (trl, of | {"tuned": False}),
                "naive": (naive, of),
            },
            baseline="ours",
            agree={"loss": tolerance, "grad_norm": tolerance},
            settings=settings,
        )
    of = {"dtype": "bfloat16", "rank": 16}
    yield passes.compare(
        "a DPO step of an adapter of rank 16, bfloat16, prompts half of the tokens",
        {
            "ours": (ours, of),
            "TRL tuned": (trl, of | {"tuned": True}),
            "TRL default": (trl, of | {"tuned": False}),
        },
        baseline="ours",
        agree={"loss": 0.03, "grad_norm": 0.03},
        settings=settings,
    )


if __name__ == "__main__":
    passes.main(tables)

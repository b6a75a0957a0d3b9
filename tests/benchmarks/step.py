"""A whole DPO step, without the optimizer: body, head, loss and every gradient.

`python tests/benchmarks/step.py`; the options are those of passes.py. The model is a Llama of
hidden size 512 with 4 layers and a vocabulary of 32,000, random weights, trained whole; a batch is
4 pairs, prompts and answers of 96 to 160 tokens each, so half of a row is prompt. Everybody gets
the same ids and another model for the reference, so that the loss is not where it starts.

TRL as it comes: its DPOTrainer in bfloat16, gradients checkpointed, the reference a second model
that runs in each step. Tuned: the reference computed beforehand, nothing checkpointed, float32
multiplied as fast as ours does, as it is in the other peers. Ours
computes the reference beforehand too; "ours with its reference" adds that pass to the step, as an
epoch of training pays it. Liger's loss takes no log-probabilities of a reference, only its hidden
states and head, so that its row has the reference in each step, as TRL had when it used Liger.
Naive is transformers' own logits of the answers' tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import passes
import torch
from datasets import Dataset
from step_batch import OWN, Padded, Sizes, model, rows
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from roles.policy import embedded
from roles.trainers.guards import quiet
from roles.trainers.options import Options
from roles.trainers.pairs import PairTrainer
from roles.trainers.preference import Preference
from roles.trainers.reference import Scores
from roles.trainers.training import Session
from store.records import Call

BETA = 0.1
SHAPE = (
    f"{OWN.layers} layers, hidden {OWN.hidden}, vocabulary {OWN.vocabulary:,}; {OWN.prompts} "
    "pairs, prompts and answers of {} to {} tokens each".format(*OWN.prompt)
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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

    return passes.Pass(run, lambda: models.figures(losses[-1], trainer.model.parameters()))


def ours(dtype: str, rank: int = 0, reference: bool = False, **of: Any) -> passes.Pass:
    sizes = Sizes(**of)
    found = rows(sizes)
    into = Path(tempfile.mkdtemp())
    options: Options = Preference(beta=BETA, batch_size=len(found), device="cpu")
    call = Call(seed=0, round=1, stage="train")
    opened = Session(
        options,
        found,
        _tokenizer(into / "t"),
        models.checkpoint(into),
        into,
        call,
        "cpu",
        DTYPES[dtype],
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
        return models.fast(_passed(trainer, batch))
    trainer.model.gradient_checkpointing_enable()
    return _passed(trainer, batch)


def _plain(trained: Any, dtype: str, loss_of: Callable[[], torch.Tensor]) -> passes.Pass:
    losses: list[float] = []

    def run() -> None:
        trained.zero_grad()
        with _autocast(dtype):
            loss = loss_of()
        loss.backward()
        losses.append(loss.item())

    return models.fast(passes.Pass(run, lambda: models.figures(losses[-1], trained.parameters())))


def _autocast(dtype: str) -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16")


def naive(dtype: str) -> passes.Pass:
    trained, other = model(0), model(1)
    sides = [side for row in rows() for side in row.sides]
    batch = Padded.of(sides)
    counts = [len(side.answer) for side in sides]

    def logps(scored: Any) -> torch.Tensor:
        logits = scored.lm_head(batch.hidden(scored)[batch.answers[:, 1:]])
        target = batch.ids[batch.answers][:, None]
        found = logits.float().log_softmax(-1).gather(1, target)[:, 0]
        return torch.stack([each.sum() for each in found.split(counts)])

    with torch.no_grad(), _autocast(dtype):
        references = logps(other)
    del other

    def loss() -> torch.Tensor:
        ratios = (logps(trained) - references).view(-1, 2)
        return -torch.nn.functional.logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1])).mean()

    return _plain(trained, dtype, loss)


def liger(dtype: str) -> passes.Pass:
    """Liger's head and loss on transformers' body."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    except ImportError as error:
        raise passes.Unavailable(str(error)) from error
    trained, other = model(0), model(1)
    found = [row.sides for row in rows()]
    sides = [side[0] for side in found] + [side[1] for side in found]  # as Liger stacks them
    batch = Padded.of(sides)
    first = min(len(side.prompt) for side in sides) - 1
    labels = batch.ids.masked_fill(~batch.answers, -100)[:, first + 1 :].contiguous()
    fused = LigerFusedLinearDPOLoss(beta=BETA)

    def loss() -> torch.Tensor:
        with torch.no_grad():
            reference = batch.hidden(other)[:, first:]
        return fused(  # type: ignore[no-any-return]
            trained.lm_head.weight,
            batch.hidden(trained)[:, first:],
            labels,
            ref_input=reference,
            ref_weight=other.lm_head.weight,
        )[0]

    return _plain(trained, dtype, loss)


def tables(settings: passes.Settings) -> Iterator[passes.Table]:
    for dtype, tolerance in (("bfloat16", 0.03), ("float32", 1e-3)):
        of = {"dtype": dtype}
        variants = {
            "ours": (ours, of),
            "ours with its reference": (ours, of | {"reference": True}),
            "TRL tuned": (trl, of | {"tuned": True}),
            "Liger with its reference": (liger, of),
            "naive": (naive, of),
        }
        quoted = {
            "naive": "ours",
            "TRL tuned": "ours",
            "Liger with its reference": "ours with its reference",
        }
        if dtype == "bfloat16":  # which is how it comes
            variants["TRL as it comes"] = (trl, of | {"tuned": False})
            quoted["TRL as it comes"] = "ours with its reference"
        yield passes.compare(
            f"a DPO step, {dtype}: {SHAPE}",
            variants,
            baseline="ours",
            agree={"loss": tolerance, "grad_norm": tolerance},
            settings=settings,
            quoted=quoted,
        )
    of = {"dtype": "bfloat16", "rank": 16}
    yield passes.compare(
        f"a DPO step of an adapter of rank 16, bfloat16: {SHAPE}",
        {"ours": (ours, of), "TRL tuned": (trl, of | {"tuned": True})},
        baseline="ours",
        agree={"loss": 0.03, "grad_norm": 0.03},
        settings=settings,
        quoted={"TRL tuned": "ours"},
    )


if __name__ == "__main__":
    passes.main(tables)

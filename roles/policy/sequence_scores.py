"""A sequence-classification model, and its logits of whole conversations.

Conversations of one prompt begin alike, and a model that reads from left to right reads that
beginning once for all of them.
Checked when it is made, so that what is wrong with it is said before a run begins; its weights are
loaded at the first conversation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from kernels.causal import alike, backbone, few_ids
from kernels.grouped_hidden import grouped_hidden
from kernels.matmul import fast_float32
from kernels.sharing import shared_room
from roles.policy import devices
from roles.policy.devices import Device
from roles.policy.folders import quiet
from roles.policy.rows import Ids
from roles.policy.scoring import batches
from roles.policy.turns import closing_ids, conversation_ids
from store.errors import UserError
from store.records import Call, Prompt

_END: Ids = (0,)
"""Stands behind a conversation: what would predict it is what is read at the last token."""

_FETCHED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]


class Dropout(NamedTuple):
    """Features of the last hidden state that are dropped, each with probability `rate`, once for
    each seed: all conversations of a draw lose the same ones. Source: Monte Carlo dropout,
    https://arxiv.org/abs/1506.02142, over the last layer alone."""

    rate: float
    seeds: Sequence[int]


class SequenceScores:
    """One label's logit at the end of a conversation.

    label: None is the only one there is. Raises UserError for a path that is no such model.
    """

    def __init__(self, path: str, label: int | None, dtype: str, device: Device) -> None:
        self.folder, self._revision = _located(path)
        self._device = devices.find(device)
        self._dtype = "float32" if dtype == "auto" and self._device.type == "cpu" else dtype
        if dtype == "bfloat16":
            devices.check_bfloat16(self._device)
        with quiet():
            self._config = _read(path, AutoConfig, self.folder)
            _refuse_other_kinds(path, self._config)
            self._tokenizer = _read(path, AutoTokenizer, self.folder)
        self.label = _chosen(path, label, self._config)
        self._closing = closing_ids(self._tokenizer)
        self._pad_id = self._padding(path)
        self._weights: Any = None
        self._scored_apart: bool | None = None
        if not any(self.folder.glob("*.safetensors")):
            raise UserError(
                f"the reward model {path!r} has no safetensors; other weights can run code and are "
                "not loaded"
            )

    @cached_property
    def digest(self) -> str:
        """Of the weights and of what writes a conversation: on the Hub its revision."""
        return self._revision or _digest(self.folder)

    @property
    def context(self) -> int | None:
        """How many tokens it can read; None when its configuration does not say."""
        found = getattr(self._config.get_text_config(), "max_position_embeddings", None)
        return None if found is None else int(found)

    def ids(self, prompt: Prompt, answer: str) -> Ids | None:
        """The conversation that ends with this answer, its turn closed; None when the chat template
        does not write the answer as it is."""
        found = conversation_ids(self._tokenizer, prompt, answer, self._closing)
        return None if found is None else tuple(found)

    def logits(
        self,
        groups: Sequence[Sequence[Ids]],
        batch_tokens: int,
        call: Call,
        dropout: Dropout | None = None,
    ) -> dict[Ids, tuple[float, ...]]:
        """The label's logit of each conversation, and behind it one for each draw of a dropout.

        Conversations of a group share their beginning. A pass takes batch_tokens, what it keeps of
        beginnings included, or one conversation. Raises UserError for a dropout where the logit is
        not what one linear layer makes of the last token's hidden state.
        """
        _stop_when_told(call)
        if not any(groups):
            return {}
        found: dict[Ids, tuple[float, ...]] = {}
        with torch.inference_mode(), fast_float32():
            apart = self._scores_apart
            kept_KH = None if dropout is None else self._kept(dropout, apart)
            read = {ids: self._read(ids) if apart else ids for group in groups for ids in group}
            alone = {ids: [_END] for ids in read}
            begun = _begun([[read[ids] for ids in group] for group in groups]) if apart else alone
            for batch in batches(begun, batch_tokens):
                _stop_when_told(call)
                if apart:
                    found |= self._apart(batch, batch_tokens, kept_KH)
                else:
                    found |= self._whole(list(batch))
                call.progress(len(found), sum(map(len, begun.values())))
        return {ids: found[until] for ids, until in read.items()}

    def close(self) -> None:
        """Free the memory of the weights."""
        self._weights = None
        devices.give_back()

    def _read(self, ids: Ids) -> Ids:
        """What of a conversation is read: to the last token that does not pad."""
        end = max((place for place, token in enumerate(ids, 1) if token != self._pad_id), default=1)
        return ids[:end]

    def _kept(self, dropout: Dropout, apart: bool) -> torch.Tensor:
        """[K, H]: by what each feature of the last hidden state is multiplied in each draw."""
        if not apart:
            raise UserError(
                f"the reward model {str(self.folder)!r} does not score by one linear layer over "
                "the last token, before which features could be dropped; leave votes at 1"
            )
        width = self._model.score.in_features
        rows = []
        for seed in dropout.seeds:
            drawn = torch.rand(width, generator=torch.Generator().manual_seed(seed))
            rows.append((drawn >= dropout.rate) / (1 - dropout.rate))
        return torch.stack(rows).to(self._device)

    def _apart(
        self, batch: dict[Ids, list[Ids]], batch_tokens: int, kept_KH: torch.Tensor | None
    ) -> dict[Ids, tuple[float, ...]]:
        grouped = grouped_hidden(
            self._model, list(batch), list(batch.values()), budget=batch_tokens
        )
        last_SH = grouped.hidden[grouped.cu_seqlens[1:] - 1]
        rows = [(*start, *rest[:-1]) for start, several in batch.items() for rest in several]
        logits_SK = self._model.score(last_SH)[:, self.label, None]
        if kept_KH is not None:
            weight_H = self._model.score.weight[self.label]
            bias = self._model.score.bias
            drawn_SK = (last_SH @ (kept_KH * weight_H).to(last_SH.dtype).T).float()
            drawn_SK = drawn_SK if bias is None else drawn_SK + bias[self.label]
            logits_SK = torch.cat([logits_SK.float(), drawn_SK], dim=1)
        return _by_row(rows, logits_SK)

    def _whole(self, rows: Sequence[Ids]) -> dict[Ids, tuple[float, ...]]:
        # On the right: a causal model then reads nothing of it before an answer's last token.
        input_ids = torch.full((len(rows), max(map(len, rows))), self._pad_id)
        mask = torch.zeros_like(input_ids)
        for at, row in enumerate(rows):
            input_ids[at, : len(row)] = torch.tensor(row)
            mask[at, : len(row)] = 1
        logits_BL = self._model(
            input_ids=input_ids.to(self._device), attention_mask=mask.to(self._device)
        ).logits
        return _by_row(rows, logits_BL[:, self.label, None])

    @property
    def _scores_apart(self) -> bool:
        """Whether a logit is what `score` makes of the last token's hidden state, and that can be
        had from a shared beginning: as the model's classes say, held once to its own logits."""
        if self._scored_apart is None:
            score = getattr(self._model, "score", None)
            self._scored_apart = type(score) is nn.Linear and shared_room(self._model) > 0
            if self._scored_apart:
                ids_BT = few_ids(self._model, 6)
                ids_BT = ids_BT[ids_BT != self._pad_id][None]
                hidden_BTH = backbone(self._model)(input_ids=ids_BT).last_hidden_state
                own_BL = self._model(input_ids=ids_BT).logits
                self._scored_apart = alike(own_BL, self._model.score(hidden_BTH[:, -1]))
        return self._scored_apart

    @property
    def _model(self) -> Any:
        if self._weights is None:
            with quiet():
                model = AutoModelForSequenceClassification.from_pretrained(
                    self.folder, config=self._config, dtype=self._dtype, use_safetensors=True
                )
            self._weights = model.to(self._device).eval()
        return self._weights

    def _padding(self, path: str) -> int:
        text = self._config.get_text_config()
        if text.pad_token_id is None:
            text.pad_token_id = self._tokenizer.pad_token_id
        if text.pad_token_id is None:
            raise UserError(
                f"the reward model {path!r} has no token that pads, by which it finds the end of "
                "an answer; set pad_token_id in its config.json to the one it was trained with"
            )
        return int(text.pad_token_id)


def _by_row(rows: Sequence[Ids], logits_SK: torch.Tensor) -> dict[Ids, tuple[float, ...]]:
    return dict(zip(rows, map(tuple, logits_SK.float().tolist()), strict=True))


def _stop_when_told(call: Call) -> None:
    if call.stopping():
        raise KeyboardInterrupt


def _begun(groups: Sequence[Sequence[Ids]]) -> dict[Ids, list[Ids]]:
    """How conversations of a group begin -> the rest of each and _END; each conversation once."""
    begun: dict[Ids, list[Ids]] = {}
    seen: set[Ids] = set()
    for group in groups:
        fresh = [ids for ids in dict.fromkeys(group) if ids not in seen]
        seen.update(fresh)
        # What the first and the last in order have in common all between them have.
        pairs = zip(min(fresh, default=()), max(fresh, default=()), strict=False)
        shared = tuple(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        for ids in fresh:
            start = shared or ids
            begun.setdefault(start, []).append((*ids[len(start) :], *_END))
    return begun


def _located(path: str) -> tuple[Path, str | None]:
    """The folder of a model, and for one of the Hub its revision."""
    if Path(path).is_dir():
        return Path(path), None
    if path.count("/") > 1 or path.startswith((".", "~", "/")):
        raise UserError(f"no reward model {path!r}: there is no such folder")
    try:
        found = Path(snapshot_download(path, allow_patterns=_FETCHED))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise UserError(
            f"no reward model {path!r}: there is no such folder, and the Hub did not give it "
            f"({type(error).__name__})"
        ) from error
    return found, found.name


def _read(path: str, kind: Any, folder: Path) -> Any:
    try:
        return kind.from_pretrained(folder)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"the reward model {path!r} cannot be loaded: {said[:300]}") from error


def _refuse_other_kinds(path: str, config: Any) -> None:
    kinds = config.architectures or [f"a {config.model_type} without architectures"]
    if not any("SequenceClassification" in kind for kind in kinds):
        raise UserError(
            f"the reward model {path!r} is {', '.join(kinds)} by its config.json, and no "
            "sequence-classification model; `loop judges train` makes one of a run's pairs"
        )


def _chosen(path: str, label: int | None, config: Any) -> int:
    count = int(config.num_labels)
    named = ", ".join(f"{number} ({name})" for number, name in sorted(config.id2label.items()))
    if label is None and count > 1:
        raise UserError(
            f"the reward model {path!r} has {count} labels; set label to one of {named}"
        )
    if label is not None and label >= count:
        raise UserError(f"the reward model {path!r} has no label {label}; there are: {named}")
    return label or 0


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(file for pattern in _FETCHED for file in folder.glob(pattern)):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()

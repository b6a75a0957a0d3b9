"""A sequence-classification model, and its logits of whole conversations.

Checked when it is made, so that what is wrong with it is said before a run begins; its weights are
loaded at the first conversation.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from judges.asking import stop_when_told
from roles.policy import devices
from roles.policy.devices import Device
from roles.policy.folders import quiet
from roles.policy.turns import closing_ids, conversation_ids
from store.errors import UserError
from store.records import Call, Prompt

_FETCHED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]


class SequenceScores:
    """One label's logit at the end of a conversation.

    label: None is the only one there is. Raises UserError for a path that is no such model.
    """

    def __init__(self, path: str, label: int | None, dtype: str, device: Device) -> None:
        self.folder, revision = _located(path)
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
        if not any(self.folder.glob("*.safetensors")):
            raise UserError(
                f"the reward model {path!r} has no safetensors; other weights can run code and are "
                "not loaded"
            )
        self.digest = revision or _digest(self.folder)
        """Of the weights and of what writes a conversation: on the Hub its revision."""

    @property
    def context(self) -> int | None:
        """How many tokens it can read; None when its configuration does not say."""
        found = getattr(self._config.get_text_config(), "max_position_embeddings", None)
        return None if found is None else int(found)

    def ids(self, prompt: Prompt, answer: str) -> list[int] | None:
        """The conversation that ends with this answer, its turn closed; None when the chat template
        does not write the answer as it is."""
        return conversation_ids(self._tokenizer, prompt, answer, self._closing)

    def logits(
        self, conversations: Sequence[Sequence[int]], batch_tokens: int, call: Call
    ) -> list[float]:
        """The label's logit of each, in order. A pass takes batch_tokens, or one conversation."""
        order = sorted(range(len(conversations)), key=lambda at: (len(conversations[at]), at))
        found: dict[int, float] = {}
        while order:
            stop_when_told(call)
            rows = 1
            while (
                rows < len(order) and (rows + 1) * len(conversations[order[rows]]) <= batch_tokens
            ):
                rows += 1
            batch, order = order[:rows], order[rows:]
            scored = self._pass([conversations[at] for at in batch])
            found |= zip(batch, scored, strict=True)
            call.progress(len(found), len(conversations))
        return [found[at] for at in range(len(conversations))]

    def close(self) -> None:
        """Free the memory of the weights."""
        self._weights = None
        if self._device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def _pass(self, rows: Sequence[Sequence[int]]) -> list[float]:
        # On the right: a causal model then reads nothing of it before an answer's last token.
        input_ids = torch.full((len(rows), max(map(len, rows))), self._pad_id)
        mask = torch.zeros_like(input_ids)
        for at, row in enumerate(rows):
            input_ids[at, : len(row)] = torch.tensor(row)
            mask[at, : len(row)] = 1
        with torch.inference_mode():
            logits_BL = self._model(
                input_ids=input_ids.to(self._device), attention_mask=mask.to(self._device)
            ).logits
        scored: list[float] = logits_BL[:, self.label].float().tolist()
        return scored

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

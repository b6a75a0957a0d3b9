"""Weights on disk: written aside, made durable, renamed; a folder under its name is complete.

The name follows from round and model, so a killed run that comes back finds what it had finished
by looking where it would write.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from store.errors import UserError
from store.records import Checkpoint

TRAINING = "training.json"
"""How the training went, beside its weights until the store has it. Not part of the digest."""
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


def folder(root: Path, round: int, model: str) -> Path:
    """Where the checkpoint of a round and model lies under a run directory."""
    return root / "checkpoints" / f"round-{round:04d}-{model}"


def aside(final: Path) -> Path:
    """Where it is written until it is complete."""
    return final.with_name(final.name + ".part")


def publish(final: Path) -> None:
    """Make what was written aside durable and give it its name. Raises for a pickle."""
    part = aside(final)
    files = list(_files(part))
    if found := pickles(part):
        raise RuntimeError(f"a checkpoint holds safetensors only, found {found[0]}")
    for file in files:
        _fsync(file)
    for parent in {file.parent for file in files} | {part}:
        _fsync(parent)
    part.rename(final)
    _fsync(final.parent)


def pickles(path: Path) -> list[Path]:
    """The files of a folder that could run code when they are loaded."""
    return [file for file in _files(path) if file.suffix in PICKLES]


def measure(path: Path, model: str, *, parent_id: int | None = None) -> Checkpoint:
    """The checkpoint that lies in a folder: its digests and size."""
    digest, size = _digest(path)
    tokenizer, template = _tokenizer_digests(path)
    return Checkpoint(
        model=model,
        path=path,
        digest=digest,
        tokenizer_digest=tokenizer,
        template_digest=template,
        bytes=size,
        parent_id=parent_id,
    )


def intact(checkpoint: Checkpoint) -> bool:
    """Whether the folder still holds, byte for byte, what was recorded."""
    return checkpoint.path.is_dir() and _digest(checkpoint.path)[0] == checkpoint.digest


def remove(path: Path) -> None:
    """Delete a folder such that no half of it is ever found under its name."""
    if path.exists():
        gone = path.with_name(path.name + ".gone")
        if gone.exists():
            shutil.rmtree(gone)  # an earlier deletion of the same name was interrupted
        path.rename(gone)
        shutil.rmtree(gone)


def sweep(root: Path) -> None:
    """Finish deletions that a kill interrupted."""
    for gone in (root / "checkpoints").glob("*.gone"):
        shutil.rmtree(gone)


def link_best(root: Path, path: Path) -> None:
    """Point `checkpoints/best` at a checkpoint, in one step."""
    link = root / "checkpoints" / "best"
    made = link.with_name("best.new")
    made.unlink(missing_ok=True)
    # Relative inside the run, so that it can be moved; what lies elsewhere stays where it is.
    inside = path.is_relative_to(link.parent)
    made.symlink_to(path.relative_to(link.parent) if inside else path.absolute())
    made.replace(link)


def locate(path: str) -> Path:
    """The folder of a model: a folder as it is, a Hub id as its local snapshot.

    Raises UserError when it is neither, or the Hub cannot be asked.
    """
    if not path.strip():
        raise UserError('model.path is empty; right are a folder, a Hub id or "embedded"')
    if Path(path).is_dir():
        found = Path(path).resolve()
    elif path.count("/") > 1 or path.startswith((".", "~", "/")):
        raise UserError(f"no model folder {path!r}")
    else:
        found = _snapshot(path)
    if not (found / "config.json").is_file():
        raise UserError(f"{found} is not a model folder: it has no config.json")
    try:
        table = json.loads((found / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{found / 'config.json'} cannot be read as JSON: {error}") from error
    if not isinstance(table, dict):
        raise UserError(f"{found / 'config.json'} is not a JSON table, found {str(table)[:40]!r}")
    return found


def _snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise UserError(
            f"no model {name!r}: there is no such folder, and the Hub did not give it "
            f"({type(error).__name__})"
        ) from error


def _files(path: Path) -> Iterator[Path]:
    return (file for file in sorted(path.rglob("*")) if file.is_file())


def _digest(path: Path) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    for file in _files(path):
        relative = file.relative_to(path)
        if relative.name == TRAINING or relative.parts[0].startswith("."):
            continue
        with file.open("rb") as opened:
            digest.update(f"{relative.as_posix()}\0{file.stat().st_size}\0".encode())
            while block := opened.read(1 << 20):
                digest.update(block)
                size += len(block)
    return digest.hexdigest(), size


def _tokenizer_digests(path: Path) -> tuple[str, str]:
    """Digests of the tokenizer and of the chat template."""
    tokenizer = hashlib.sha256()
    if (path / "tokenizer.json").is_file():
        content = json.loads((path / "tokenizer.json").read_text())
        # A tokenizer that has padded a batch saves that; it encodes no differently for it.
        content |= {"padding": None, "truncation": None}
        tokenizer.update(json.dumps(content, sort_keys=True).encode())
    else:
        for name in ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt"):
            if (path / name).is_file():
                tokenizer.update((path / name).read_bytes())
    template = ""
    if (path / "chat_template.jinja").is_file():
        template = (path / "chat_template.jinja").read_text()
    elif (path / "tokenizer_config.json").is_file():
        kept = json.loads((path / "tokenizer_config.json").read_text()).get("chat_template")
        template = kept if isinstance(kept, str) else json.dumps(kept)
    return tokenizer.hexdigest(), hashlib.sha256(template.encode()).hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

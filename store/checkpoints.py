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
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from store.errors import UserError
from store.records import Checkpoint

TRAINING = "training.json"
"""How the training went, beside its weights until the store has it. Not part of the digest."""
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
ADAPTER = "adapter_config.json"
WEIGHTS = "*.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer*", "vocab.*", "spiece.model", "*.tiktoken", "tekken.json")
NOT_DOWNLOADED = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data"]


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
    """The checkpoint that lies in a folder: its digests and size.

    It is an adapter if that is what the folder holds; of which base, the caller knows.
    """
    digest, size = _digest(path)
    tokenizer, template = _tokenizer_digests(path)
    return Checkpoint(
        model=model,
        kind="adapter" if (path / ADAPTER).is_file() else "full",
        path=path,
        digest=digest,
        tokenizer_digest=tokenizer,
        template_digest=template,
        bytes=size,
        parent_id=parent_id,
    )


def is_reward_model(path: Path) -> bool:
    """Whether what lies in a folder scores conversations and writes none."""
    config = path / "config.json"
    if not config.is_file():
        return False
    kinds = json.loads(config.read_text(encoding="utf-8")).get("architectures") or []
    return any("SequenceClassification" in kind for kind in kinds)


def intact(checkpoint: Checkpoint) -> bool:
    """Whether the folder still holds, byte for byte, what was recorded."""
    return checkpoint.path.is_dir() and _digest(checkpoint.path)[0] == checkpoint.digest


def check(checkpoint: Checkpoint) -> None:
    """Raises UserError unless its folder, and that of its base, hold what the store recorded.

    Whoever reads weights to compute with them has this asked first. A file that the system calls
    unchanged since this process last read it is not read again.
    """
    now = as_it_is(checkpoint.path, checkpoint.model)
    for what, before, after in (
        ("tokenizer", checkpoint.tokenizer_digest, now.tokenizer_digest),
        ("chat template", checkpoint.template_digest, now.template_digest),
        ("content", checkpoint.digest, now.digest),
    ):
        if before != after:
            raise _changed(what, checkpoint.path)
    base, digest = checkpoint.base_path, checkpoint.base_digest
    if base is None or digest is None:
        return
    if as_it_is(base, checkpoint.model).digest != digest:
        raise _changed("content", base)


def _changed(what: str, path: Path) -> UserError:
    return UserError(
        f"the {what} of {path} is not what it was when the checkpoint was stored; put the folder "
        "back as it was"
    )


_KNOWN: dict[Path, tuple[tuple[Any, ...], Checkpoint]] = {}
"""Folder -> what the system said of its files, and what they were measured to be."""


def as_it_is(path: Path, model: str) -> Checkpoint:
    """What measure() says of a folder, which is not read again while the system says that nothing
    in it has changed."""
    if not path.is_dir():
        raise UserError(f"no folder {str(path)!r} to open a checkpoint from")
    files = ((file, file.stat()) for file in _files(path))
    there = tuple(
        (file, of.st_ino, of.st_size, of.st_mtime_ns, of.st_ctime_ns) for file, of in files
    )
    known = _KNOWN.get(path)
    if known is None or known[0] != there:
        known = _KNOWN[path] = there, measure(path, model)
    return replace(known[1], model=model)


def rebase(checkpoint: Checkpoint) -> None:
    """Let an adapter's folder name where its base lies now, because a run can be moved."""
    file, base = checkpoint.path / ADAPTER, checkpoint.base_path
    if base is None or not file.is_file():
        return
    told = json.loads(file.read_text())
    if told.get("base_model_name_or_path") != str(base.resolve()):
        aside = file.with_name(file.name + ".new")
        told["base_model_name_or_path"] = str(base.resolve())
        aside.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")
        aside.replace(file)


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


def locate(path: str, *, weights: bool = True) -> Path:
    """The folder of a model: a folder as it is, a Hub id as its local snapshot.

    weights: whether those of a Hub id are fetched and looked at; a folder's are always.
    Raises UserError when it is neither, the Hub cannot be asked, or the folder lacks what a run
    begins from.
    """
    if not path.strip():
        raise UserError('model.path is empty; right are a folder, a Hub id or "embedded"')
    if Path(path).is_dir():
        found = Path(path).resolve()
    elif path.count("/") > 1 or path.startswith((".", "~", "/")):
        raise UserError(f"no model folder {path!r}")
    else:
        found = _snapshot(path, weights=weights)
    if (found / ADAPTER).is_file():
        raise UserError(
            f"{found} is an adapter, and a run begins from whole weights; merge it into its base "
            "first: AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload()"
            ".save_pretrained(folder), and put the tokenizer beside it"
        )
    if "model_type" in _table(found, "config.json"):  # else it is of another engine than ours
        if weights or Path(path).is_dir():
            _check_weights(found)
        if not any(next(found.glob(each), None) for each in TOKENIZERS):
            raise UserError(
                f"{found} has no tokenizer (a tokenizer.json, or what its kind has instead); "
                "put the files of the one it was trained with beside the weights"
            )
    return found


def _table(model: Path, name: str) -> dict[str, Any]:
    """What a JSON file of a model folder says."""
    file = model / name
    if not file.is_file():
        raise UserError(f"{model} is not a model folder: it has no {name}")
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(table, dict):
        raise UserError(f"{file} is not a JSON table, found {str(table)[:40]!r}")
    return table


def _check_weights(model: Path) -> None:
    """Raises UserError unless the weights are there, whole, as safetensors."""
    if (model / "model.safetensors").is_file():
        shards = {"model.safetensors"}
    elif (model / INDEX).is_file():
        shards = set(_table(model, INDEX).get("weight_map", {}).values())
    else:
        pickled = ", ".join(file.name for file in pickles(model)[:1])
        raise UserError(
            f"{model} has no weights that are loaded: no model.safetensors and no {INDEX}"
            f"{f', but {pickled}' if pickled else ''}. Pickled weights can run code and are not "
            "loaded; convert them: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other)"
        )
    if missing := sorted(name for name in shards if not (model / name).is_file()):
        raise UserError(
            f"{model} lacks {len(missing)} of the {len(shards)} files that {INDEX} lists, the "
            f"first of them {missing[0]}; download it again"
        )
    for name in sorted(shards):
        file = model / name
        with file.open("rb") as opened:
            header = int.from_bytes(opened.read(8), "little")
        if not 0 < header <= file.stat().st_size - 8:
            raise UserError(
                f"{file} is not a safetensors file, or not all of one: an interrupted download, or "
                "a Git LFS pointer in its place (`git lfs pull` gets the file)"
            )


def with_template(model: Path, template: Path, into: Path) -> None:
    """Write a model folder that differs from `model` in its chat template alone.

    The weights are links to those of `model`, everything else is copied.
    Raises UserError when the template cannot be parsed.
    """
    _parse(template)
    into.mkdir(parents=True)
    for file in sorted(model.iterdir()):
        if file.match(WEIGHTS):
            (into / file.name).symlink_to(file.resolve())
        elif file.is_file() and file.suffix not in PICKLES:
            shutil.copyfile(file, into / file.name)
    # Wherever a template may be kept, so that there is one.
    (into / "chat_template.json").unlink(missing_ok=True)
    settings = into / "tokenizer_config.json"
    if settings.is_file():
        kept = _table(into, settings.name)
        kept.pop("chat_template", None)
        settings.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", "utf-8")
    shutil.copyfile(template, into / "chat_template.jinja")


class _Generation(Extension):
    """The tag that marks what an assistant wrote, which only transformers knows."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _parse(template: Path) -> None:
    """Raises UserError unless the file is a chat template."""
    try:
        text = template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the chat template {template} cannot be read: {error}") from error
    try:
        Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"]).parse(text)
    except TemplateSyntaxError as error:
        raise UserError(
            f"{template}, line {error.lineno}, is not a Jinja template: {error.message}"
        ) from error


def _snapshot(name: str, *, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    left = NOT_DOWNLOADED if weights else [*NOT_DOWNLOADED, WEIGHTS]
    try:
        return Path(snapshot_download(name, ignore_patterns=left))
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
        if any(relative.match(each) for each in NOT_DOWNLOADED):
            continue  # another program may have fetched it into the same snapshot
        with _content(file) as (opened, length):
            digest.update(f"{relative.as_posix()}\0{length}\0".encode())
            size += length
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest(), size


@contextmanager
def _content(file: Path) -> Iterator[tuple[BinaryIO, int]]:
    """What of a file makes a checkpoint what it is, and its length in bytes."""
    if file.name == ADAPTER:
        # Where the base lies is no part of the adapter: two equal runs lie in two places.
        table = json.loads(file.read_text(encoding="utf-8")) | {"base_model_name_or_path": None}
        told = json.dumps(table, sort_keys=True).encode()
        yield BytesIO(told), len(told)
    else:
        with file.open("rb") as opened:
            yield opened, file.stat().st_size


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

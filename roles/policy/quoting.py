"""Keep quoted text text where a server writes the chat by its own template.

Our own engine encodes such text so that nothing in it becomes a control token
(roles/policy/encoding.py). A server takes words, and some servers read control tokens in them.
"""

from __future__ import annotations

import re

_MARKER = re.compile(r"<(?=[|｜][^\s<>]+>|\w+[|｜]>|</?SYS>>|(/?\w+)>)|\[(?=(/?\w+)\])")
_NAMES = frozenset(
    {"s", "bos", "eos", "pad", "unk", "cls", "sep", "mask", "gmask", "sop", "eop", "inst"}
    | {"think", "tool", "image", "img", "audio", "video"}
)


def disarm(text: str) -> str:
    """`text` with a space in whatever a tokenizer could take for one of its control tokens.

    These are <|...|> and its like with one bar or with full-width ones, names in angle brackets
    that have an underscore or are known (<s>, </think>, <start_of_turn>), the same in capitals in
    square ones ([INST]) and <<SYS>>: `<|end|>` becomes `< |end|>`. Whose tokenizer it will
    be is not known, so it goes by the shape. A space splits them in every tokenizer; an invisible
    character is dropped by some and costs others three tokens. All other text stays as it is, so
    roles that a template marks in plain words ("Assistant:") are held by the fence alone.
    """
    return _MARKER.sub(lambda found: f"{found[0]} " if _is_marker(found) else found[0], text)


def _is_marker(found: re.Match[str]) -> bool:
    angled, squared = found[1], found[2]
    name = (angled or squared or "").removeprefix("/")
    known = "_" in name or name.lower() in _NAMES or name.startswith("unused")
    if squared:
        return known and (name.isupper() or name == "gMASK")
    return known or not angled

"""Text that somebody else wrote, as it can be shown to a person."""

from __future__ import annotations

import unicodedata

_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def harmless(text: str) -> str:
    """Text with its control characters spelled out: it cannot write to a screen what it likes."""
    return "".join(
        each.encode("unicode_escape").decode() if _is_control(each) else each for each in text
    )


def _is_control(character: str) -> bool:
    return character not in "\n\t" and unicodedata.category(character) in _HIDDEN

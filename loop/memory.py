"""The cache of what judges' models said, as a run uses it: it saves money and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from store.cache import ReplyCache
from store.errors import UserError
from store.records import Reply


class RunMemory:
    """A cache that a run goes on without where it cannot be used, and says so once."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path = path
        self._say = say
        self._cache: ReplyCache | None = None
        try:
            self._cache = ReplyCache(path)
        except (UserError, SQLAlchemyError) as error:
            self._without(error)

    def find(self, keys: Sequence[str]) -> dict[str, tuple[str, Reply]]:
        try:
            return {} if self._cache is None else self._cache.find(keys)
        except (UserError, SQLAlchemyError) as error:
            self._without(error)
            return {}

    def add(self, said: Mapping[str, tuple[Mapping[str, Any], Reply]]) -> None:
        try:
            if self._cache is not None:
                self._cache.add(said)
        except (UserError, SQLAlchemyError) as error:
            self._without(error)

    def close(self) -> None:
        if self._cache is not None:
            self._cache.close()
            self._cache = None

    def _without(self, error: Exception) -> None:
        self.close()
        self._say(
            f"judges are asked without a cache: {error}; delete {self._path}, or name another with "
            "--set cache.path=FILE"
        )

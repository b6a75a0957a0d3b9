"""What every test needs: the modules beside it, and one thread; a PostgreSQL server for some."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if TYPE_CHECKING:
    from postgres_server import Server


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A server of this session's own. Where none can be had tests skip, and fail in CI."""
    import postgres_server

    try:
        with postgres_server.running() as server:
            yield server
    except postgres_server.Missing as error:
        if os.environ.get(postgres_server.REQUIRED):
            raise
        pytest.skip(str(error))


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest) -> str | None:
    """store.url of a run that is kept in each of the two."""
    if request.param == "sqlite":
        return None
    return str(request.getfixturevalue("postgres").url())

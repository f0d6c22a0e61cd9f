"""Golden transcripts: ``pytest tests/export --update-golden`` rewrites them, a person reads the diff."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare text with a file of tests/golden, or rewrite that file."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        # a run of the whole suite does not load this file early enough to know the option
        if request.config.getoption("update_golden", default=False):
            path.write_text(text)
        assert path.exists(), f"no {path.name}: run pytest tests/export --update-golden, then read it"
        assert text == path.read_text()

    return compare

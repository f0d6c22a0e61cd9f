"""docs/support.md is what docs/support.py writes today."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.live
def test_the_page_is_current(build) -> None:
    spec = importlib.util.spec_from_file_location("support", ROOT / "docs" / "support.py")
    support = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(support)
    written = support.PAGE.read_text().splitlines()
    today = support.page(build).splitlines()
    differ = [f"- {a}\n+ {b}" for a, b in zip(written, today, strict=False) if a != b][:5]
    assert written == today, "run .venv/bin/python docs/support.py\n" + "\n".join(differ)

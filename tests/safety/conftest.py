"""What tests of safety share: a program that checks itself, and how thorough to be."""

from __future__ import annotations

import pytest

from tests.safety.checked import FLAGS, SOURCE, Checked


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether to try everything instead of a sample."""
    return bool(request.config.getoption("full", default=False))


@pytest.fixture
def checked(build, tmp_path):
    """Start programs that check themselves; they are killed in the end."""
    running = []

    def start(*, hard: bool = False) -> Checked:
        running.append(Checked(build(SOURCE, opt="-O1", flags=FLAGS), tmp_path, hard=hard))
        return running[-1]

    yield start
    for one in running:
        one.end()

"""Sizes, times and words, without running anything."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest

from fentry.cli import VERBS, load, near, options, show
from fentry.cli.stat import ordered, table
from tests.cli.conftest import environment


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("100us", 100_000),
        ("1.5ms", 1_500_000),
        ("2s", 2 * 10**9),
        ("3 ns", 3),
        ("0", 0),
        ("1m", 60 * 10**9),
        (".5s", 5 * 10**8),
    ],
)
def test_durations(text: str, ns: int) -> None:
    assert options.Duration().convert(text, None, None) == ns


@pytest.mark.parametrize("text", ["5", "us", "-1us", "1 h", "1us2", "", "9" * 400 + "s", "1e5s", "nan", "٣s"])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(click.BadParameter):
        options.Duration().convert(text, None, None)


def test_seconds_may_go_without_unit() -> None:
    assert options.Duration("s").convert("2.5", None, None) == 2_500_000_000


@pytest.mark.parametrize(
    ("text", "nbytes"), [("4096", 4096), ("64K", 1 << 16), ("1m", 1 << 20), ("2GiB", 2 << 30), ("1TB", 1 << 40)]
)
def test_sizes(text: str, nbytes: int) -> None:
    assert options.Size().convert(text, None, None) == nbytes


@pytest.mark.parametrize("text", ["0", "", "K", "-1", "1.5M", "1X", "9" * 30])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(click.BadParameter):
        options.Size().convert(text, None, None)


def test_rings_are_powers_of_two() -> None:
    asked = options.asked({"argv": ("x",), "buffer_size": 100_000, "threads": 100})
    assert (asked.plan["ring_size"], asked.plan["rings"]) == (1 << 17, 128)
    assert options.asked({"argv": ("x",), "buffer_size": 1}).plan["ring_size"] == 4096


def test_every_verb_is_a_command_with_examples() -> None:
    for verb in VERBS:
        command = load(verb)
        assert f"fentry {verb}" in (command.help or ""), verb
        assert "Exit status" in (command.help or ""), verb


def test_near() -> None:
    assert near("reprot") == "report"
    assert near("./report") == ""
    assert near("xz") == ""


def test_numbers_for_people() -> None:
    assert show.count(1, "event") == "1 event"
    assert show.count(12345, "event") == "12,345 events"
    assert show.size(512) == "512 bytes"
    assert show.size(3 << 30) == "3.0 GiB"


def row(name: str, hits: int, total: int | None, **more: int) -> dict[str, object]:
    times = {"self_ns": total, "min_ns": total, "max_ns": total} | more
    return {"function": name, "module": "m", "hits": hits, "total_ns": total, **times}


def test_order_of_rows() -> None:
    rows = [row("a", 1, 100), row("b", 10, 50, self_ns=200), row("c", 2, 50)]
    for sort, names in {
        None: "abc",
        "total": "abc",
        "hits": "bca",
        "self": "bac",
        "avg": "acb",
        "function": "abc",
    }.items():
        assert "".join(r["function"] for r in ordered(rows, sort)) == names, sort
    assert [r["function"] for r in ordered([row("a", 1, None), row("b", 2, None)], None)] == ["b", "a"]


def test_table() -> None:
    lines = table([row("walk", 2, 1500), {**row("run", 1, None), "module": "other"}])
    assert lines[0].split() == ["Function", "Hit", "Time", "Self", "Avg", "Min", "Max"]
    assert lines[2].split() == [
        "walk",
        "[m]",
        "2",
        "1.500",
        "us",
        "1.500",
        "us",
        "0.750",
        "us",
        "1.500",
        "us",
        "1.500",
        "us",
    ]
    assert lines[3].split() == ["run", "[other]", "1", "-", "-", "-", "-", "-"]
    assert len({len(line) for line in lines}) == 1
    assert table([row("walk", 2, None)])[0].split() == ["Function", "Hit"]
    assert table([]) == ["  no function was called\n"]


def test_help_waits_for_nothing() -> None:
    """What is heavy is imported by the verb that needs it."""
    script = (
        "import sys\nfrom fentry.cli import main\nassert main(['--help']) == 0\n"
        "heavy = {'numpy', 'pyarrow', 'llvmlite', 'iced_x86', 'unicorn', 'rich', 'capstone', 'elftools'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, env=environment(), text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")

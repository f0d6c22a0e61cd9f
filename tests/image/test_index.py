"""The index cache: used when it fits, ignored in every other case, private, and small."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from fentry.image import Image, index


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def program(compiled, tmp_path) -> str:
    """A program large enough to be cached, with a list of its own."""
    copy = tmp_path / "program"
    copy.write_bytes(compiled("gcc", "static", "-O2").read_bytes())
    return str(copy)


def indexes(root: Path) -> list[Path]:
    return sorted((root / "fentry").glob("*"))


def test_the_second_time_comes_from_the_cache(root, program, monkeypatch):
    first = Image.open(program)
    listed, sleds = first.functions(), first.sleds()
    (file,) = indexes(root)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    monkeypatch.setattr(Image, "_build_index", lambda _: pytest.fail("the cache was not used"))
    again = Image.open(program)
    assert again.functions() == listed
    assert again.sleds() == sleds
    names = {name for function in listed for name in (function.name, *function.aliases)}
    assert {name: again.function(name) for name in names} == {name: first.function(name) for name in names}


def damage(text: bytes) -> list[bytes]:
    head, _, body = text.partition(b"\n")
    half = len(text) // 2
    return [
        b"",
        head,
        text[:half],
        text[:half] + bytes([text[half] ^ 1]) + text[half + 1 :],
        text.replace(b"fentry-index", b"fentry-other"),
        head.replace(b" %d " % index.FORMAT, b" %d " % (index.FORMAT + 1)) + b"\n" + body,
        b"\xff" * 1000,
    ]


def test_a_damaged_index_is_ignored(root, program):
    listed = Image.open(program).functions()
    (file,) = indexes(root)
    good = file.read_bytes()
    for bad in damage(good):
        file.write_bytes(bad)
        assert Image.open(program).functions() == listed
        assert file.read_bytes() == good, "it is written anew"


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {"functions": 3, "ambiguous": {}},
        {"functions": [["f", 2, 1, "symtab", [], 0, 1, 0], ["g", 1, 1, "symtab", [], 0, 1, 0]], "ambiguous": {}},
        {"functions": [["f", "2", 1, "symtab", [], 0, 1, 0]], "ambiguous": {}},
        {"functions": [["f", 2, 1, "symtab", [7], 0, 1, 0]], "ambiguous": {}},
        {"functions": [["f", 2, 1]], "ambiguous": {}},
        {"functions": [], "ambiguous": {"f": "x"}},
        {"functions": []},
    ],
)
def test_a_well_formed_index_of_something_else_is_ignored(root, program, value):
    """The checksum fits and the content does not: as a bug in an older version would leave it."""
    listed = Image.open(program).functions()
    (file,) = indexes(root)
    index.store(file.stem, value)
    assert indexes(root) == [file]
    assert Image.open(program).functions() == listed


def test_a_changed_program_has_another_index(root, program):
    before = Image.open(program).functions()
    about = Path(program).stat()
    os.utime(program, ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    assert Image.open(program).functions() == before
    assert len(indexes(root)) == 2


def test_others_must_not_write_there(root, program):
    folder = root / "fentry"
    folder.mkdir(parents=True, mode=0o700)
    folder.chmod(0o770)
    assert Image.open(program).functions()
    assert indexes(root) == []
    folder.rmdir()
    elsewhere = root / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    folder.symlink_to(elsewhere)
    assert Image.open(program).functions()
    assert list(elsewhere.iterdir()) == []


def test_no_place_for_a_cache_is_no_error(tmp_path, monkeypatch, program):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    listed = Image.open(program).functions()
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(blocked))
    assert Image.open(program).functions() == listed
    assert not Path("relative").exists()


def test_a_full_disk_is_no_error(root, program, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert Image.open(program).functions()
    assert indexes(root) == [], "nothing half written is left"


def test_old_indexes_go(root, monkeypatch):
    monkeypatch.setattr(index, "KEEP", 3)
    for number in range(6):
        index.store(f"{number}", number)
        for age, path in enumerate(reversed(indexes(root))):
            os.utime(path, ns=(0, 10**9 - age))
    assert [path.stem for path in indexes(root)] == ["3", "4", "5"]


def test_small_files_and_memory_are_not_cached(root, compiled):
    path = compiled("gcc", "pie", "-O2")
    Image.open(str(path)).functions()
    Image.from_bytes(path.read_bytes(), "x").functions()
    assert indexes(root) == []


def test_cache_can_be_turned_off(root, program):
    Image.open(program, cache=False).functions()
    assert indexes(root) == []

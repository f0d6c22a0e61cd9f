"""The index cache: function lists of large images, kept between runs in ``$XDG_CACHE_HOME/fentry``.

A cache may be lost, cut, old, or someone else's; then it is not there. One file per image, named by a hash
of everything the list depends on (format, build-id, path, device, inode, size, time of change, debug files).
It starts with ``fentry-index``, the format and a CRC-32, and goes on as JSON: nothing that is read from it
can run code, and each value is checked before it is used. Files are written beside their place and renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import zlib
from pathlib import Path
from typing import Any

FORMAT = 1  #: raise it when the content or the rules that make it change
KEEP = 256  #: files; the least recently written go first
_MAGIC = b"fentry-index %d %08x\n"


def key(*parts: object) -> str:
    """Name of the cache file for what `parts` describe."""
    return hashlib.sha256(repr((FORMAT, *parts)).encode()).hexdigest()[:40]


def _folder() -> Path | None:
    """The private cache directory, made if it must be; None if there can be none."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        if not root.is_absolute():  # the XDG specification says to ignore relative paths
            root = Path.home() / ".cache"
        path = root / "fentry"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = path.lstat()
    except (OSError, RuntimeError):  # RuntimeError: there is no home directory
        return None
    # a directory that others can write to could feed us somebody's list
    private = stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid() and not about.st_mode & 0o077
    return path if private else None


def load(name: str) -> Any:
    """What was stored under `name`, as JSON values, or None."""
    folder = _folder()
    if folder is None:
        return None
    try:
        fd = os.open(folder / f"{name}.index", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            head, body = file.readline(64), file.read()
        return json.loads(body) if head == _MAGIC % (FORMAT, zlib.crc32(body)) else None
    except (OSError, ValueError, RecursionError):
        return None


def store(name: str, value: Any) -> None:
    """Keep `value` (JSON values) under `name`; on any trouble, do nothing."""
    folder = _folder()
    if folder is None:
        return
    body = json.dumps(value, separators=(",", ":")).encode()
    fresh: Path | None = None
    try:
        fd, temporary = tempfile.mkstemp(prefix=".new-", dir=folder)  # mode 0600
        fresh = Path(temporary)
        with os.fdopen(fd, "wb") as file:
            file.write(_MAGIC % (FORMAT, zlib.crc32(body)) + body)
        fresh.replace(folder / f"{name}.index")
        _prune(folder)
    except OSError:
        if fresh is not None:
            with contextlib.suppress(OSError):
                fresh.unlink()


def _prune(folder: Path) -> None:
    with os.scandir(folder) as entries:
        files = [(entry.stat(follow_symlinks=False).st_mtime_ns, entry.path) for entry in entries]
    for _, path in sorted(files)[:-KEEP]:
        with contextlib.suppress(OSError):
            Path(path).unlink()

"""The file in which an image lies on its way."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
from pathlib import Path

import pytest

from jobdaemon.errors import StoreUnavailableError
from jobdaemon.spool import Spool


def test_what_is_written_can_be_read_again_and_again(tmp_path: Path) -> None:
    """A spool gives its bytes back whole, as often as they are wanted, and knows their size and digest."""
    spool = Spool(tmp_path)
    content = bytes(index % 251 for index in range(600_000))
    for start in range(0, len(content), 70_000):
        spool.write(content[start : start + 70_000])
    for _ in range(2):
        assert b"".join(spool.blocks()) == content
    assert spool.head(3) == content[:3]
    assert spool.opened().read() == content
    assert (spool.size_bytes, spool.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_nothing_of_it_has_a_name(tmp_path: Path) -> None:
    """A process that is killed leaves no file behind, and a folder that is missing is made."""
    spool = Spool(tmp_path / "deep" / "spool")
    spool.write(b"photo")
    assert list((tmp_path / "deep" / "spool").iterdir()) == []


def test_it_is_closed_once_nobody_holds_it(tmp_path: Path) -> None:
    """Spools that are dropped, for whatever reason, take no descriptor and warn nobody."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    held = [Spool(tmp_path) for _ in range(5)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 5
    held.clear()
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_full_disk_is_retryable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No room, and a folder that cannot be made, are said with the folder's name, and may be over later."""

    class Full:
        def write(self, _block: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    spool = Spool(tmp_path)
    monkeypatch.setattr(spool, "_file", Full())
    with pytest.raises(StoreUnavailableError, match=f"{tmp_path.name}.*No space left"):
        spool.write(b"photo")
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(StoreUnavailableError, match="taken"):
        Spool(tmp_path / "taken")

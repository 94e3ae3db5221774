"""The file in which an image lies on its way."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
from pathlib import Path

import pytest

from jobdaemon.errors import PutOffError, StoreRefusedError, StoreUnavailableError
from jobdaemon.spool import Spool, require_room


def test_what_is_written_can_be_read_again_and_again(tmp_path: Path) -> None:
    """A spool gives its bytes back whole, as often as they are wanted, and knows their size and digest."""
    spool = Spool(tmp_path)
    content = bytes(index % 251 for index in range(600_000))
    for start in range(0, len(content), 70_000):
        spool.write(content[start : start + 70_000])
    for _ in range(2):
        assert b"".join(spool.blocks()) == content
    assert (spool.head(3), spool.tail(3)) == (content[:3], content[-3:])
    assert spool.tail(700_000) == content
    assert spool.opened().read() == content
    assert (spool.size_bytes, spool.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_nothing_of_it_has_a_name(tmp_path: Path) -> None:
    """A process that is killed leaves no file behind, and a folder that is missing is made."""
    spool = Spool(tmp_path / "deep" / "spool")
    spool.write(b"photo")
    assert list((tmp_path / "deep" / "spool").iterdir()) == []


def test_it_is_closed_once_nobody_holds_it(tmp_path: Path) -> None:
    """Spools that are dropped, for whatever reason, take no descriptor and warn nobody."""
    held = [Spool(tmp_path) for _ in range(5)]
    files = [spool.opened() for spool in held]
    assert not any(file.closed for file in files)
    held.clear()
    gc.collect()
    assert all(file.closed for file in files)


def test_a_full_disk_is_retryable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No room is said with the folder's name, and may be over later."""

    class Full:
        def write(self, _block: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    spool = Spool(tmp_path)
    monkeypatch.setattr(spool, "_file", Full())
    with pytest.raises(StoreUnavailableError, match=f"{tmp_path.name}.*No space left"):
        spool.write(b"photo")


def test_a_folder_that_cannot_be_is_permanent(tmp_path: Path) -> None:
    """A file in the folder's place, and a folder below a file, need an operator."""
    (tmp_path / "taken").write_bytes(b"")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "spool"):
        with pytest.raises(StoreRefusedError, match=r"taken.*check"):
            Spool(folder)


def test_room_is_looked_for_where_the_folder_will_be(tmp_path: Path) -> None:
    """Images need room on the disk of each folder, whether it is made already or not; without it they are put off, not failed."""
    folders = [tmp_path, tmp_path / "not" / "yet"]
    require_room(folders, 0)
    for folder in folders:
        with pytest.raises(PutOffError, match=f"{tmp_path} has no room") as caught:
            require_room([folder], 10**12)
        assert caught.value.retry_after is not None

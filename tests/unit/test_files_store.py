"""What is special about artifacts on a folder: links, full disks, leftovers, durability. The rest: tests/conformance."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from jobdaemon.errors import ArtifactMissingError, StoreRefusedError, StoreUnavailableError
from jobdaemon.storage.files import TEMPORARY_PREFIX, FilesStore

KEY = "orders/1/000.jpg"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "artifacts"


@pytest.fixture
async def store(root: Path) -> AsyncIterator[FilesStore]:
    store = FilesStore(root)
    yield store
    await store.close()


def files_below(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())


def failing(error: int, real: Callable[..., Any], after: int = 0) -> Callable[..., Any]:
    """*real*, which fails with *error* once it was called *after* times."""
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(error, os.strerror(error))
        return real(*args, **kwargs)

    return call


async def test_a_key_is_a_path(store: FilesStore, root: Path) -> None:
    """An artifact lies where its key says, and nothing lies beside it."""
    await store.put(KEY, b"photo", "image/jpeg")
    assert (root / KEY).read_bytes() == b"photo"
    assert files_below(root) == [KEY]


async def test_the_process_decides_who_may_read(store: FilesStore, root: Path) -> None:
    """A file gets the mode that the umask leaves, so that a web server can be let in."""
    old = os.umask(0o027)
    try:
        await store.put(KEY, b"photo", "image/jpeg")
    finally:
        os.umask(old)
    assert stat.S_IMODE((root / KEY).stat().st_mode) == 0o640


async def test_the_same_bytes_are_not_written_again(store: FilesStore, root: Path) -> None:
    """A repeated put leaves the very file in place; other bytes of the same size replace it."""
    await store.put(KEY, b"photo", "image/jpeg")
    before = (root / KEY).stat()
    await store.put(KEY, b"photo", "image/jpeg")
    assert (root / KEY).stat().st_ino == before.st_ino
    assert (root / KEY).stat().st_mtime_ns == before.st_mtime_ns
    await store.put(KEY, b"other", "image/jpeg")
    assert (root / KEY).stat().st_ino != before.st_ino


async def test_file_and_folders_are_synced_before_the_answer(
    store: FilesStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before put returns, the file, its folder and the folders above it were given to fsync, the file before its rename."""
    synced: list[str] = []
    real_sync, real_rename = os.fsync, os.rename

    def sync(file: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{file}").readlink()))
        real_sync(file)

    def rename(*args: Any, **kwargs: Any) -> None:
        synced.append("rename")
        real_rename(*args, **kwargs)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", rename)
    await store.put(KEY, b"photo", "image/jpeg")
    temporary = synced[synced.index("rename") - 1]
    assert Path(temporary).name.startswith(TEMPORARY_PREFIX)
    assert {str(root), str(root / "orders"), str(root / "orders/1")} <= set(synced)
    assert synced[-1] == str(root / "orders/1")


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE])
@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
async def test_a_failing_disk_is_retryable_and_leaves_nothing(
    store: FilesStore, root: Path, monkeypatch: pytest.MonkeyPatch, error: int, call: str
) -> None:
    """A full or failing disk is retryable, half a file stays nowhere, and what was there before stays as it was."""
    await store.put(KEY, b"before", "image/jpeg")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(error, getattr(os, call)))
        with pytest.raises(StoreUnavailableError) as raised:
            await store.put(KEY, b"photo", "image/jpeg")
    assert ("full" in str(raised.value)) == (error in {errno.ENOSPC, errno.EDQUOT})
    assert files_below(root) == [KEY]
    assert (root / KEY).read_bytes() == b"before"


async def test_short_writes_are_continued(store: FilesStore, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that takes only some of the bytes is continued until all are there."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, content: real(file, bytes(content[:7])))
    await store.put(KEY, b"a photo of some length", "image/jpeg")
    assert (root / KEY).read_bytes() == b"a photo of some length"


async def test_a_disk_that_lies_is_found_out(store: FilesStore, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that do not read back as written never get their name."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, content: real(file, b"\0" * len(content)))
    with pytest.raises(StoreUnavailableError):
        await store.put(KEY, b"photo", "image/jpeg")
    assert files_below(root) == []


@pytest.mark.parametrize("error", [errno.EACCES, errno.EPERM, errno.EROFS])
async def test_missing_rights_are_permanent(store: FilesStore, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """No right to write, and a read-only disk, need an operator and name the folder."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing(error, os.open))
        with pytest.raises(StoreRefusedError, match="artifacts"):
            await store.check()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
async def test_a_read_only_folder_is_refused(store: FilesStore, root: Path) -> None:
    """A folder without the right to write is refused for good."""
    root.mkdir(parents=True)
    root.chmod(0o500)
    with pytest.raises(StoreRefusedError):
        await store.put(KEY, b"photo", "image/jpeg")
    root.chmod(0o700)


async def test_no_link_leads_out(store: FilesStore, root: Path, tmp_path: Path) -> None:
    """A folder below the root that is a link is followed by no method."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "000.jpg").write_bytes(b"secret")
    root.mkdir(parents=True)
    (root / "orders").symlink_to(outside)
    with pytest.raises(StoreRefusedError):
        await store.put("orders/1.jpg", b"photo", "image/jpeg")
    with pytest.raises(StoreRefusedError):
        await store.get("orders/000.jpg", max_bytes=100)
    with pytest.raises(StoreRefusedError):
        await store.delete("orders/000.jpg")
    assert files_below(outside) == ["000.jpg"]


async def test_a_file_that_is_a_link_is_replaced_not_followed(store: FilesStore, root: Path, tmp_path: Path) -> None:
    """A link in an artifact's place is never read or written through."""
    target = tmp_path / "target"
    target.write_bytes(b"secret")
    root.mkdir(parents=True)
    (root / "a.jpg").symlink_to(target)
    with pytest.raises(StoreRefusedError):
        await store.get("a.jpg", max_bytes=100)
    await store.put("a.jpg", b"photo", "image/jpeg")
    assert target.read_bytes() == b"secret"
    assert not (root / "a.jpg").is_symlink()
    assert await store.get("a.jpg", max_bytes=100) == b"photo"


async def test_the_root_itself_may_be_a_link(tmp_path: Path) -> None:
    """An operator may link the root to another disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "disk")
    store = FilesStore(tmp_path / "root")
    await store.put(KEY, b"photo", "image/jpeg")
    assert (tmp_path / "disk" / KEY).exists()
    await store.close()


async def test_a_pipe_hangs_nobody(store: FilesStore, root: Path) -> None:
    """A FIFO under a key is no artifact, and reading it returns at once."""
    root.mkdir(parents=True)
    os.mkfifo(root / "a.jpg")
    with pytest.raises(ArtifactMissingError):
        await asyncio.wait_for(store.get("a.jpg", max_bytes=10), 5)


@pytest.mark.parametrize("key", ["a.jpg/b.jpg", "a", f"{'x' * 300}.jpg"])
async def test_a_key_that_no_path_can_be_is_refused(store: FilesStore, root: Path, key: str) -> None:
    """A key below another artifact, one that is a folder, and one too long for the disk are refused for good."""
    await store.put("a.jpg", b"photo", "image/jpeg")
    await store.put("a/b.jpg", b"photo", "image/jpeg")
    with pytest.raises(StoreRefusedError):
        await store.put(key, b"photo", "image/jpeg")
    assert files_below(root) == ["a.jpg", "a/b.jpg"]


async def test_only_as_much_as_allowed_is_read(store: FilesStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that grows after its size was asked for is not read beyond the bound."""
    await store.put(KEY, b"x" * 100, "image/jpeg")
    asked: list[int] = []
    real = os.read

    def read(file: int, size: int) -> bytes:
        asked.append(size)
        return real(file, size)

    monkeypatch.setattr(os, "read", read)
    assert len(await store.get(KEY, max_bytes=100)) == 100
    assert max(asked) <= 101


async def test_an_empty_folder_goes_with_its_last_file(store: FilesStore, root: Path) -> None:
    """Deleting an order's last file removes the folders it leaves empty, but never the root."""
    await store.put(KEY, b"photo", "image/jpeg")
    await store.delete(KEY)
    assert list(root.iterdir()) == []


async def test_a_check_clears_old_leftovers(store: FilesStore, root: Path) -> None:
    """Temporary files older than a day go; younger ones, artifacts and strange files stay."""
    await store.put(KEY, b"photo", "image/jpeg")
    old, young, strange = (root / "orders/1" / name for name in (f"{TEMPORARY_PREFIX}old", f"{TEMPORARY_PREFIX}young", "~note"))
    for path in (old, young, strange, root / KEY):
        path.write_bytes(b"x")
    two_days_ago = time.time() - 2 * 86_400
    for path in (old, strange, root / KEY):
        os.utime(path, (two_days_ago, two_days_ago))
    await store.check()
    assert files_below(root) == sorted([KEY, f"orders/1/{TEMPORARY_PREFIX}young", "orders/1/~note"])


def test_a_url_is_public_or_a_file(tmp_path: Path) -> None:
    """With a public URL the key is quoted below it; without one it is a file URI."""
    key = "orders/1/a=b.jpg"
    assert FilesStore(tmp_path, "https://img.example/x/").url(key) == "https://img.example/x/orders/1/a%3Db.jpg"
    assert FilesStore(tmp_path).url(key) == f"{tmp_path.as_uri()}/orders/1/a%3Db.jpg"


async def test_the_loop_goes_on_while_the_disk_hangs(store: FilesStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """File work runs on threads of the store, never on the event loop."""
    hanging, entered = threading.Event(), threading.Event()
    threads: list[str] = []
    real = os.fsync

    def sync(file: int) -> None:
        threads.append(threading.current_thread().name)
        entered.set()
        assert hanging.wait(10)
        real(file)

    monkeypatch.setattr(os, "fsync", sync)
    task = asyncio.create_task(store.put(KEY, b"photo", "image/jpeg"))
    await asyncio.to_thread(entered.wait, 10)
    assert not task.done()
    hanging.set()
    await task
    assert all(name.startswith("artifact-files") for name in threads)

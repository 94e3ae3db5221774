"""
The artifact store on a folder: one file per key, durable when ``put`` returns.

It owns the folder's layout and its temporary files. Every path is walked from the root one segment at a time on open folder
descriptors that refuse symlinks, so no key and no planted link leads out of the root; the root itself may be a link.
Files get the process's umask, because a web server may have to read them.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from jobdaemon.domain.artifact import Artifact, is_valid_key
from jobdaemon.errors import ArtifactMissingError, StoreRefusedError, StoreUnavailableError, UnsupportedImageError
from jobdaemon.spool import Spool

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: ``~`` cannot occur in a key, so a temporary file is never taken for an artifact nor the other way round.
TEMPORARY_PREFIX = "~jobdaemon-"
#: A temporary file this old belongs to a process that was killed: no write takes a day.
LEFTOVER_AGE = timedelta(days=1)
#: A sweep gives up after this long: ``check`` is run by people and by start-up, and a store may hold a million folders.
SWEEP_LIMIT = timedelta(seconds=5)

_READ_BYTES = 1 << 20
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
#: O_NONBLOCK: a FIFO planted under a key must not hang the thread that opens it.
_ARTIFACT = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_IMPOSSIBLE_PATH = {errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTEMPTY, errno.EEXIST}


class FilesStore:
    """
    Keeps artifacts under a folder that all daemons share.

    Args:
        root: the folder; made on the first write.
        public_url: where a web server shows the folder, for instance ``https://img.example.com``; without it :meth:`url`
            gives ``file://`` URIs.
        threads: how many files are read and written at once.
    """

    name = "files"

    def __init__(self, root: Path, public_url: str | None = None, *, threads: int = 4) -> None:
        self._root = root.absolute()
        self._public_url = public_url.rstrip("/") if public_url else None
        # Not asyncio's shared threads: name look-ups wait there, and a hanging disk must not stop them.
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="artifact-files")

    def __repr__(self) -> str:
        return f"FilesStore({str(self._root)!r})"

    async def put(self, key: str, content: bytes, media_type: str) -> Artifact:
        """
        Write *content* to a temporary file beside its place, prove it by reading it back, and rename it there.

        Raises:
            StoreUnavailableError: the disk is full or failing. Retryable.
            StoreRefusedError: a bad key, or no right to write. Permanent.
        """
        self._require_valid(key)
        digest = await self._in_thread(_put_content, self._root, key, content)
        return Artifact(key=key, sha256=digest, size_bytes=len(content), media_type=media_type)

    async def put_file(self, key: str, spool: Spool, media_type: str) -> Artifact:
        """As :meth:`put`, block by block."""
        self._require_valid(key)
        await self._in_thread(_put, self._root, key, spool.blocks, spool.size_bytes, spool.sha256)
        return Artifact(key=key, sha256=spool.sha256, size_bytes=spool.size_bytes, media_type=media_type)

    async def get(self, key: str, *, max_bytes: int) -> bytes:
        """
        The bytes under *key*; never more than one byte beyond *max_bytes* is read.

        Raises:
            ArtifactMissingError, UnsupportedImageError, StoreRefusedError: Permanent.
            StoreUnavailableError: Retryable.
        """
        self._require_valid(key)
        blocks: list[bytes] = []
        await self._in_thread(_get, self._root, key, max_bytes, blocks.append)
        return b"".join(blocks)

    async def get_to_file(self, key: str, spool: Spool, *, max_bytes: int) -> None:
        """As :meth:`get`, block by block."""
        self._require_valid(key)
        await self._in_thread(_get, self._root, key, max_bytes, spool.write)

    async def delete(self, key: str) -> None:
        """Remove *key* and the folders that it leaves empty; that it is not there is a success."""
        self._require_valid(key)
        await self._in_thread(_delete, self._root, key)

    async def delete_folder(self, folder: str) -> None:
        """Remove *folder* with all that is in it, half-written files too; that it is not there is a success."""
        self._require_valid(folder)
        await self._in_thread(_delete_folder, self._root, folder)

    def url(self, key: str) -> str:
        """The public URL of *key*, or its ``file://`` URI."""
        self._require_valid(key)
        if self._public_url is None:
            return (self._root / key).as_uri()
        return f"{self._public_url}/{quote(key, safe='/-_.~')}"

    async def check(self) -> None:
        """
        Write, read and remove a probe; then clear away what killed processes left half-written more than a day ago.

        Raises:
            StoreUnavailableError, StoreRefusedError: with a sentence that says what to do.
        """
        key = f".check/{secrets.token_hex(8)}"
        content = secrets.token_bytes(64)
        await self.put(key, content, "application/octet-stream")
        try:
            if await self.get(key, max_bytes=len(content)) != content:
                raise StoreUnavailableError(f"The artifact folder {self._root} gave back other bytes than were written to it.")
        finally:
            await self.delete(key)
        removed = await self._in_thread(_sweep, self._root)
        if removed:
            logger.info("removed %d half-written files of killed processes from %s", removed, self._root)

    async def close(self) -> None:
        """Let running writes end, then free the threads."""
        await asyncio.to_thread(self._executor.shutdown)

    def _require_valid(self, key: str) -> None:
        if not is_valid_key(key):
            raise StoreRefusedError(f"{key[:80]!r} is not a valid artifact key.")

    async def _in_thread(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, partial(function, *args))


@contextmanager
def _translated(root: Path, key: str) -> Iterator[None]:
    """Turn the operating system's errors into ours; each message is one sentence that says where to look."""
    try:
        yield
    except OSError as exc:
        reason = exc.strerror or type(exc).__name__
        if exc.errno in _FULL:
            raise StoreUnavailableError(f"The artifact folder {root} is full ({reason}): free some space there.") from exc
        if exc.errno in _FORBIDDEN:
            raise StoreRefusedError(f"The artifact folder {root} may not be used ({reason}): check its owner and mode.") from exc
        if exc.errno in _IMPOSSIBLE_PATH:
            raise StoreRefusedError(f"The artifact folder {root} cannot hold the key {key!r} ({reason}).") from exc
        raise StoreUnavailableError(f"The artifact folder {root} does not work at the moment ({reason}).") from exc


@contextmanager
def _folder(root: Path, names: list[str], *, create: bool = False) -> Iterator[int]:
    """An open descriptor of the folder *names* below *root*; a symlink on the way is an OSError."""
    if create:
        root.mkdir(parents=True, exist_ok=True)
    folder = os.open(root, _FOLDER)
    try:
        for name in names:
            child = _child(folder, name, create=create)
            os.close(folder)
            folder = child
        yield folder
    finally:
        os.close(folder)


def _child(folder: int, name: str, *, create: bool) -> int:
    try:
        return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
    except FileNotFoundError:
        if not create:
            raise
    with suppress(FileExistsError):
        os.mkdir(name, dir_fd=folder)
    os.fsync(folder)  # a file is only as durable as the entries of the folders above it
    return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)


def _put_content(root: Path, key: str, content: bytes) -> str:
    digest = hashlib.sha256(content).hexdigest()
    _put(root, key, lambda: (content,), len(content), digest)
    return digest


def _put(root: Path, key: str, blocks: Callable[[], Iterable[bytes]], size_bytes: int, digest: str) -> None:
    *names, name = key.split("/")
    with _translated(root, key):
        for last in (False,) * 9 + (True,):
            try:
                with _folder(root, names, create=True) as folder:
                    if not _holds(folder, name, size_bytes, digest):
                        _write(folder, name, blocks(), digest)
                    # Also when the bytes were there: whoever wrote them may not have come to this line.
                    os.fsync(folder)
                break
            except FileNotFoundError:
                # A delete took the folder away, empty as it was, between our making it and our writing into it.
                if last:
                    raise


def _holds(folder: int, name: str, size_bytes: int, digest: str) -> bool:
    """Whether *name* is already a file with these very bytes."""
    try:
        file = os.open(name, _ARTIFACT, dir_fd=folder)
    except OSError:
        return False  # not there, or a link or something else that the rename replaces or refuses
    try:
        status = os.fstat(file)
        return stat.S_ISREG(status.st_mode) and status.st_size == size_bytes and _digest(file) == digest
    finally:
        os.close(file)


def _write(folder: int, name: str, blocks: Iterable[bytes], digest: str) -> None:
    temporary = f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
    file = os.open(temporary, _NEW_FILE, 0o666, dir_fd=folder)
    try:
        try:
            for block in blocks:
                view = memoryview(block)
                while view:
                    view = view[os.write(file, view) :]
            os.fsync(file)
            os.lseek(file, 0, os.SEEK_SET)
            if _digest(file) != digest:
                raise OSError(errno.EIO, "the file reads back other bytes than were written")
        finally:
            os.close(file)
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise


def _digest(file: int) -> str:
    digest = hashlib.sha256()
    while block := os.read(file, _READ_BYTES):
        digest.update(block)
    return digest.hexdigest()


def _get(root: Path, key: str, max_bytes: int, take: Callable[[bytes], None]) -> None:
    """Hands the file to *take*, never more than one byte beyond *max_bytes*."""
    *names, name = key.split("/")
    with _translated(root, key):
        try:
            with _folder(root, names) as folder:
                file = os.open(name, _ARTIFACT, dir_fd=folder)
        except FileNotFoundError as exc:
            raise ArtifactMissingError(f"The artifact folder {root} has no {key!r}.") from exc
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise ArtifactMissingError(f"The artifact folder {root} has no file {key!r}.")
            # The size may lie by the time it is read, so the loop is bounded as well.
            is_too_large = status.st_size > max_bytes or not _read(file, max_bytes, take)
        finally:
            os.close(file)
    if is_too_large:
        raise UnsupportedImageError(f"The artifact {key!r} is larger than {max_bytes} bytes.")


def _read(file: int, max_bytes: int, take: Callable[[bytes], None]) -> bool:
    """Whether the file ends within *max_bytes*."""
    left_bytes = max_bytes
    while block := os.read(file, min(left_bytes + 1, _READ_BYTES)):
        left_bytes -= len(block)
        if left_bytes < 0:
            return False
        take(block)
    return True


def _delete(root: Path, key: str) -> None:
    *names, name = key.split("/")
    with _translated(root, key):
        try:
            with _folder(root, names) as folder:
                os.unlink(name, dir_fd=folder)
        except (FileNotFoundError, IsADirectoryError):
            return
    _remove_empty(root, names)


def _remove_empty(root: Path, names: list[str]) -> None:
    """An order's folder goes with its last file, or a busy store would fill with empty ones; and so do those above it."""
    while names:
        *names, last = names
        try:
            with _folder(root, names) as folder:
                os.rmdir(last, dir_fd=folder)
        except OSError:
            return


def _delete_folder(root: Path, key: str) -> None:
    *names, name = key.split("/")
    with _translated(root, key):
        try:
            with _folder(root, names) as parent:
                while stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                    # Of several that do this at once, one finds gone what it was about to remove; then it looks again.
                    with suppress(FileNotFoundError):
                        shutil.rmtree(name, dir_fd=parent)
        except FileNotFoundError:
            pass
    _remove_empty(root, names)


def _sweep(root: Path) -> int:
    """Remove old temporary files below *root*; returns how many. What cannot be read or removed is left alone."""
    oldest = time.time() - LEFTOVER_AGE.total_seconds()
    give_up = time.monotonic() + SWEEP_LIMIT.total_seconds()
    removed = 0
    for _, _, files, folder in os.fwalk(root):
        for name in files:
            if not name.startswith(TEMPORARY_PREFIX):
                continue
            with suppress(OSError):
                if os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime < oldest:
                    os.unlink(name, dir_fd=folder)
                    removed += 1
        if time.monotonic() > give_up:
            break
    return removed

"""What every artifact store promises, held against each of them: a folder, and R2's client on an S3 server."""

from __future__ import annotations

import asyncio
import hashlib
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from jobdaemon.domain.artifact import Artifact
from jobdaemon.errors import ArtifactMissingError, StoreRefusedError, UnsupportedImageError
from jobdaemon.ports import ArtifactStore
from jobdaemon.spool import Spool
from jobdaemon.storage.files import FilesStore
from jobdaemon.storage.r2 import R2Store

KEY = "orders/1/000-00ff.jpg"


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    """An S3 server on loopback with the bucket ``photos``."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/photos", method="PUT"), timeout=10):
        pass
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["files", "r2"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ArtifactStore]:
    store: ArtifactStore
    if request.param == "files":
        store = FilesStore(tmp_path / "artifacts")
    else:
        # A prefix of its own for each test: the server lives as long as the module.
        prefix = hashlib.sha256(str(tmp_path).encode()).hexdigest()[:16]
        store = R2Store(request.getfixturevalue("s3_url"), "photos", "key", "secret", prefix=prefix)
    yield store
    await store.close()


async def test_the_name_is_the_settings_word(store: ArtifactStore) -> None:
    """A store is called what the settings call it."""
    assert store.name in {"files", "r2"}


@pytest.mark.parametrize("size_bytes", [0, 1, 500_000, 3_000_000])
async def test_what_was_put_can_be_got(store: ArtifactStore, size_bytes: int) -> None:
    """Bytes of any size come back as they were, and the artifact describes them."""
    content = bytes(index % 251 for index in range(size_bytes))
    artifact = await store.put(KEY, content, "image/jpeg")
    assert artifact == Artifact(KEY, hashlib.sha256(content).hexdigest(), size_bytes, "image/jpeg")
    assert await store.get(KEY, max_bytes=size_bytes) == content


@pytest.mark.parametrize("size_bytes", [0, 1, 3_000_000])
async def test_a_file_goes_in_and_out_like_bytes(store: ArtifactStore, size_bytes: int) -> None:
    """What a spool holds is stored under the same artifact as the same bytes, again and again, and comes back into another."""
    content = bytes(index % 251 for index in range(size_bytes))
    spool, back = Spool(), Spool()
    spool.write(content)
    artifact = await store.put_file(KEY, spool, "image/jpeg")
    assert artifact == await store.put_file(KEY, spool, "image/jpeg") == await store.put(KEY, content, "image/jpeg")
    assert await store.get(KEY, max_bytes=size_bytes) == content
    await store.get_to_file(KEY, back, max_bytes=size_bytes)
    assert (back.sha256, b"".join(back.blocks())) == (artifact.sha256, content)


async def test_a_file_replaces_other_bytes(store: ArtifactStore) -> None:
    """A spool's bytes win over those that lay under its key, also when the size is the same."""
    spool = Spool()
    spool.write(b"other")
    await store.put(KEY, b"first", "image/jpeg")
    await store.put_file(KEY, spool, "image/jpeg")
    assert await store.get(KEY, max_bytes=5) == b"other"


async def test_files_are_refused_as_bytes_are(store: ArtifactStore) -> None:
    """A missing key, a bad key and an artifact above the bound are the same errors with spools; the bound itself is none."""
    with pytest.raises(ArtifactMissingError):
        await store.get_to_file(KEY, Spool(), max_bytes=10)
    with pytest.raises(StoreRefusedError):
        await store.put_file("../up", Spool(), "image/jpeg")
    with pytest.raises(StoreRefusedError):
        await store.get_to_file("../up", Spool(), max_bytes=1)
    await store.put(KEY, b"x" * 2_000_000, "image/jpeg")
    with pytest.raises(UnsupportedImageError):
        await store.get_to_file(KEY, Spool(), max_bytes=1_999_999)
    spool = Spool()
    await store.get_to_file(KEY, spool, max_bytes=2_000_000)
    assert spool.size_bytes == 2_000_000


async def test_putting_the_same_again_is_a_success(store: ArtifactStore) -> None:
    """A second put of the same bytes gives the same artifact."""
    first = await store.put(KEY, b"photo", "image/jpeg")
    assert await store.put(KEY, b"photo", "image/jpeg") == first
    assert await store.get(KEY, max_bytes=5) == b"photo"


async def test_other_bytes_replace_the_old_ones(store: ArtifactStore) -> None:
    """The last put wins, whole, also when the size is the same."""
    await store.put(KEY, b"first", "image/jpeg")
    await store.put(KEY, b"other", "image/jpeg")
    assert await store.get(KEY, max_bytes=5) == b"other"


async def test_a_missing_key_is_missing(store: ArtifactStore) -> None:
    """What was never put is missing, in an empty store and beside other keys."""
    with pytest.raises(ArtifactMissingError):
        await store.get(KEY, max_bytes=10)
    await store.put(KEY, b"photo", "image/jpeg")
    for other in ("orders/1/001-00ff.jpg", "orders/2/000-00ff.jpg", "orders/1", "orders"):
        with pytest.raises(ArtifactMissingError):
            await store.get(other, max_bytes=10)


async def test_a_larger_artifact_is_refused(store: ArtifactStore) -> None:
    """One byte above the bound is too much; the bound itself is not, and the store goes on working."""
    await store.put(KEY, b"x" * 2_000_000, "image/jpeg")
    for _ in range(5):
        with pytest.raises(UnsupportedImageError):
            await store.get(KEY, max_bytes=1_999_999)
    assert len(await store.get(KEY, max_bytes=2_000_000)) == 2_000_000


async def test_deleting_is_final_and_repeatable(store: ArtifactStore) -> None:
    """A deleted key is missing, deleting it again is a success, and it can be put again."""
    await store.delete(KEY)
    await store.put(KEY, b"photo", "image/jpeg")
    await store.delete(KEY)
    await store.delete(KEY)
    with pytest.raises(ArtifactMissingError):
        await store.get(KEY, max_bytes=10)
    await store.put(KEY, b"photo", "image/jpeg")
    assert await store.get(KEY, max_bytes=10) == b"photo"


async def test_deleting_touches_no_sibling(store: ArtifactStore) -> None:
    """Deleting one key leaves the others of its folder."""
    await store.put("work/1/a.jpg", b"a", "image/jpeg")
    await store.put("work/1/b.jpg", b"b", "image/jpeg")
    await store.delete("work/1/a.jpg")
    assert await store.get("work/1/b.jpg", max_bytes=1) == b"b"


async def test_a_folder_goes_with_all_that_is_below(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything below it goes, however deep and however much; what only begins with its name stays. Again is a success."""
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")  # a page of the S3 server
    below = [f"work/1/{number:03d}.jpg" for number in range(35)] + ["work/1/deep/er/a.jpg"]
    beside = ["work/12/a.jpg", "work/1.jpg", "orders/1/a.jpg"]
    for key in below + beside:
        await store.put(key, b"x", "image/jpeg")
    await store.delete_folder("work/1")
    for key in below:
        with pytest.raises(ArtifactMissingError):
            await store.get(key, max_bytes=1)
    for key in beside:
        assert await store.get(key, max_bytes=1) == b"x"
    await store.delete_folder("work/1")
    await store.delete_folder("nothing/here")
    await store.delete_folder("work/1.jpg")
    assert await store.get("work/1.jpg", max_bytes=1) == b"x"


async def test_a_folder_may_be_deleted_by_many_at_once(store: ArtifactStore) -> None:
    """Several that delete the same folder all succeed, and it is gone; a put into it afterwards holds."""
    for number in range(40):
        await store.put(f"work/1/{number:03d}.jpg", b"x", "image/jpeg")
    async with asyncio.TaskGroup() as group:
        for _ in range(6):
            group.create_task(store.delete_folder("work/1"))
    with pytest.raises(ArtifactMissingError):
        await store.get("work/1/039.jpg", max_bytes=1)
    await store.put("work/1/a.jpg", b"a", "image/jpeg")
    assert await store.get("work/1/a.jpg", max_bytes=1) == b"a"


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../up", "a/../b", "a//b", "a/", "a b", "a\n", "ü", "a/./b", "~x", "x" * 513])
async def test_a_bad_key_is_refused_everywhere(store: ArtifactStore, key: str) -> None:
    """A key that is_valid_key does not take is refused by every method, for good."""
    with pytest.raises(StoreRefusedError):
        await store.put(key, b"x", "image/jpeg")
    with pytest.raises(StoreRefusedError):
        await store.get(key, max_bytes=1)
    with pytest.raises(StoreRefusedError):
        await store.delete(key)
    with pytest.raises(StoreRefusedError):
        await store.delete_folder(key)
    with pytest.raises(StoreRefusedError):
        store.url(key)


async def test_concurrent_puts_of_one_key_all_succeed(store: ArtifactStore) -> None:
    """Several attempts that store the same bytes at the same time all succeed, and the bytes are whole."""
    content = b"p" * 300_000
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(store.put(KEY, content, "image/jpeg")) for _ in range(12)]
    assert len({task.result() for task in tasks}) == 1
    assert await store.get(KEY, max_bytes=len(content)) == content


async def test_concurrent_puts_of_other_bytes_never_mix(store: ArtifactStore) -> None:
    """When different bytes race for a key, one of them is there afterwards, whole."""
    contents = [bytes([letter]) * 200_000 for letter in b"abcdef"]
    async with asyncio.TaskGroup() as group:
        for content in contents:
            group.create_task(store.put(KEY, content, "image/jpeg"))
    assert await store.get(KEY, max_bytes=200_000) in contents


async def test_puts_and_deletes_may_race(store: ArtifactStore) -> None:
    """Deleting one artifact of a folder never makes the put of another one fail or vanish."""

    async def come_and_go(name: str) -> None:
        for _ in range(15):
            await store.put(f"work/7/{name}.jpg", name.encode(), "image/jpeg")
            await store.delete(f"work/7/{name}.jpg")
        await store.put(f"work/7/{name}.jpg", name.encode(), "image/jpeg")

    names = ["a", "b", "c", "d"]
    async with asyncio.TaskGroup() as group:
        for name in names:
            group.create_task(come_and_go(name))
    assert [await store.get(f"work/7/{name}.jpg", max_bytes=1) for name in names] == [name.encode() for name in names]


async def test_a_check_passes_and_leaves_nothing(store: ArtifactStore) -> None:
    """A working store passes its check any number of times at once."""
    await asyncio.gather(store.check(), store.check(), store.check())
    with pytest.raises(ArtifactMissingError):
        await store.get(".check", max_bytes=1)


async def test_closing_twice_is_harmless(store: ArtifactStore) -> None:
    """A store may be closed more than once, used or unused."""
    await store.close()
    await store.close()

"""The child process that restores faces dies, hangs and babbles; what was in it comes out all the same."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from jobdaemon.backends.gfpgan import restorer as module
from jobdaemon.backends.gfpgan.frames import CROP_SHAPE, Pixels
from jobdaemon.backends.gfpgan.process import RefusedError
from jobdaemon.backends.gfpgan.restorer import Restorer, RestorerRules
from jobdaemon.errors import DeviceFailedError, PutOffError
from tests.daemons import until
from tests.integration.gfpgan_stand_in import (
    ABORTS,
    BABBLES,
    FAILS,
    FILLS_MEMORY,
    HANGS,
    IS_UNSOUND,
    KILLS,
    RAISES,
    SIGNALS,
    SLEEPS,
    TEARS,
)

STAND_IN = Path(__file__).with_name("gfpgan_stand_in.py")
pytestmark = pytest.mark.newest_postgres


def command(journal: Path, device: str = "cpu") -> list[str]:
    return [sys.executable, str(STAND_IN), "--weights", str(journal), "--device", device]


def crop(value: int) -> Pixels:
    return np.full(CROP_SHAPE, value, np.uint8)


def came_out(crops: Sequence[Pixels], restored: Sequence[Pixels]) -> bool:
    return all(np.array_equal(255 - before, after) for before, after in zip(crops, restored, strict=True))


@asynccontextmanager
async def restorer(
    journal: Path, *, batch: int = 4, max_wait_s: float = 0.05, timeout_s: float = 20.0
) -> AsyncIterator[Restorer]:
    rules = RestorerRules(batch, timedelta(seconds=max_wait_s), timedelta(seconds=timeout_s))
    made = Restorer(command(journal), rules)
    await made.start()
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def batches(journal: Path) -> list[list[int]]:
    return [[int(value) for value in line.split()] for line in journal.read_text().splitlines()]


def child_pid(made: Restorer) -> int:
    assert made._life is not None
    return made._life.pid


async def is_up(made: Restorer) -> int:
    await until(lambda: made._life is not None and made._life.is_alive)
    return child_pid(made)


async def test_faces_of_several_photos_share_a_batch(journal: Path) -> None:
    """What arrives within the wait goes together, in batches of at most so many, and each photo gets its own faces back."""
    async with restorer(journal, batch=4, max_wait_s=0.3) as made:
        photos = [[crop(20), crop(21)], [crop(30)], [crop(40), crop(41), crop(42)]]
        results = await asyncio.gather(*(made.restore(crops) for crops in photos))
    assert all(came_out(crops, restored) for crops, restored in zip(photos, results, strict=True))
    assert batches(journal) == [[20, 21, 30, 40], [41, 42]]


async def test_no_face_needs_no_device(journal: Path) -> None:
    """A photo without faces does not wait for the child."""
    async with restorer(journal) as made:
        assert await made.restore([]) == []


@pytest.mark.parametrize("evil", [KILLS, HANGS, BABBLES, RAISES, FAILS], ids=["kills", "hangs", "babbles", "raises", "fails"])
async def test_a_bad_face_fails_alone(journal: Path, evil: int) -> None:
    """A face that kills, hangs or breaks the child fails its own photo, retryably; those in its batch come out at once."""
    async with restorer(journal, batch=4, max_wait_s=0.3, timeout_s=2.0) as made:
        innocent = [[crop(20)], [crop(30), crop(31)]]
        *good, bad = await asyncio.gather(*(made.restore(crops) for crops in [*innocent, [crop(evil)]]), return_exceptions=True)
        assert isinstance(bad, DeviceFailedError)
        for crops, restored in zip(innocent, good, strict=True):
            assert not isinstance(restored, BaseException)
            assert came_out(crops, restored)
        # And the child that is there now works.
        assert came_out([crop(50)], await made.restore([crop(50)]))
    assert batches(journal).count([evil]) == 2
    assert all(len(batch) == 1 for batch in batches(journal)[1:])


async def test_a_face_without_numbers_costs_the_others_nothing(journal: Path) -> None:
    """The faces beside it come out of the same batch; it is tried by itself twice, and fails its own photo alone."""
    async with restorer(journal, batch=4, max_wait_s=0.3) as made:
        innocent = [[crop(20)], [crop(30), crop(31)]]
        *good, bad = await asyncio.gather(
            *(made.restore(crops) for crops in [*innocent, [crop(IS_UNSOUND)]]), return_exceptions=True
        )
        assert isinstance(bad, DeviceFailedError)
        assert "No numbers came out." in str(bad)
        for crops, restored in zip(innocent, good, strict=True):
            assert not isinstance(restored, BaseException)
            assert came_out(crops, restored)
    assert batches(journal) == [[20, 30, 31, IS_UNSOUND], [IS_UNSOUND], [IS_UNSOUND]]


async def test_a_killed_child_comes_back(journal: Path) -> None:
    """SIGKILL between two photos or in the middle of one: nobody notices."""
    async with restorer(journal, batch=2) as made:
        first = await is_up(made)
        os.kill(first, signal.SIGKILL)
        crops = [crop(20), crop(21), crop(SLEEPS)]
        assert came_out(crops, await made.restore(crops))
        second = await is_up(made)
        assert second != first
        work = asyncio.ensure_future(made.restore([crop(SLEEPS), crop(22)]))
        await until(lambda: batches(journal)[-1] == [SLEEPS, 22])
        os.kill(second, signal.SIGKILL)
        assert came_out([crop(SLEEPS), crop(22)], await work)


async def test_a_cancelled_photo_drops_its_faces(journal: Path) -> None:
    """What nobody waits for any more never reaches the device; what is there already disturbs nobody."""
    async with restorer(journal, batch=2) as made:
        await is_up(made)
        running = asyncio.ensure_future(made.restore([crop(SLEEPS), crop(20)]))
        await until(journal.exists)
        waiting = asyncio.ensure_future(made.restore([crop(30)]))
        other = asyncio.ensure_future(made.restore([crop(40)]))
        await asyncio.sleep(0)  # both wait now
        running.cancel()
        waiting.cancel()
        assert came_out([crop(40)], await other)
    assert batches(journal) == [[SLEEPS, 20], [40]]


async def test_short_memory_is_waited_for_and_then_put_off(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose memory somebody else has is tried again; after a while attempts are put off, which costs them nothing."""
    monkeypatch.setattr(module, "_PATIENCE_S", 1.0)
    async with restorer(journal, batch=2) as made:
        await is_up(made)
        with pytest.raises(PutOffError, match=r"with at the moment \(The device is full\)") as caught:
            await made.restore([crop(FILLS_MEMORY)])
        assert caught.value.retry_after == timedelta(seconds=10)
        assert len(batches(journal)) > 1
        # The child has lived on, and works when its memory is back.
        made._rest_until_s = 0.0
        assert came_out([crop(20)], await made.restore([crop(20)]))


async def test_a_child_that_cannot_come_back_puts_off(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While no child can be started attempts are put off, at once once that has lasted; and done when one can be."""
    monkeypatch.setattr(module, "_PATIENCE_S", 1.0)
    monkeypatch.setattr(module, "_LONGEST_REST_S", 0.2)
    async with restorer(journal) as made:
        pid = await is_up(made)
        sound, made._command = made._command, command(journal, "none")
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(PutOffError):
            await made.restore([crop(20)])
        with pytest.raises(PutOffError, match=r"with at the moment \(There is no such device\)"):
            made.require_device()
        assert made._down_since_s is not None
        made._down_since_s -= 3_600  # that long: it is asked less often
        with pytest.raises(PutOffError) as caught:
            made.require_device()
        assert caught.value.retry_after == timedelta(seconds=60)
        async with asyncio.timeout(5):  # far less than the patience of a start
            with pytest.raises(PutOffError):
                await made.restore([crop(20)])
        made._command = sound
        await is_up(made)
        made.require_device()
        assert came_out([crop(20)], await made.restore([crop(20)]))


async def test_a_bad_face_is_found_though_a_start_takes_longer_than_anybody_waits(
    journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everybody is put off at each death and comes back; the innocent get through, and the bad one is given up in the end."""
    monkeypatch.setattr(module, "_PATIENCE_S", 0.0)

    async def attempts(made: Restorer, crops: list[Pixels]) -> list[Pixels]:
        while True:
            await is_up(made)
            try:
                return await made.restore(crops)
            except PutOffError:
                continue

    async with restorer(journal, batch=4, max_wait_s=0.3) as made:
        async with asyncio.timeout(100):
            photos = [[crop(20)], [crop(KILLS)], [crop(30), crop(31)]]
            results = await asyncio.gather(*(attempts(made, crops) for crops in photos), return_exceptions=True)
    for crops, result in zip(photos, results, strict=True):
        if crops[0][0, 0, 0] == KILLS:
            assert isinstance(result, DeviceFailedError)
        else:
            assert not isinstance(result, BaseException)
            assert came_out(crops, result)


@pytest.mark.parametrize(
    ("device", "says", "lacks_device"),
    [
        ("none", "There is no such device", True),
        ("damaged", "The weights are damaged", False),
        ("dies", "SIGSEGV", False),
        ("useless", "does not start: .*illegal memory access", False),
    ],
)
async def test_a_child_that_cannot_load_refuses_the_start(journal: Path, device: str, says: str, lacks_device: bool) -> None:
    """One sentence that says why; and whether it is for want of a device."""
    made = Restorer(command(journal, device), RestorerRules(1, timedelta(0), timedelta(seconds=5)))
    # Settings are an operator's to mend, and nothing starts until then; a death may pass, and a service manager tries again.
    with pytest.raises(DeviceFailedError if device in ("dies", "useless") else RefusedError, match=says) as caught:
        await made.start()
    await made.close()
    assert getattr(caught.value, "lacks_device", False) == lacks_device


async def test_a_child_that_never_loads_refuses_the_start(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start is not waited for for ever."""
    monkeypatch.setattr(module, "_LOAD_TIMEOUT_S", 1.0)
    made = Restorer(command(journal, "silent"), RestorerRules(1, timedelta(0), timedelta(seconds=5)))
    with pytest.raises(DeviceFailedError, match="no answer for 1 s while loading"):
        await made.start()
    await made.close()


@pytest.mark.parametrize("compiles", [False, True])
async def test_a_start_waits_for_no_long_warm_up(journal: Path, monkeypatch: pytest.MonkeyPatch, compiles: bool) -> None:
    """Neither for one that takes longer than a start may, nor for a compiler; faces wait for it then."""
    if not compiles:
        monkeypatch.setattr(module, "_LOAD_TIMEOUT_S", 8.0)
    made = Restorer(command(journal, "slow"), RestorerRules(1, timedelta(0), timedelta(seconds=5), compiles=compiles))
    async with asyncio.timeout(60):
        assert (await made.start()).device == "slow"
    assert made._life is None
    await made.close()


@pytest.mark.parametrize(
    ("evil", "reason"),
    [
        (RAISES, "RuntimeError: CUDA error: an illegal memory access was encountered"),
        (ABORTS, "CUDA error: an illegal memory access was encountered"),
        (KILLS, "signal SIGKILL"),
        (TEARS, "signal SIGKILL"),
        (SIGNALS, f"signal {signal.SIGRTMIN + 5}"),
    ],
    ids=["raises", "aborts", "kills", "kills-amid-a-word", "signals"],
)
async def test_a_death_is_told_in_one_line(journal: Path, evil: int, reason: str) -> None:
    """What the process died of, not what happened to be printed last."""
    async with restorer(journal) as made:
        with pytest.raises(DeviceFailedError) as caught:
            await made.restore([crop(evil)])
    assert str(caught.value) == f"The face could not be restored: it died ({reason})."


async def test_a_child_that_is_not_waited_for_ends_quietly(journal: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A stop while it loads or warms up is nothing to write tracebacks about."""
    for _ in range(3):
        made = Restorer(command(journal), RestorerRules(1, timedelta(0), timedelta(seconds=5), compiles=True))
        await made.start()
        await made.close()
    assert not [record for record in caplog.records if "Traceback" in getattr(record, "line", "")]


async def test_the_signals_of_a_terminal_do_not_end_it(journal: Path) -> None:
    """SIGINT, SIGTERM and SIGHUP, sent to it or to the daemon's group, leave it at work."""
    async with restorer(journal) as made:
        pid = await is_up(made)
        assert os.getpgid(pid) != os.getpgid(0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)
        assert came_out([crop(20)], await made.restore([crop(20)]))
        assert child_pid(made) == pid


async def test_its_output_is_logged(journal: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What it prints becomes lines of the log, and the message of its death says what it said last."""
    caplog.set_level(logging.INFO)
    async with restorer(journal) as made:
        with pytest.raises(DeviceFailedError, match="illegal memory access"):
            await made.restore([crop(RAISES)])
    lines = [record.line for record in caplog.records if record.message == "the face restorer says" and hasattr(record, "line")]
    assert "warming up" in lines
    assert len(lines) > 3


async def test_closing_ends_it(journal: Path) -> None:
    """After close() no process is left, be it idle or at work."""
    async with restorer(journal) as made:
        pid = await is_up(made)
        work = asyncio.ensure_future(made.restore([crop(HANGS)]))
        await until(journal.exists)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises((PutOffError, asyncio.CancelledError)):
        await work


LONELY = """
import asyncio, sys
from datetime import timedelta
from jobdaemon.backends.gfpgan.restorer import Restorer, RestorerRules

async def main():
    made = Restorer(sys.argv[1:], RestorerRules(2, timedelta(0), timedelta(seconds=60)))
    await made.start()
    while made._life is None:
        await asyncio.sleep(0.01)
    print(made._life.pid, flush=True)
    import numpy as np
    await made.restore([np.full((512, 512, 3), 2, np.uint8)])

asyncio.run(main())
"""


async def test_it_does_not_outlive_a_killed_daemon(journal: Path) -> None:
    """SIGKILL of the daemon takes its child along, even one that hangs in a batch."""
    daemon = await asyncio.create_subprocess_exec(sys.executable, "-c", LONELY, *command(journal), stdout=subprocess.PIPE)
    assert daemon.stdout is not None
    pid = int(await daemon.stdout.readline())
    await until(journal.exists)
    daemon.kill()
    await daemon.wait()
    await until(lambda: not is_running(pid))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

"""One photo enhance server of the sandbox: its tasks, worked on one after another, and what it does to a picture."""

from __future__ import annotations

import asyncio
import hashlib
import io
import itertools
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from PIL import Image, ImageEnhance, ImageFilter

from jobdaemon.sandbox.faults import FILE_FAULTS, Fault
from jobdaemon.sandbox.shop import Shop, prompt_digest

API = "photo_enhance"
#: Width and height grow by so much.
SCALE = 4
#: What may happen to a task; a forgotten one answers 404.
_TASK_FAULTS = frozenset({Fault.EXPIRED_TASK, Fault.FAILED_TASK, Fault.UNRESTORED})
_OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB"
#: Tasks that are kept, with their results; the real one keeps all of them until it is restarted.
_MAX_TASKS = 200


@dataclass(eq=False, slots=True)
class Task:
    """
    One photo.

    Attributes:
        name: for what goes wrong with it: of the photo, and how often it was sent.
        content: as it was uploaded, until it is worked on.
        batch: the batch it belongs to: such a task has no folder of its own.
        result: what was made, until somebody deletes it.
        file_fault: what goes wrong when the result is fetched.
    """

    id: str
    name: str
    filename: str
    content: bytes
    fault: Fault | None
    batch: str | None = None
    status: str = "queued"
    progress: float = 0.0
    error: str | None = None
    created: float = field(default_factory=time.time)
    updated: float = field(default_factory=time.time)
    seconds: float | None = None
    result: bytes | None = None
    file_fault: Fault | None = None
    polls: int = 0

    def turn(self, status: str, progress: float) -> None:
        """It goes on."""
        self.status, self.progress, self.updated = status, progress, time.time()


@dataclass(frozen=True, slots=True)
class Batch:
    """Several tasks that were sent together."""

    id: str
    tasks: list[Task]
    created: float = field(default_factory=time.time)

    @property
    def status(self) -> str:
        """``partial_completed`` also when all of them failed."""
        statuses = {task.status for task in self.tasks}
        if statuses <= {"completed", "failed"}:
            return "completed" if statuses == {"completed"} else "partial_completed"
        return "queued" if statuses == {"queued"} else "processing"


class EnhanceServer:
    """
    Works on one photo at a time. One event loop.

    Attributes:
        speaks_docs: answers as the service's documentation says, not as its code does.
        is_blocking: answers nothing while it works on a photo, as the code does.
    """

    def __init__(self, shop: Shop, name: str) -> None:
        """
        Args:
            name: ``docs`` and ``blocking``, between hyphens, say how it behaves.
        """
        words = name.split("-")
        self.speaks_docs, self.is_blocking = "docs" in words, "blocking" in words
        self.key = f"{API}/{name}"
        self.shop = shop
        self.tasks: dict[str, Task] = {}
        self.batches: dict[str, Batch] = {}
        self._busy = asyncio.Lock()
        self._working: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count(1)
        self._uploads: Counter[str] = Counter()

    # What is asked of it

    def upload_fault(self, contents: Iterable[bytes], among: frozenset[Fault]) -> Fault | None:
        """What goes wrong with this upload; the same photo again is another throw."""
        digest = hashlib.sha256(b"".join(contents)).hexdigest()[:16]
        self._uploads[digest] += 1
        return self.shop.fault(API, self.key, f"{digest}:{self._uploads[digest]}", among)

    def add(self, filename: str, content: bytes, *, batch: str | None = None, is_slow: bool = False) -> Task:
        """A new task, whose slot of the account is taken; it is worked on when those before it are done."""
        digest = prompt_digest(hashlib.sha256(content).hexdigest())
        self.shop.count(API, "tasks")
        number = self.shop.count(API, f"photo:{digest}")
        if number > 1:
            self.shop.count(API, "duplicates")
        name = f"{digest}:{number}"
        fault = self.shop.fault(API, self.key, f"task:{name}", _TASK_FAULTS)
        task = Task(self.new_id(), name, filename, content, fault, batch)
        task.file_fault = self.shop.fault(API, self.key, f"file:{name}", FILE_FAULTS)
        self.tasks[task.id] = task
        while len(self.tasks) > _MAX_TASKS:
            del self.tasks[next(iter(self.tasks))]
        work = asyncio.create_task(self._work(task, Fault.SLOW if is_slow else None))
        self._working.add(work)
        work.add_done_callback(self._leave_place)
        return task

    def _leave_place(self, work: asyncio.Task[None]) -> None:
        self._working.discard(work)
        self.shop.end(API, self.key)

    def find(self, task_id: str) -> Task | None:
        """The task, unless it was forgotten."""
        return self.tasks.get(task_id)

    def delete(self, task: Task) -> bool:
        """
        Forget a task and its files. One of a batch has no folder of its own: with it goes every result there is, and the answer
        is an error.

        Returns:
            Whether it went well.
        """
        if task.batch is None:
            del self.tasks[task.id]
            self.shop.count(API, "deleted")
            return True
        self.shop.count(API, "emptied")
        for other in self.tasks.values():
            other.result = None
        return False

    def restart(self) -> None:
        """All tasks are forgotten, those under way as well."""
        for work in self._working:
            work.cancel()
        self.tasks.clear()
        self.batches.clear()

    async def wait_for_turn(self) -> None:
        """Return when it would come to answer a request."""
        if self.is_blocking:
            async with self._busy:
                pass

    def new_id(self) -> str:
        """Like a UUID."""
        digest = hashlib.sha256(f"{self.key}:{next(self._numbers)}:{id(self)}".encode()).hexdigest()
        return "-".join((digest[:8], digest[8:12], f"4{digest[13:16]}", f"8{digest[17:20]}", digest[20:32]))

    # The work

    async def _work(self, task: Task, fault: Fault | None) -> None:
        async with self._busy:
            await self._enhance(task, self.shop.work_s(fault))
        if task.fault is Fault.EXPIRED_TASK:
            self.tasks.pop(task.id, None)

    async def _enhance(self, task: Task, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        task.turn("processing", 0.1)
        await asyncio.sleep(seconds / 3)
        task.turn("processing", 0.3)
        content, task.content = task.content, b""
        try:
            result = await asyncio.to_thread(enhanced, content, is_restored=task.fault is not Fault.UNRESTORED)
        except (OSError, ValueError, SyntaxError) as error:
            task.error = f"cannot identify image file ({type(error).__name__})"
            task.turn("failed", task.progress)
            return
        await asyncio.sleep(max(0.0, began_s + seconds - loop.time()))
        if task.fault is Fault.FAILED_TASK:
            task.error = _OUT_OF_MEMORY
            task.turn("failed", task.progress)
            return
        task.result, task.seconds = result, loop.time() - began_s
        task.turn("completed", 1.0)

    # How it tells

    def told_time(self, moment: float) -> float | str:
        """A number in the code, a text in the documentation."""
        return datetime.fromtimestamp(moment, UTC).isoformat() if self.speaks_docs else moment

    def told_progress(self, share: float) -> float | int:
        """A share in the code, percent in the documentation."""
        return round(share * 100) if self.speaks_docs else share

    def told_status(self, status: str) -> str:
        """What waits is ``queued`` in the code, ``pending`` in the documentation."""
        return "pending" if self.speaks_docs and status == "queued" else status

    def told_task(self, task: Task) -> dict[str, Any]:
        """The answer of /status."""
        has_link = task.status == "completed" and task.batch is None
        return {
            "task_id": task.id,
            "status": self.told_status(task.status),
            "message": f"Task {task.status}",
            "progress": self.told_progress(task.progress),
            "result_url": f"/api/v1/download/{task.id}" if has_link else None,
            "error": task.error,
            "created_at": self.told_time(task.created),
            "updated_at": self.told_time(task.updated),
            "processing_time": task.seconds,
        }

    def told_batch(self, batch: Batch) -> dict[str, Any]:
        """The answer of /batch/status; its progress stays 0 until the end."""
        counts = Counter(task.status for task in batch.tasks)
        is_over = batch.status in ("completed", "partial_completed")
        return {
            "batch_task_id": batch.id,
            "status": batch.status,
            "total_files": len(batch.tasks),
            "completed_files": counts["completed"],
            "failed_files": counts["failed"],
            "progress": self.told_progress(1.0 if is_over else 0.0),
            "sub_tasks": [
                {
                    "task_id": task.id,
                    "status": self.told_status(task.status),
                    "filename": task.filename,
                    "progress": self.told_progress(task.progress),
                    "error": task.error,
                }
                for task in batch.tasks
            ],
            "created_at": self.told_time(batch.created),
            "updated_at": self.told_time(max(task.updated for task in batch.tasks)),
            "message": f"Batch {batch.status}",
        }


def enhanced(content: bytes, *, is_restored: bool = True) -> bytes:
    """
    A JPEG of the picture with every side :data:`SCALE` times as long.

    Args:
        is_restored: whether skin is evened out and lit a little; otherwise it is the picture as it was, only larger.
    """
    with Image.open(io.BytesIO(content)) as opened:
        picture = opened.convert("RGB")
    if is_restored:
        picture = ImageEnhance.Brightness(picture.filter(ImageFilter.SMOOTH_MORE)).enhance(1.06)
    large = picture.resize((picture.width * SCALE, picture.height * SCALE), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    large.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()

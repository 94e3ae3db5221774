"""One ComfyUI server of the sandbox: a queue that runs one prompt at a time, its history, files and websockets."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from jobdaemon.sandbox.comfyui_nodes import Nodes, pictures, signature, wish
from jobdaemon.sandbox.faults import SLOW_FACTOR, TASK_FAULTS, Fault
from jobdaemon.sandbox.shop import File, Shop, prompt_digest

API = "comfyui"
#: The real one keeps as many.
_MAX_HISTORY = 10_000
_STEPS = 4
_PREVIEW = b"\x00\x00\x00\x01\x00\x00\x00\x02"
Place = tuple[str, str, str]


@dataclass(order=True, slots=True)
class Item:
    """One prompt of the queue; lower numbers run first."""

    number: float
    prompt_id: str
    nodes: Nodes = field(compare=False)
    extra: Mapping[str, Any] = field(compare=False)
    outputs: list[str] = field(compare=False)
    fault: Fault | None = field(default=None, compare=False)

    def row(self) -> list[Any]:
        """As /queue and /history show it."""
        return [self.number, self.prompt_id, self.nodes, self.extra, self.outputs]

    @property
    def client_id(self) -> str | None:
        """Whose websocket gets its events."""
        client = self.extra.get("client_id")
        return client if isinstance(client, str) else None


class ComfyEngine:
    """See the module docstring. One event loop."""

    def __init__(self, shop: Shop, name: str) -> None:
        self._shop = shop
        self._account = shop.account(API, f"{API}/{name}")
        self._key = f"{API}/{name}"
        self._numbers = itertools.count()
        self._calls: Counter[str] = Counter()
        self.pending: list[Item] = []
        self.running: Item | None = None
        self.history: dict[str, dict[str, Any]] = {}
        #: (type, subfolder, name) -> what was uploaded, or made here.
        self.files: dict[Place, bytes | File] = {}
        self.sockets: dict[str, web.WebSocketResponse] = {}
        self._counters: Counter[tuple[str, str]] = Counter()
        #: What the prompt before this one computed: the real cache remembers no longer by default.
        self._made: dict[str, list[File]] = {}
        self._shown: dict[str, list[dict[str, str]]] = {}
        self._interrupted = asyncio.Event()
        self._work: asyncio.Task[None] | None = None

    # The queue

    @property
    def remaining(self) -> int:
        """Prompts that wait or run."""
        return len(self.pending) + (self.running is not None)

    def call_fault(self, nodes: Nodes, among: frozenset[Fault]) -> Fault | None:
        """What goes wrong with this submit; the next one of the same wish is another throw."""
        digest = prompt_digest(wish(nodes))
        self._account.calls += 1
        self._calls[digest] += 1
        fault = self._shop.fault(API, self._key, f"{digest}:{self._calls[digest]}", among)
        self._account.rejected += fault is Fault.RATE_LIMITED
        return fault

    async def put(
        self,
        prompt_id: str,
        nodes: Nodes,
        extra: Mapping[str, Any],
        outputs: list[str],
        *,
        number: float | None = None,
        front: bool = False,
        fault: Fault | None = None,
    ) -> float:
        """Queue a prompt; returns its number."""
        if number is None:
            number = next(self._numbers) * (-1 if front else 1)
        self.pending.append(Item(number, prompt_id, nodes, extra, outputs, fault))
        self.pending.sort()
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._run())
        await self._tell_status()
        return number

    async def delete(self, prompt_ids: Iterable[str] | None) -> None:
        """Take these out of the queue, or all of them; what runs goes on."""
        gone = None if prompt_ids is None else set(prompt_ids)
        self.pending = [] if gone is None else [item for item in self.pending if item.prompt_id not in gone]
        await self._tell_status()

    def interrupt(self, prompt_id: str | None) -> None:
        """Stop what runs, if it is this prompt; whatever it is when none is named."""
        if self.running is not None and prompt_id in (None, self.running.prompt_id):
            self._interrupted.set()

    async def _run(self) -> None:
        while self.pending:
            self.running = item = self.pending.pop(0)
            self._interrupted.clear()
            account = self._account
            account.open += 1
            account.peak = max(account.peak, account.open)
            try:
                await self._execute(item)
            finally:
                account.open -= 1
                self.running = None
            await self._tell_status()
            await self._tell(item.client_id, "executing", {"node": None, "prompt_id": item.prompt_id})

    async def _execute(self, item: Item) -> None:
        digest = prompt_digest(wish(item.nodes))
        task_fault = self._shop.fault(API, self._key, f"task:{digest}:{self._calls[digest]}", TASK_FAULTS)
        if task_fault is Fault.EXPIRED_TASK:
            return  # as if the server had been restarted
        messages: list[list[Any]] = []
        await self._note(item, messages, "execution_start", {})
        images = {number: self._source(item, number) for number in item.outputs}
        computed = [number for number, source in images.items() if source is not None and source not in self._made]
        cached = [number for number in item.outputs if number not in computed]
        await self._note(item, messages, "execution_cached", {"nodes": cached})
        is_failed = task_fault is Fault.FAILED_TASK
        if computed and not await self._compute(item, computed[0], item.fault):
            await self._end(item, messages, {}, ("execution_interrupted", _about(item, computed[0])))
            return
        if is_failed and computed:
            await self._end(item, messages, {}, ("execution_error", _about(item, computed[0]) | _OUT_OF_MEMORY))
            return
        await self._end(item, messages, await self._outputs(item, images, task_fault), ("execution_success", {}))

    def _source(self, item: Item, number: str) -> str | None:
        """The signature of the pictures that an output node takes; None for one that takes none."""
        link = item.nodes[number].get("inputs", {}).get("images")
        return signature(item.nodes, link[0], self._digest) if isinstance(link, list) else None

    def _digest(self, name: str) -> str:
        content = self.files.get(("input", *_split(name)))
        return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else name

    async def _compute(self, item: Item, number: str, fault: Fault | None) -> bool:
        """Take as long as the pictures take, telling of each step; whether nobody interrupted."""
        factor = SLOW_FACTOR if fault is Fault.SLOW else 1.0
        await self._tell(item.client_id, "executing", {"node": number, "display_node": number, "prompt_id": item.prompt_id})
        for step in range(1, _STEPS + 1):
            with suppress(TimeoutError):
                async with asyncio.timeout(self._shop.behaviour.latency_s * factor / _STEPS):
                    await self._interrupted.wait()
                    return False
            progress = {"value": step, "max": _STEPS, "prompt_id": item.prompt_id, "node": number}
            await self._tell(item.client_id, "progress", progress)
            await self._show(item.client_id)
        return True

    async def _outputs(self, item: Item, images: Mapping[str, str | None], fault: Fault | None) -> dict[str, Any]:
        """Save what each output node takes; what is computed for the first time is bought."""
        outputs: dict[str, Any] = {}
        made: dict[str, list[File]] = {}
        shown: dict[str, list[dict[str, str]]] = {}
        for number, source in images.items():
            if source is None:
                outputs[number] = {"text": [wish(item.nodes)]}
            else:
                files = made.get(source) or self._made.get(source) or self._buy(item, number, fault)
                own = signature(item.nodes, number, self._digest)
                made[source] = files
                shown[own] = self._shown.get(own) or self._saved(item, number, files)
                outputs[number] = {"images": shown[own]}
            about = {"node": number, "display_node": number, "output": outputs[number], "prompt_id": item.prompt_id}
            await self._tell(item.client_id, "executed", about)
        self._made, self._shown = made, shown
        return outputs

    def _buy(self, item: Item, number: str, fault: Fault | None) -> list[File]:
        count, size = pictures(item.nodes, item.nodes[number]["inputs"]["images"][0])
        count -= fault is Fault.PARTIAL
        return self._shop.buy(API, wish(item.nodes), count, size=size, price=0.0) if count else []

    def _saved(self, item: Item, number: str, files: list[File]) -> list[dict[str, str]]:
        inputs = item.nodes[number]["inputs"]
        kind = "output" if "filename_prefix" in inputs else "temp"
        subfolder, prefix = _split(str(inputs.get("filename_prefix", "ComfyUI_temp")))
        saved = []
        for file in files:
            self._counters[subfolder, prefix] += 1
            name = f"{prefix}_{self._counters[subfolder, prefix]:05d}_.png"
            self.files[kind, subfolder, name] = file
            saved.append({"filename": name, "subfolder": subfolder, "type": kind})
        return saved

    async def _end(
        self, item: Item, messages: list[list[Any]], outputs: dict[str, Any], last: tuple[str, dict[str, Any]]
    ) -> None:
        kind, about = last
        await self._note(item, messages, kind, about)
        is_success = kind == "execution_success"
        self.history[item.prompt_id] = {
            "prompt": item.row(),
            "outputs": outputs,
            "status": {"status_str": "success" if is_success else "error", "completed": is_success, "messages": messages},
            "meta": {
                number: {"node_id": number, "display_node": number, "parent_node": None, "real_node_id": number}
                for number in outputs
            },
        }
        while len(self.history) > _MAX_HISTORY:
            del self.history[next(iter(self.history))]

    # Websockets

    async def _note(self, item: Item, messages: list[list[Any]], kind: str, about: dict[str, Any]) -> None:
        """An event that is kept for the history too."""
        data = {**about, "prompt_id": item.prompt_id, "timestamp": int(time.time() * 1000)}
        messages.append([kind, data])
        await self._tell(item.client_id, kind, data, is_for_all=kind == "execution_interrupted")

    def status(self) -> dict[str, Any]:
        """What the event ``status`` says."""
        return {"status": {"exec_info": {"queue_remaining": self.remaining}}}

    async def _tell_status(self) -> None:
        await self._tell(None, "status", self.status(), is_for_all=True)

    async def _tell(self, client_id: str | None, kind: str, data: dict[str, Any], *, is_for_all: bool = False) -> None:
        for listener, socket in list(self.sockets.items()):
            if is_for_all or listener == client_id:
                with suppress(ConnectionError):
                    await socket.send_json({"type": kind, "data": data})

    async def _show(self, client_id: str | None) -> None:
        """A preview: a binary frame."""
        socket = self.sockets.get(client_id or "")
        if socket is not None:
            with suppress(ConnectionError):
                await socket.send_bytes(_PREVIEW)


_OUT_OF_MEMORY = {
    "exception_message": "Allocation on device 0 would exceed allowed memory. (out of memory)",
    "exception_type": "torch.OutOfMemoryError",
    "traceback": [],
    "current_inputs": {},
    "current_outputs": [],
}


def _about(item: Item, number: str) -> dict[str, Any]:
    return {"node_id": number, "node_type": item.nodes[number]["class_type"], "executed": []}


def _split(path: str) -> tuple[str, str]:
    """Subfolder and name."""
    subfolder, _, name = path.rpartition("/")
    return subfolder, name

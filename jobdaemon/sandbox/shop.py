"""
What all the sandbox's image APIs share: who may call how often, what goes wrong, what was bought, and the files it ends in.

    api module (openai_images.py, dashscope.py, …)   speaks one API: routes, bodies, that API's own errors and signatures
        Shop.enter(key)          -> a ticket, or Full: the limits of that key
        Shop.fault(name, …)      -> what goes wrong with this call, task or file
        Shop.bought(...)         -> images that now cost money, as files with links
    files.py                                          serves the files, wholly or badly

An API counts an image as bought when the real one would charge for it. How often one image was bought is told by its prompt:
whoever tests gives every order prompts of its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import itertools
import math
import random
import struct
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from PIL import Image

from jobdaemon.sandbox.faults import FILE_FAULTS, SLOW_FACTOR, Fault, Faults

#: What an image costs when an API says nothing else; any currency.
_PRICE = 0.04
#: As long as the real services keep links.
LINK_LIFETIME_S = 24 * 3600.0
#: Files kept; older ones are gone, as if they had expired.
_MAX_FILES = 5_000
#: The text chunk of every PNG that holds its number.
NUMBER_KEYWORD = "Number"
_COLOUR = (186, 151, 120)
#: Sides of an image when nothing says them, and when they are more than anybody draws here.
_IMAGE_PX = (512, 768)
_MAX_PIXELS = 4096 * 4096
#: Signature and IHDR: text chunks may follow.
_PNG_HEADER_BYTES = 8 + 25


@dataclass(slots=True)
class Behaviour:
    """
    How the provider behaves; may change while it runs.

    Attributes:
        latency_s: how long a call (or the work of a task) takes.
        concurrency: most calls of one queue or key under way at once, more are refused; None is no limit.
        qps: most calls of one queue or key begun within any second; None is no limit.
        image_px: the sides of the images made, width and height, whatever a call asks for; None makes them as they are asked for.
        image_bytes: images are made about this large; None leaves them as small as they are.
    """

    latency_s: float = 8.0
    concurrency: int | None = None
    qps: float | None = None
    faults: Faults = field(default_factory=Faults)
    image_px: tuple[int, int] | None = None
    image_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Full:
    """A call was refused by a limit of its key; *by_rate* tells the rate from the concurrency, *retry_after_s* whole seconds."""

    by_rate: bool
    retry_after_s: int


@dataclass(slots=True)
class File:
    """
    An image somebody bought, drawn when it is wanted.

    Attributes:
        size: width and height, pixels.
        wanted_bytes: about how large the file is to be; None leaves it as small as it is.
        fault: what goes wrong when it is fetched.
    """

    number: int
    size: tuple[int, int]
    wanted_bytes: int | None
    fault: Fault | None
    expires_at: float

    def content(self) -> bytes:
        """A PNG that no other number has: the same bytes each time."""
        return _picture(self.number, self.size, self.wanted_bytes)


@dataclass(slots=True)
class Account:
    """What one key of one API did."""

    open: int = 0
    peak: int = 0
    calls: int = 0
    rejected: int = 0
    unauthorised: int = 0
    begun: deque[float] = field(default_factory=deque)
    faults: Counter[str] = field(default_factory=Counter)


class Shop:
    """See the module docstring. One event loop."""

    def __init__(self, behaviour: Behaviour, *, url: Callable[[], str], clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            url: where the sandbox listens, for links.
        """
        self.behaviour = behaviour
        self._url = url
        self._clock = clock
        self._accounts: dict[tuple[str, str], Account] = {}
        self._bought: dict[str, Counter[str]] = {}
        self._money: Counter[str] = Counter()
        self._counts: dict[str, Counter[str]] = {}
        self._files: dict[str, File] = {}
        self._numbers = itertools.count(1)

    def account(self, api: str, key: str) -> Account:
        """The counts of one key."""
        return self._accounts.setdefault((api, key), Account())

    @contextmanager
    def enter(self, api: str, key: str) -> Iterator[Full | None]:
        """
        One call that costs a slot of its key for as long as the block lasts; yields Full when it may not.

        For an API whose calls are answered at once and whose tasks hold the slot, use :meth:`begin` and :meth:`end`.
        """
        full = self.begin(api, key)
        try:
            yield full
        finally:
            if full is None:
                self.end(api, key)

    def begin(self, api: str, key: str) -> Full | None:
        """Take a slot of this key, to be given back by :meth:`end`; or say why not."""
        account, behaviour = self.account(api, key), self.behaviour
        account.calls += 1
        if behaviour.concurrency is not None and account.open >= behaviour.concurrency:
            account.rejected += 1
            return Full(by_rate=False, retry_after_s=1)
        if behaviour.qps is not None and (wait_s := self._rate_wait(account, behaviour.qps)) is not None:
            account.rejected += 1
            return Full(by_rate=True, retry_after_s=wait_s)
        account.open += 1
        account.peak = max(account.peak, account.open)
        return None

    def end(self, api: str, key: str) -> None:
        """Give a slot back."""
        self.account(api, key).open -= 1

    def _rate_wait(self, account: Account, qps: float) -> int | None:
        now = self._clock()
        window_s = max(1.0, 1.0 / qps)
        while account.begun and now - account.begun[0] >= window_s:
            account.begun.popleft()
        if len(account.begun) >= max(1, math.floor(qps)):
            return math.ceil(window_s - (now - account.begun[0]))
        account.begun.append(now)
        return None

    def fault(self, api: str, key: str, name: str, among: frozenset[Fault]) -> Fault | None:
        """What goes wrong with the thing called *name*, if anything; counted for the report."""
        fault = self.behaviour.faults.drawn(f"{api}:{name}", among)
        if fault is not None:
            self.account(api, key).faults[str(fault)] += 1
        return fault

    async def work(
        self, fault: Fault | None = None, *, began_at: float | None = None, size: tuple[int, int] | None = None
    ) -> None:
        """
        Take as long as making images takes.

        Args:
            size: as for :meth:`buy`.
            began_at: by the event loop's clock, when the call came in: what we did since is part of its time.
        """
        loop = asyncio.get_running_loop()
        over_at = (loop.time() if began_at is None else began_at) + self.work_s(fault)
        await asyncio.to_thread(_drawn, self._size(size), self.behaviour.image_bytes)
        await asyncio.sleep(max(0.0, over_at - loop.time()))

    def work_s(self, fault: Fault | None = None) -> float:
        """How long making images takes, seconds."""
        return self.behaviour.latency_s * (SLOW_FACTOR if fault is Fault.SLOW else 1.0)

    def count(self, api: str, name: str) -> int:
        """Once more of what an API counts for itself, and how often by now; a name with a colon in it is not reported."""
        counts = self._counts.setdefault(api, Counter())
        counts[name] += 1
        return counts[name]

    def buy(self, api: str, prompt: str, count: int, *, size: tuple[int, int] | None = None, price: float = _PRICE) -> list[File]:
        """
        *count* images of *prompt* now cost money.

        Args:
            size: width and height in pixels that the call asks for; None when it leaves them open.
        """
        self.charge(api, prompt, count, price=price)
        return self.make(api, count, size=size)

    def make(self, api: str, count: int, *, size: tuple[int, int] | None = None) -> list[File]:
        """*count* images, for nothing as yet; *size* as for :meth:`buy`."""
        return [self._file(api, self._size(size)) for _ in range(count)]

    def charge(self, api: str, prompt: str, count: int, *, price: float = _PRICE) -> None:
        """What was made of *prompt* now costs money."""
        self._bought.setdefault(api, Counter())[prompt_digest(prompt)] += count
        self._money[api] += round(price * count * 10_000)

    def _size(self, asked: tuple[int, int] | None) -> tuple[int, int]:
        if self.behaviour.image_px is not None:
            return self.behaviour.image_px
        return asked if asked is not None and asked[0] * asked[1] <= _MAX_PIXELS else _IMAGE_PX

    def _file(self, api: str, size: tuple[int, int]) -> File:
        number = next(self._numbers)
        fault = self.behaviour.faults.drawn(f"{api}:file:{number}", FILE_FAULTS)
        file = File(number, size, self.behaviour.image_bytes, fault, self._clock() + LINK_LIFETIME_S)
        self._files[f"{number:08x}"] = file
        while len(self._files) > _MAX_FILES:
            del self._files[next(iter(self._files))]
        return file

    def link(self, file: File) -> str:
        """Where *file* can be fetched."""
        signature = hashlib.sha256(b"%d" % file.number).hexdigest()[:24]
        return f"{self._url()}/files/{file.number:08x}.png?signature={signature}"

    def find_file(self, name: str) -> File | None:
        """The file behind a link's last part, unless it has expired."""
        file = self._files.get(name.partition(".")[0])
        return None if file is None or self._clock() >= file.expires_at else file

    def report(self) -> dict[str, Any]:
        """
        Returns:
            By API: ``calls``, ``rejected`` (by a limit), ``unauthorised``, ``peak_concurrency`` (of any one key), ``keys`` (the
            same by key, masked), ``faults``, ``images_bought``, ``bought`` (prompt digest -> images), ``money``, and what it
            counts for itself.
        """
        apis: dict[str, dict[str, Any]] = {}
        for (api, key), account in sorted(self._accounts.items()):
            entry = apis.setdefault(api, {"keys": {}, "faults": Counter(), "peak_concurrency": 0})
            for name in ("calls", "rejected", "unauthorised"):
                entry[name] = entry.get(name, 0) + getattr(account, name)
            entry["peak_concurrency"] = max(entry["peak_concurrency"], account.peak)
            entry["keys"][_masked(key)] = {"calls": account.calls, "peak_concurrency": account.peak, "rejected": account.rejected}
            entry["faults"] += account.faults
        for api, entry in apis.items():
            bought = self._bought.get(api, Counter())
            entry |= {"images_bought": bought.total(), "bought": dict(bought), "money": self._money[api] / 10_000}
            entry["faults"] = dict(entry["faults"])
            entry |= {name: times for name, times in self._counts.get(api, Counter()).items() if ":" not in name}
        return apis


def prompt_digest(prompt: str) -> str:
    """How the report names a prompt."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def _masked(key: str) -> str:
    return f"…{key[-4:]}" if len(key) > 8 else "…"


def _picture(number: int, size: tuple[int, int], wanted_bytes: int | None) -> bytes:
    """A PNG that says its number in a text chunk, so like no other; drawn once for all, since the daemons need the CPU."""
    drawn = _drawn(size, wanted_bytes)
    chunk = b"tEXt" + f"{NUMBER_KEYWORD}\0{number}".encode()
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"".join((drawn[:_PNG_HEADER_BYTES], chunk, drawn[_PNG_HEADER_BYTES:]))


@lru_cache(maxsize=16)
def _drawn(size: tuple[int, int], wanted_bytes: int | None) -> bytes:
    """A PNG in one colour, with as much noise as makes it as large as wanted."""
    picture = Image.new("RGB", size, _COLOUR)
    if wanted_bytes is not None:
        # Noise does not compress: as many noisy rows as give the size, the rest plain.
        rows = min(size[1], max(1, wanted_bytes // (size[0] * 3)))
        noise = random.Random(size[0]).randbytes(size[0] * rows * 3)
        picture.paste(Image.frombytes("RGB", (size[0], rows), noise), (0, 0))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()

"""
A daemon in a process of its own whose provider and store are the sandbox's: a real supervisor, stages that call the referee.

    python -m tests.chaos.worker --url POSTGRES --referee http://127.0.0.1:PORT --name d1
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import aiohttp

from jobdaemon import schema_version
from jobdaemon.db import DatabaseAddress
from jobdaemon.domain.expand import WantedImage, generate_jobs, upload_job
from jobdaemon.domain.job import Task
from jobdaemon.domain.outcome import Done
from jobdaemon.domain.retry import RetryPolicy
from jobdaemon.domain.write import ImageGenerated, ImageStored, OrderStarted
from jobdaemon.errors import InvalidOrderError, ProviderUnavailableError, RateLimitedError, StoreUnavailableError
from jobdaemon.events import Events
from jobdaemon.logs import configure_logs, log_events
from jobdaemon.ports import Attempt, Stage
from jobdaemon.queue.attempt import AttemptRules
from jobdaemon.queue.store import PostgresJobStore
from jobdaemon.queue.supervisor import EngineRules, QueueRules, Supervisor
from tests.factories import PLANS, QUEUES, beautified

#: Small batches: many calls per order.
IMAGES_PER_CALL = 2
#: Faults are the exception here, kills the rule; no honest run of bad luck spends so many.
POLICY = RetryPolicy(attempts=10, backoff=timedelta(seconds=0.2), cap=timedelta(seconds=2), jitter=0.2)
RULES = AttemptRules(run_timeout=timedelta(seconds=60), retry=POLICY)


@dataclass(slots=True)
class Beautify:
    """Does nothing, then orders the provider calls."""

    store: PostgresJobStore

    async def run(self, attempt: Attempt) -> Done:
        order_id = attempt.job.args["order_id"]
        await attempt.checkpoint(OrderStarted(order_id))
        wanted = [WantedImage(row.index, row.prompt) for row in await self.store.orders.load_images(order_id)]
        return Done((beautified(order_id, *generate_jobs(order_id, attempt.job.priority, "local", wanted, IMAGES_PER_CALL)),))


@dataclass(slots=True)
class Generate:
    """One call of the referee; each image's digest goes into its locator."""

    store: PostgresJobStore
    http: aiohttp.ClientSession
    name: str

    async def run(self, attempt: Attempt) -> Done:
        job = attempt.job
        order_id = job.args["order_id"]
        rows = {row.index: row for row in await self.store.orders.load_images(order_id)}
        missing = [index for index in job.args["images"] if rows[index].status == "pending"]
        if not missing:
            return Done()
        call = {"queue": job.queue, "order_id": order_id, "images": missing, "daemon": self.name, "job_id": job.id}
        answer = await self._call(call | {"token": job.token})
        await attempt.free_slot()
        for image in answer["images"]:
            index = image["index"]
            then = (upload_job(order_id, job.priority, index),)
            await attempt.checkpoint(ImageGenerated(order_id, index, "local", f"artifact:{image['digest']}", then=then))
        return Done()

    async def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        try:
            async with self.http.post("/call", json=call) as answer:
                if answer.status == 429:
                    retry_after = timedelta(seconds=int(answer.headers["Retry-After"]))
                    raise RateLimitedError("the sandbox is full", retry_after=retry_after)
                if answer.status != 200:
                    raise ProviderUnavailableError(f"the sandbox answered {answer.status}")
                body: dict[str, Any] = await answer.json()
                return body
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ProviderUnavailableError(f"the sandbox did not answer: {type(error).__name__}") from error


@dataclass(slots=True)
class Upload:
    """Has the referee keep an image's digest, then records it as stored."""

    store: PostgresJobStore
    http: aiohttp.ClientSession

    async def run(self, attempt: Attempt) -> Done:
        order_id, index = attempt.job.args["order_id"], attempt.job.args["image"]
        [row] = [row for row in await self.store.orders.load_images(order_id) if row.index == index]
        if row.status == "stored":
            return Done()
        if row.locator is None:
            raise InvalidOrderError(f"image {index} of order {order_id} has nothing to store")
        digest = row.locator.removeprefix("artifact:")
        try:
            kept = {"order_id": order_id, "image": index, "digest": digest}
            async with self.http.post("/store", json=kept, raise_for_status=True):
                pass
        except (aiohttp.ClientError, TimeoutError) as error:
            raise StoreUnavailableError(f"the sandbox did not answer: {type(error).__name__}") from error
        key = f"orders/{order_id}/{index:03d}-{digest[:16]}.jpg"
        stored = ImageStored(
            order_id, index, object_key=key, url=None, sha256=digest, size_bytes=1, width=8, height=8, media_type="image/jpeg"
        )
        return Done((stored,))


async def work(arguments: argparse.Namespace) -> None:
    """Run until SIGTERM."""
    events = Events()
    log_events(events)
    store = PostgresJobStore(DatabaseAddress(arguments.url))

    async def discard(keys: tuple[str, ...]) -> None:
        """Nothing is kept here."""

    # As many connections as slots, and more: a call that waits for one would not be open at the referee.
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=50)
    async with aiohttp.ClientSession(arguments.referee, connector=connector, timeout=timeout) as http:
        stages: dict[str, Stage] = {
            Task.BEAUTIFY: Beautify(store),
            Task.GENERATE: Generate(store, http, arguments.name),
            Task.UPLOAD: Upload(store, http),
        }
        sizes = dict.fromkeys(QUEUES, 8) | {"generate.local": arguments.slots}
        supervisor = Supervisor(
            store=store,
            stages=stages,
            queues={name: QueueRules(size, RULES) for name, size in sizes.items()},
            engine=EngineRules(
                heartbeat=timedelta(seconds=arguments.lease / 5),
                lease=timedelta(seconds=arguments.lease),
                poll=timedelta(seconds=arguments.lease / 5),
                stop_grace=timedelta(seconds=10),
            ),
            events=events,
            version="chaos",
            require_schema=lambda applied: schema_version.compare(applied).require_usable(),
            ensure_rows=lambda: store.ensure_rows(QUEUES, PLANS),
            discard=discard,
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, supervisor.stop, number.name)
        try:
            await supervisor.run(wait_for_database=True)
        finally:
            await store.close()


def main() -> None:
    """Parse the command line and work."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--referee", required=True)
    parser.add_argument("--name", required=True, help="what the referee calls this process")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--lease", type=float, default=3.0, help="seconds; heartbeat and poll are a fifth of it")
    arguments = parser.parse_args()
    configure_logs("json", "info")
    asyncio.run(work(arguments))


if __name__ == "__main__":
    main()

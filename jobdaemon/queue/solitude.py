"""
Solitude: a suspect, whose workers died again and again, runs alone in its daemon, so that its next death proves something and
hurts nobody else.

A suspect that was claimed keeps its slot, closes the door (this daemon claims nothing more) and waits until nothing else runs.
What was on its way through the door meanwhile is handed back unspent, another suspect too: any other daemon may take it.
"""

from __future__ import annotations

import asyncio

from jobdaemon.domain.job import Job
from jobdaemon.events import Events, JobIsolated


class NotNowError(Exception):
    """This attempt may not run in this daemon now; somebody else may."""


class Solitude:
    """Who runs in this process; see the module docstring."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._company = 0
        self._quiet = asyncio.Event()
        self._open = asyncio.Event()
        self._open.set()
        self._is_alone = False

    async def until_open(self) -> None:
        """Wait while a suspect runs, or waits to."""
        await self._open.wait()

    async def join(self, job: Job) -> None:
        """
        Wait until *job* may run; :meth:`leave` it, committed, afterwards.

        Raises:
            NotNowError: a suspect has this daemon for itself.
        """
        if not job.is_suspect:
            if self._is_alone:
                raise NotNowError("a suspect runs alone in this daemon")
            self._company += 1
            return
        if not self._open.is_set():
            raise NotNowError("another suspect comes first in this daemon")
        self._open.clear()
        self._events.emit(JobIsolated(job_id=job.id, queue=job.queue, deaths=job.deaths, order_id=job.order_id))
        try:
            while self._company:
                self._quiet.clear()
                await self._quiet.wait()
        except BaseException:
            self._open.set()
            raise
        self._is_alone = True

    def leave(self, job: Job) -> None:
        """*job*, which had joined, has ended, and its end is committed."""
        if job.is_suspect:
            self._is_alone = False
            self._open.set()
            return
        self._company -= 1
        if not self._company:
            self._quiet.set()

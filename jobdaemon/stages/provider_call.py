"""
What the database knows of the provider call of one attempt: noted before it is bought, looked after until it is over.

    Submitting    -> CallSubmitted   a crash from here on leaves a row without an id: a lost submit, listed in unknown_submits
    TaskAccepted  -> CallAccepted    from here on every attempt asks for that task
    Charged                          what it costs; kept for the end
    TaskOver, end -> CallEnded       nothing more will come of it
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Literal

from jobdaemon.domain.job import Job
from jobdaemon.domain.write import CallAccepted, CallEnded, CallSubmitted, Write
from jobdaemon.errors import (
    AnswerLostError,
    JobdaemonError,
    KeyMissingError,
    LeaseLostError,
    OrderEndedError,
    PermanentError,
    ProviderRefusedError,
    RetryableError,
)
from jobdaemon.ports import (
    Attempt,
    Charged,
    GenerateRequest,
    OrderReader,
    Provider,
    ProviderCall,
    Submitting,
    TaskAccepted,
    TaskOver,
)

_Outcome = Literal["succeeded", "partial", "failed", "unknown", "cancelled"]


def with_key(call: ProviderCall, job: Job, held: Collection[str] | None) -> ProviderCall:
    """
    *call* as this attempt can ask for it: a key that nobody has any more gives way to the attempt's own.

    Args:
        held: aliases of the provider's keys that this daemon has; None where that is not known.

    Raises:
        KeyMissingError: another daemon may have its key.
    """
    if call.key is None or held is None or call.key in held:
        return call
    if call.is_key_known and call.task_id is None:
        return call  # its provider may know without a key that nobody can be asked; else it says so itself
    if call.is_key_known:
        raise KeyMissingError(f"a call was made with the key {call.key}, which this daemon does not have")
    return replace(call, key=job.key_alias)


class CallRecord:
    """The call of one attempt."""

    def __init__(
        self,
        attempt: Attempt,
        provider: Provider,
        order_id: int,
        key: str | None,
        held: Collection[str] | None = None,
        price: Decimal | None = None,
    ) -> None:
        """
        Args:
            key: alias of the key for what is bought.
            held: as for :func:`with_key`.
            price: of an image, where the settings say it.
        """
        self._attempt = attempt
        self._provider = provider
        self._order_id = order_id
        self._key = key
        self._held = held
        self._price = price
        #: What the open call was said to be charged for; None while nothing was said.
        self._charged: Charged | None = None
        #: The call that this attempt goes on with.
        self.resumed: ProviderCall | None = None
        #: Fetched once more for an image whose link expired: another job's call, which ended well.
        self._is_collected = False
        self._is_open = False
        self._has_task = False
        self._may_buy = True

    async def find(self, orders: OrderReader, request: GenerateRequest, call: ProviderCall | None) -> GenerateRequest:
        """
        *request* with the call to go on with, if an earlier attempt left one.

        Args:
            call: of this job, if its end is unknown.

        Raises:
            ProviderRefusedError: a submit was lost, and such a call is not to be bought again.
            KeyMissingError: it is for a daemon that has another key.
        """
        job = self._attempt.job
        if call is not None:
            self._is_open = True
            call = await self._look_for_task(with_key(call, job, self._held), request)
        elif isinstance(number := job.args.get("call"), int):
            call = await orders.collectable_call(number)
            if call is not None:
                call = with_key(call, job, self._held)
            self._is_collected = call is not None
        if call is None:
            return request
        self.resumed, self._has_task = call, True
        return replace(request, key=call.key, resume=call)

    async def _look_for_task(self, call: ProviderCall, request: GenerateRequest) -> ProviderCall | None:
        if call.task_id is not None:
            return call
        task_id = await self._provider.find_task(request, call)
        if task_id is not None:
            await self._attempt.checkpoint(CallAccepted(self._order_id, self._attempt.job.id, task_id))
            return replace(call, task_id=task_id)
        await self.close("unknown")
        if self._provider.on_unknown_submit == "fail":
            raise ProviderRefusedError(
                f"the answer of {self._provider.name} to an earlier try was lost; it is not asked again, since that try may have"
                " been paid for (on_unknown_submit is fail)"
            )
        return None

    async def note(self, event: Submitting | TaskAccepted | Charged | TaskOver, images: Collection[int]) -> None:
        """
        Commit what happened to the call.

        Args:
            images: indexes that are still wanted.

        Raises:
            LeaseLostError: the job or its order is not ours any more; a task whose id is noted nowhere is given up.
            RetryableError: something is to be bought after :meth:`settle`.
        """
        match event:
            case Submitting() if not self._may_buy:
                raise self._out_of_attempts()
            case Submitting():
                if self._is_open:
                    # One call after another, or a task that is not asked for any more: what came before gives nothing more.
                    await self.close("partial")
                await self._submitted(event.task_id, images)
            case TaskAccepted():
                try:
                    if self._is_open:
                        await self._attempt.checkpoint(CallAccepted(self._order_id, self._attempt.job.id, event.task_id))
                    else:
                        await self._submitted(event.task_id, images)
                except LeaseLostError as error:
                    # An id that was noted before the submit is known to whoever has the job now, and may be waited for; the task
                    # of an order that has ended may have been looked for in vain before it was there.
                    if not self._has_task or isinstance(error, OrderEndedError):
                        await self._give_up(event.task_id, images)
                    raise
                self._has_task = True
            case Charged():
                self._charged = event
            case TaskOver():
                await self.close("failed")

    async def _submitted(self, task_id: str | None, images: Collection[int]) -> None:
        self.resumed, self._is_collected, self._charged = None, False, None
        self._is_open, self._has_task = True, task_id is not None
        job_id = self._attempt.job.id
        await self._attempt.checkpoint(
            CallSubmitted(self._order_id, job_id, self._provider.name, tuple(sorted(images)), task_id, self._key, self._price)
        )

    async def _give_up(self, task_id: str, images: Collection[int]) -> None:
        """Nobody will ask for this task: its id could not be noted."""
        try:
            await self._provider.cancel(ProviderCall(0, task_id, tuple(sorted(images)), self._key, datetime.now(UTC)))
        except JobdaemonError:
            return  # as good as it gets: the lease is lost

    @property
    def is_owed(self) -> bool:
        """Whether the provider may still give something for what it took."""
        return self._is_open or self._is_collected

    async def settle(self) -> None:
        """
        All attempts are spent and somebody else is to be asked: stop the call, or leave it to be collected now; buy nothing more.

        Raises:
            RetryableError: nothing more will come of it, or it cannot be said now.
        """
        self._may_buy = False
        if self.resumed is not None:
            if self._is_collected or not await self._provider.cancel(self.resumed):
                return  # it is over, or cannot be stopped: what it made is used
            await self.close("cancelled")
        raise self._out_of_attempts()

    def _out_of_attempts(self) -> RetryableError:
        return RetryableError(f"{self._provider.name} made no more of these images in all attempts")

    def ends(self, outcome: _Outcome) -> tuple[Write, ...]:
        """What closes the call, for the attempt's own end."""
        if not self._is_open:
            return ()
        charged = self._charged
        made, usage = (None, None) if charged is None else (charged.images, charged.usage)
        return (CallEnded(self._order_id, self._attempt.job.id, outcome, made=made, usage=usage),)

    async def close(self, outcome: _Outcome) -> None:
        """Close the call now: a later attempt buys anew."""
        if self._is_collected and self.resumed is not None:
            await self._attempt.checkpoint(CallEnded(self._order_id, self._attempt.job.id, "expired", self.resumed.id))
        elif self._is_open:
            await self._attempt.checkpoint(*self.ends(outcome))
        self._is_open = self._is_collected = False

    async def failed(self, error: Exception, outcome: Literal["partial", "failed"]) -> None:
        """Close the call if *error* says that nothing more will come of it; else a later attempt goes on with it."""
        if isinstance(error, LeaseLostError | AnswerLostError):
            return
        if not self._has_task or isinstance(error, PermanentError):
            await self.close(outcome)

"""abandon: the provider's task of an order that was cancelled or has expired is stopped, where it can be."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping

from jobdaemon.domain.job import provider_of
from jobdaemon.domain.outcome import Done
from jobdaemon.domain.write import CallEnded
from jobdaemon.errors import InvalidOrderError, KeyRefusedError, RateLimitedError, RetryableError, UnsupportedFeatureError
from jobdaemon.ports import Attempt, OrderReader, Provider
from jobdaemon.stages.provider_call import with_key

#: A task whose id was chosen here may have been on its way when its order ended: it is looked for a second time.
_SECOND_LOOK_S = 2.0


class AbandonStage:
    """One job per call; whatever the provider says, the call is closed: nobody fetches its images."""

    def __init__(
        self, *, orders: OrderReader, providers: Mapping[str, Provider], keys: Mapping[str, Collection[str]] | None = None
    ) -> None:
        """
        Args:
            keys: provider -> aliases of the keys that this daemon has, of those providers that know any.
        """
        self._orders = orders
        self._providers = providers
        self._keys = keys or {}

    async def run(self, attempt: Attempt) -> Done:
        """Raises RetryableError when the provider cannot be asked now, KeyMissingError when not by this daemon."""
        job = attempt.job
        if job.order_id is None or not isinstance(call_id := job.args.get("call_id"), int):
            raise InvalidOrderError("there is no such call")
        call = await self._orders.unfinished_call(call_id)
        if call is None:
            return Done()
        provider = self._providers.get(provider_of(job.queue))
        if provider is None:
            raise UnsupportedFeatureError(f"this daemon knows no provider {provider_of(job.queue)}")
        call = with_key(call, job, self._keys.get(provider.name))
        try:
            is_stopped = await provider.cancel(call)
            if not is_stopped:
                await asyncio.sleep(_SECOND_LOOK_S)
                is_stopped = await provider.cancel(call)
        except (RateLimitedError, KeyRefusedError) as error:
            # These cost no attempt, and this is not worth asking for ever.
            raise RetryableError(str(error), retry_after=error.retry_after) from error
        # What went on is charged for, as far as anybody can tell.
        made = len(call.images) if provider.is_paid and not is_stopped else None
        return Done(writes=(CallEnded(job.order_id, job.id, "cancelled", call_id, made=made),))

"""What the settings say, in the engine's own terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from importlib.metadata import version

from jobdaemon.domain.fallback import FallbackRules
from jobdaemon.domain.job import BEAUTIFY_QUEUE, UPLOAD_QUEUE, generate_queue
from jobdaemon.domain.prewarm import backend_key
from jobdaemon.domain.retry import RetryPolicy
from jobdaemon.ports import Provider
from jobdaemon.queue.attempt import AttemptRules
from jobdaemon.queue.supervisor import QueueRules
from jobdaemon.settings import Settings
from jobdaemon.settings_rows import queue_names

#: The images of a call are announced in the moment in which that call's slot is filled again. Uploads that began at once would
#: take the processor from it, and a provider's slot is the scarcer thing. Short of the 50 ms within which a free slot is used.
_UPLOADS_WAIT = timedelta(milliseconds=30)


def program_version() -> str:
    """This program's version."""
    return version("jobdaemon")


def key_aliases(settings: Settings) -> dict[str, tuple[str, ...]]:
    """The keys of each provider that has any."""
    return {name: tuple(key.alias for key in keys) for name, keys in settings.provider_keys().items()}


def queue_rules(settings: Settings, providers: Mapping[str, Provider]) -> dict[str, QueueRules]:
    """How this daemon serves each queue that its settings give a team."""
    served = [BEAUTIFY_QUEUE, *(generate_queue(name) for name in providers), UPLOAD_QUEUE]
    paid = {generate_queue(name) for name, provider in providers.items() if provider.is_paid}
    aliases = {generate_queue(name): keys for name, keys in key_aliases(settings).items()}
    rules: dict[str, QueueRules] = {}
    for name in served:
        queue = settings.queue(name)
        policy = RetryPolicy(queue.attempts, queue.backoff, queue.backoff_cap, queue.jitter)
        if queue.team_size > 0:
            # An upload knows what it has stored only when it ends.
            attempt = AttemptRules(queue.run_timeout, policy, is_abortable=name != UPLOAD_QUEUE, is_paid=name in paid)
            calm = _UPLOADS_WAIT if name == UPLOAD_QUEUE else timedelta(0)
            rules[name] = QueueRules(queue.team_size, attempt, aliases.get(name), calm)
    return rules


def team_sizes(settings: Settings) -> dict[str, int]:
    """Queue name -> team size, for every queue these settings know."""
    return {name: settings.queue(name).team_size for name in queue_names(settings)}


def images_per_call(settings: Settings, providers: Mapping[str, Provider]) -> Callable[[str], int]:
    """How many images one call of a provider makes, by its name."""
    return lambda name: min(settings.orders.images_per_call, providers[name].max_images_per_call if name in providers else 1)


def fallback_rules(settings: Settings, providers: Mapping[str, Provider]) -> FallbackRules:
    """Who takes over what waits for a provider in trouble."""
    plans: dict[str, tuple[str, ...]] = {
        name: plan.fallback for name, plan in settings.plans.items() if plan.fallback is not None
    }
    return FallbackRules(
        chains=settings.orders.fallback,
        plans=plans,
        after=settings.orders.fallback_after,
        unpaid={name for name, provider in providers.items() if not provider.is_paid},
        images_per_call=images_per_call(settings, providers),
    )


def prewarming_key(settings: Settings, chosen: str, model: str) -> str:
    """
    Whose prewarmed photos are ours too. What is not left out counts: a new setting costs a few hits, and no wrong photo.

    Args:
        chosen: the backend's name: where it is found out at the start, the same settings give another one on another machine.
        model: what it retouches with: under the same name a file of weights may be another one there.
    """
    shaping = settings.beautify.model_dump(mode="json", exclude={"threads", "max_wait", "timeout"})
    found = {"backend": chosen, "model": model, "max_pixels": settings.photos.max_pixels}
    return backend_key(program_version(), shaping | found)

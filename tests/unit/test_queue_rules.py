"""What the settings and the providers make of each queue."""

from __future__ import annotations

from jobdaemon import app
from jobdaemon.settings import load_settings
from tests.fakes import FakeProvider


def test_only_queues_of_paid_providers_are_paid() -> None:
    """Whether a provider is paid decides whether its queue's calls are stopped when the lease is in doubt."""
    providers = {"local": FakeProvider(is_paid=False), "cloud": FakeProvider(is_paid=True)}
    rules = app.queue_rules(load_settings(), providers)
    paid = {name for name, queue in rules.items() if queue.attempt.is_paid}
    assert paid == {"generate.cloud"}
    assert {"beautify", "upload", "generate.local"} <= set(rules)


def test_transactions_end_with_the_lease() -> None:
    """A session that stands still within a transaction is ended by the server when its daemon's lease ends."""
    settings = load_settings(environ={"JOBDAEMON_ENGINE__LEASE": "33s"})
    assert app.address(settings, "postgresql://x/y").idle_in_transaction == settings.engine.lease

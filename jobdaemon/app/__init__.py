"""
The composition root: settings in, a wired daemon out.

Heavy libraries are imported where they are chosen, so that a command that only reads loads none of them.
"""

from jobdaemon.app.backends import ChosenBackend, choose_backend, open_backend, start_backend, what_is_wrong_with_weights
from jobdaemon.app.clients import open_service_client
from jobdaemon.app.daemon import Daemon, open_daemon
from jobdaemon.app.database import address, database_url, prepare_database, require_schema
from jobdaemon.app.providers import open_providers, photo_links
from jobdaemon.app.rules import queue_rules, team_sizes
from jobdaemon.app.storage import open_store, spools

__all__ = [
    "ChosenBackend",
    "Daemon",
    "address",
    "choose_backend",
    "database_url",
    "open_backend",
    "open_daemon",
    "open_providers",
    "open_service_client",
    "open_store",
    "photo_links",
    "prepare_database",
    "queue_rules",
    "require_schema",
    "spools",
    "start_backend",
    "team_sizes",
    "what_is_wrong_with_weights",
]

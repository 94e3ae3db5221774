"""The HTTP clients, each with the hosts that it may reach."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from jobdaemon.settings import Settings

if TYPE_CHECKING:
    from jobdaemon.http import GuardedClient


def open_http_client(settings: Settings) -> GuardedClient:
    """The client that fetches sources and results."""
    from jobdaemon.http import GuardedClient

    return GuardedClient(allowed_hosts=settings.photos.allowed_hosts)


def open_service_client(settings: Settings) -> GuardedClient:
    """
    The client that calls the services which the settings name.

    Not the one that fetches sources: a customer must not reach a ComfyUI of ours because we may.
    """
    from jobdaemon.http import GuardedClient

    generate = settings.generate
    urls = (generate.openai_images.base_url, generate.dashscope.base_url, generate.jimeng.base_url, *generate.comfyui.servers)
    return GuardedClient(allowed_hosts={urlsplit(url).netloc for url in (*urls, settings.superbed.url)}, max_connections=200)

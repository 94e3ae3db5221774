"""Pictures made on this machine: see :mod:`.provider`."""

from jobdaemon.providers.local.provider import LocalProvider

__all__ = ["LocalProvider"]

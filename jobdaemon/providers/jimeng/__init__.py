"""Volcengine Jimeng."""

from jobdaemon.providers.jimeng.provider import JimengProvider
from jobdaemon.providers.jimeng.signature import KeyPair

__all__ = ["JimengProvider", "KeyPair"]

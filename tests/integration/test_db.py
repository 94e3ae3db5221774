"""Connections that are made and given up."""

from __future__ import annotations

import asyncio
import gc
import itertools
import warnings
from contextlib import suppress

from jobdaemon.db import DatabaseAddress, connect


async def test_a_connection_given_up_at_any_moment_is_closed(database: str) -> None:
    """Whoever is cancelled while connecting leaves no open connection behind, in whichever step it was."""
    address = DatabaseAddress(database)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for patience in itertools.count():
            connecting = asyncio.create_task(connect(address))
            await asyncio.sleep(patience / 2000)
            connecting.cancel()
            with suppress(asyncio.CancelledError):
                await (await connecting).close()
                break
            del connecting
            await asyncio.sleep(0)
            gc.collect()
    assert patience > 2
    assert [str(warning.message) for warning in caught if warning.category is ResourceWarning] == []

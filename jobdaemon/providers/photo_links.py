"""How a provider gets the photo: implementations of :class:`jobdaemon.ports.PhotoLinks`."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable

from jobdaemon.domain.artifact import Artifact


class InlineLinks:
    """The photo itself as a ``data:`` URL: nothing is put anywhere, and nothing expires."""

    async def link(self, photo: Artifact, load_photo: Callable[[], Awaitable[bytes]]) -> str:
        content = await load_photo()
        return f"data:{photo.media_type};base64,{base64.b64encode(content).decode('ascii')}"

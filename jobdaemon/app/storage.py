"""Where images lie: the artifact store, and the files in which they are on their way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from jobdaemon.errors import SettingsError, StoreRefusedError, StoreUnavailableError
from jobdaemon.ports import ArtifactStore
from jobdaemon.settings import Settings

if TYPE_CHECKING:
    from jobdaemon.spool import Spool


def open_store(settings: Settings) -> ArtifactStore:
    """
    The artifact store.

    Raises:
        SettingsError: its section is incomplete.
    """
    if settings.store.kind == "files":
        from jobdaemon.storage.files import FilesStore

        return FilesStore(settings.store.files.root, settings.store.files.public_url)
    from jobdaemon.storage.r2 import R2Store

    r2 = settings.store.r2
    if r2.endpoint_url is None or r2.bucket is None or r2.access_key_id is None or r2.secret_access_key is None:
        raise SettingsError("store.r2 needs endpoint_url, bucket, access_key_id and secret_access_key")
    return R2Store(
        r2.endpoint_url,
        r2.bucket,
        r2.access_key_id.get_secret_value(),
        r2.secret_access_key.get_secret_value(),
        prefix=r2.prefix,
        public_url=r2.public_url,
    )


def spools(settings: Settings) -> Callable[[], Spool]:
    """Makes the files in which images lie while they are on their way."""
    from jobdaemon.spool import Spool

    # Not the system's folder for temporary files: that one is often in memory.
    return partial(Spool, settings.data_dir / "spool")


def room_guard(settings: Settings) -> Callable[[int], None]:
    """For one image more or several, as :func:`jobdaemon.spool.require_room` says."""
    from jobdaemon.spool import require_room

    # The same disk, often; a store elsewhere says by itself that it is full.
    folders = [settings.data_dir / "spool", *([settings.store.files.root] if settings.store.kind == "files" else [])]
    return partial(require_room, folders)


def require_spools(settings: Settings) -> None:
    """
    Raises:
        SettingsError: images cannot lie in data_dir on their way. That there is no room now is none.
    """
    try:
        spools(settings)()
    except StoreRefusedError as error:
        raise SettingsError(f"data_dir: {error}") from error
    except StoreUnavailableError:
        return

"""What ``check`` finds, in order; a part that cannot be looked at is an error of its own and hides no other part."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jobdaemon.cli.errors import explain
from jobdaemon.errors import SettingsError

if TYPE_CHECKING:
    from jobdaemon.settings import Settings

State = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """
    Attributes:
        check: what was looked at.
        message: what is so.
        action: what to do about it; '' when nothing is to be done.
    """

    check: str
    state: State
    message: str
    action: str = ""

    @property
    def told(self) -> str:
        """Message and action for people."""
        return f"{self.message}: {self.action}" if self.action else self.message

    def as_row(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


def all_findings(config: Path | None) -> list[Finding]:
    """Look at everything; never raises what an operator can do something about."""
    from jobdaemon.settings import load_settings

    try:
        settings = load_settings(config)
    except SettingsError as error:
        problems = str(error).splitlines()
        return [Finding("settings", "error", problem, "correct it; nothing else was checked") for problem in problems]
    findings = [Finding("settings", "warning", warning) for warning in settings.warnings()]
    findings = findings or [Finding("settings", "ok", "valid")]
    parts: list[tuple[str, Callable[[Settings], Iterator[Finding]], str]] = [
        ("database", _database, "start the server, or correct database.url"),
        ("spool", _spool, "correct data_dir, or make room there"),
        ("store", _store, "correct the section store"),
        ("backend", _backend, "correct the section beautify"),
        ("providers", _providers, "correct the sections orders and generate"),
    ]
    for name, look, action in parts:
        try:
            findings += look(settings)
        except Exception as error:  # noqa: BLE001 - a broken part must not hide the others
            findings.append(Finding(name, "error", explain(error)[1].removesuffix("."), action))
    return findings


def _database(settings: Settings) -> Iterator[Finding]:
    from jobdaemon.cli.database_findings import database_findings
    from jobdaemon.cli.session import open_database

    with open_database(settings, must_fit=False) as connection:
        # Taken while the connection lives.
        yield from list(database_findings(connection, settings))


def _spool(settings: Settings) -> Iterator[Finding]:
    from jobdaemon import app

    app.spools(settings)().write(bytes(4096))
    yield Finding("spool", "ok", f"{settings.data_dir} can hold images on their way")


def _store(settings: Settings) -> Iterator[Finding]:
    async def look() -> str:
        from jobdaemon import app

        store = app.open_store(settings)
        try:
            await store.check()
        finally:
            await store.close()
        return store.name

    place = str(settings.store.files.root) if settings.store.kind == "files" else str(settings.store.r2.bucket)
    yield Finding("store", "ok", f"{asyncio.run(look())} store {place} can be written and read")


def _backend(settings: Settings) -> Iterator[Finding]:
    from jobdaemon import app

    async def look() -> tuple[str, app.ChosenBackend]:
        chosen = await app.choose_backend(settings)
        backend = chosen.backend
        try:
            # One that works elsewhere can be asked whether it is there.
            if (check := getattr(backend, "check", None)) is not None:
                await check()
        finally:
            await backend.close()
        return str(backend) if backend.name == "gfpgan" else backend.name, chosen

    name, chosen = asyncio.run(look())
    if not chosen.why_not_gfpgan:
        yield Finding("backend", "ok", f"{name} works")
        return
    told = f"{name} works; gfpgan, which is better, was not picked, because {chosen.why_not_gfpgan.removesuffix('.')}"
    if not chosen.is_wish_unmet:
        yield Finding("backend", "ok", told)
        return
    yield Finding("backend", "warning", told, 'docs/gfpgan.md says what it needs; or set beautify.backend to "opencv"')
    # Whatever else is missing: what is set must not turn out to be damaged when that is there.
    if (damage := app.what_is_wrong_with_weights(settings)) is not None:
        yield Finding("backend", "warning", damage.removesuffix("."), "correct beautify.weights and beautify.weights_sha256")


def _providers(settings: Settings) -> Iterator[Finding]:
    async def look() -> list[str]:
        from jobdaemon import app

        services, artifacts = app.open_service_client(settings), app.open_store(settings)
        try:
            providers = app.open_providers(settings, services, artifacts)
            for provider in providers.values():
                await provider.close()
        finally:
            await services.close()
            await artifacts.close()
        return sorted(providers)

    yield Finding("providers", "ok", ", ".join(asyncio.run(look())))

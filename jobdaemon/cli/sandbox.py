"""``sandbox``: a provider on this machine that costs nothing, and counts what is done to it."""

from __future__ import annotations

import asyncio
import signal
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobdaemon.cli.output import print_json
from jobdaemon.cli.session import AsJson

if TYPE_CHECKING:
    from jobdaemon.sandbox import Sandbox


def sandbox(
    port: Annotated[int, typer.Option(min=0, max=65535, help="On 127.0.0.1; 0 takes a free one.")] = 9465,
    latency: Annotated[str, typer.Option(help="How long a call takes.")] = "8s",
    scale: Annotated[float, typer.Option(min=0.0, max=1000.0, help="Multiplies the latency.")] = 0.1,
    concurrency: Annotated[int | None, typer.Option(min=0, help="More calls at once get 429.", show_default=False)] = None,
    qps: Annotated[float | None, typer.Option(min=0.001, help="More calls in a second get 429.", show_default=False)] = None,
    faults: Annotated[str, typer.Option(metavar="SPEC", help="Shares of calls: 429=0.02,500=0.01,reset=0.01,slow=0.05.")] = "",
    seed: Annotated[int, typer.Option(help="The same seed, the same faults.")] = 0,
    image_px: Annotated[int | None, typer.Option(min=16, max=8192, help="Side of the images.", show_default=False)] = None,
    image_bytes: Annotated[
        str | None, typer.Option(help="Images about this large: 5MB, but no larger than noise is.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Play a provider on 127.0.0.1 until Ctrl-C or SIGTERM, with set latency, limits and faults; then say what it counted."""
    from jobdaemon.errors import SettingsError
    from jobdaemon.sandbox import Behaviour, Sandbox, parse_faults
    from jobdaemon.units import parse_duration, parse_size

    try:
        duration: timedelta = parse_duration(latency)
    except ValueError as error:
        raise SettingsError(f"--latency {error}") from error
    try:
        size_bytes = None if image_bytes is None else parse_size(image_bytes)
    except ValueError as error:
        raise SettingsError(f"--image-bytes {error}") from error
    behaviour = Behaviour(duration.total_seconds() * scale, concurrency, qps, parse_faults(faults, seed=seed))
    behaviour.image_bytes = size_bytes
    if image_px is not None:
        behaviour.image_px = (image_px, image_px)
    asyncio.run(_serve(Sandbox(behaviour, port=port), as_json=as_json))


async def _serve(server: Sandbox, *, as_json: bool) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with server:
        if as_json:
            print_json({"url": server.url})
        else:
            print(f"Sandbox at {server.url}; counts at {server.url}/_sandbox/report", flush=True)
        await stop.wait()
    report = server.report()
    if as_json:
        print_json(report)
    else:
        print(_told(report, "starts", "above_limit", "stored_twice"))
        for api, counts in report["apis"].items():
            print(f"{api}: {_told(counts, 'calls', 'rejected', 'images_bought', 'money')}")


def _told(counts: dict[str, Any], *names: str) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {counts[name]}" for name in names)

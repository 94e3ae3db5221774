"""The sandbox over HTTP: latency, limits, faults, counts, and callers that vanish."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from jobdaemon.errors import SettingsError
from jobdaemon.sandbox import Behaviour, Sandbox, parse_faults

CALL = {"queue": "generate.x", "order_id": 1, "images": [1, 2], "daemon": "d", "job_id": 7}

#: Calls and waits for ever.
CALLER = r"""
import socket, sys, time
host, port, body = sys.argv[1:]
connection = socket.create_connection((host, int(port)))
connection.sendall(f"POST /call HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
time.sleep(60)
"""


@pytest_asyncio.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    """A quick one."""
    async with Sandbox(Behaviour(latency_s=0.05)) as server:
        yield server


@pytest_asyncio.fixture
async def http(sandbox: Sandbox) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of it."""
    async with aiohttp.ClientSession(sandbox.url, connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


async def _post(http: aiohttp.ClientSession, path: str, body: Any) -> tuple[int, dict[str, Any], dict[str, str]]:
    async with http.post(path, json=body) as answer:
        return answer.status, await answer.json(), dict(answer.headers)


async def _report(http: aiohttp.ClientSession) -> dict[str, Any]:
    async with http.get("/_sandbox/report") as answer:
        report: dict[str, Any] = await answer.json()
        return report


async def _until_open(sandbox: Sandbox, count: int) -> None:
    async with asyncio.timeout(60):
        while sandbox.referee.open_calls("generate.x") != count:  # noqa: ASYNC110 - the server gives no signal
            await asyncio.sleep(0.005)


async def test_a_call_takes_its_latency_and_makes_its_images(http: aiohttp.ClientSession) -> None:
    """A call is held open for the latency and answered with one digest per image, another one each time."""
    began = asyncio.get_running_loop().time()
    status, body, _ = await _post(http, "/call", CALL)
    assert asyncio.get_running_loop().time() - began >= 0.05
    assert status == 200
    assert [image["index"] for image in body["images"]] == [1, 2]
    _, again, _ = await _post(http, "/call", CALL)
    assert not {image["digest"] for image in body["images"]} & {image["digest"] for image in again["images"]}
    report = await _report(http)
    assert (report["starts"], report["queues"]["generate.x"]["outcomes"]) == (2, {"made": 2})
    assert report["images"]["made_again"] == 2


async def test_overlaps_are_counted_and_judged_by_the_named_limit(http: aiohttp.ClientSession, sandbox: Sandbox) -> None:
    """Three calls at once under limit 2: a peak of three, one start above the limit."""
    sandbox.behaviour.latency_s = 0.3
    await _post(http, "/limit", {"queue": "generate.x", "limit": 2})
    await asyncio.gather(*(_post(http, "/call", CALL | {"token": 5}) for _ in range(3)))
    queue = (await _report(http))["queues"]["generate.x"]
    assert (queue["peak"], queue["at_limit"], queue["above_limit"], queue["limit"]) == (3, 1, 1, 2)
    await _post(http, "/limit", {"queue": "generate.x", "limit": 9})
    await _post(http, "/limit", {"queue": "generate.x", "token": 5})
    await asyncio.gather(*(_post(http, "/call", CALL | {"token": 6}) for _ in range(9)))
    assert (await _report(http))["above_limit"] == 1


async def test_above_its_concurrency_the_provider_answers_429(http: aiohttp.ClientSession, sandbox: Sandbox) -> None:
    """Calls beyond the set concurrency get 429 with Retry-After and are no starts; the bound can be moved while it runs."""
    sandbox.behaviour.latency_s = 0.3
    assert (await _post(http, "/_sandbox/behaviour", {"concurrency": 2}))[0] == 200
    answers = await asyncio.gather(*(_post(http, "/call", CALL) for _ in range(5)))
    assert sorted(status for status, _, _ in answers) == [200, 200, 429, 429, 429]
    assert {headers["Retry-After"] for status, _, headers in answers if status == 429} == {"1"}
    queue = (await _report(http))["queues"]["generate.x"]
    assert (queue["starts"], queue["rejected"], queue["peak"]) == (2, 3, 2)
    await _post(http, "/_sandbox/behaviour", {"concurrency": None, "latency_s": 0.0})
    assert {status for status, _, _ in await asyncio.gather(*(_post(http, "/call", CALL) for _ in range(5)))} == {200}


async def test_above_its_rate_the_provider_answers_429(http: aiohttp.ClientSession) -> None:
    """Calls begun within a second beyond the set rate get 429."""
    await _post(http, "/_sandbox/behaviour", {"qps": 3, "latency_s": 0.0})
    statuses = [(await _post(http, "/call", CALL))[0] for _ in range(5)]
    assert statuses == [200, 200, 200, 429, 429]


@pytest.mark.parametrize(("fault", "outcome"), [("429", None), ("500", "500"), ("reset", "reset"), ("slow", "made")])
async def test_faults_look_as_a_provider_s_do(
    http: aiohttp.ClientSession, sandbox: Sandbox, fault: str, outcome: str | None
) -> None:
    """429 before any work, 500 after it, a reset connection without an answer, an answer that takes much longer."""
    sandbox.behaviour.faults = parse_faults(f"{fault}=1")
    began = asyncio.get_running_loop().time()
    if fault == "reset":
        with pytest.raises(aiohttp.ClientError):
            await _post(http, "/call", CALL)
    else:
        status, _, headers = await _post(http, "/call", CALL)
        assert status == {"429": 429, "500": 500, "slow": 200}[fault]
        assert ("Retry-After" in headers) == (fault == "429")
    if fault == "slow":
        assert asyncio.get_running_loop().time() - began >= 0.5
    queue = (await _report(http))["queues"]["generate.x"]
    assert queue["outcomes"] == ({} if outcome is None else {outcome: 1})


async def test_a_caller_that_vanishes_ends_its_call(http: aiohttp.ClientSession, sandbox: Sandbox) -> None:
    """When the caller's connection closes, its call is over at once and holds no place."""
    sandbox.behaviour.latency_s = 60
    call = asyncio.ensure_future(_post(http, "/call", CALL))
    await _until_open(sandbox, 1)
    call.cancel()
    with suppress(asyncio.CancelledError):
        await call
    await _until_open(sandbox, 0)
    assert (await _report(http))["queues"]["generate.x"]["outcomes"] == {"gone": 1}


async def test_a_killed_caller_is_seen_before_the_event_loop_comes_to_it(http: aiohttp.ClientSession, sandbox: Sandbox) -> None:
    """The kernel knows of a closed connection first: a start judged at that moment does not count the killed caller's call."""
    sandbox.behaviour.latency_s = 60
    host, _, port = sandbox.url.removeprefix("http://").partition(":")
    arguments = [host, port, json.dumps(CALL)]
    caller = subprocess.Popen([sys.executable, "-c", CALLER, *arguments])  # noqa: ASYNC220 - over in a moment, and to be killed
    try:
        await _until_open(sandbox, 1)
        [call] = sandbox.referee._queues["generate.x"].open
        assert not call.is_gone()
    finally:
        caller.kill()
        caller.wait(timeout=10)
    assert call.is_gone()  # no turn of the event loop since
    assert sandbox.referee.open_calls("generate.x") == 1
    await _until_open(sandbox, 0)


async def test_an_image_kept_again_is_no_second_image(http: aiohttp.ClientSession) -> None:
    """The same bytes twice are stored once; other bytes for the same image are counted."""
    for digest, first in (("a", True), ("a", False), ("b", False)):
        assert (await _post(http, "/store", {"order_id": 1, "image": 1, "digest": digest}))[1] == {"first": first}
    assert (await _report(http))["stored_twice"] == 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/call", []),
        ("/call", CALL | {"images": []}),
        ("/call", CALL | {"images": ["1"]}),
        ("/call", CALL | {"queue": ""}),
        ("/call", CALL | {"job_id": True}),
        ("/call", {name: value for name, value in CALL.items() if name != "daemon"}),
        ("/store", {"order_id": 1, "image": 2**63, "digest": "a"}),
        ("/limit", {"queue": "q", "limit": -1}),
        ("/limit", {"queue": "q", "limit": 1.5}),
        ("/daemon", {"daemon": "d"}),
        ("/daemon", {"daemon": "d", "lapses_in_s": "soon"}),
        ("/_sandbox/behaviour", {"latency_s": -1}),
        ("/_sandbox/behaviour", {"qps": 0}),
    ],
)
async def test_wrong_bodies_are_refused_with_a_sentence(http: aiohttp.ClientSession, path: str, body: Any) -> None:
    """What an endpoint does not take is 400 with what is wrong, and counts as nothing."""
    status, answer, _ = await _post(http, path, body)
    assert status == 400
    assert answer["error"]
    assert (await _report(http))["starts"] == 0


async def test_a_taken_port_is_a_sentence(sandbox: Sandbox) -> None:
    """Two sandboxes on one port: the second says so."""
    port = int(sandbox.url.rpartition(":")[2])
    with pytest.raises(SettingsError, match=str(port)):
        async with Sandbox(port=port):
            pass


def test_the_command_says_where_it_listens_and_what_it_counted() -> None:
    """`jobdaemon sandbox --json` prints its address, and its counts when it is stopped."""
    command = [sys.executable, "-m", "jobdaemon", "sandbox", "--port", "0", "--latency", "1s", "--scale", "0.01", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        asyncio.run(_call_once(url))
        process.terminate()
        report = json.loads(process.stdout.readline())
        assert process.wait(timeout=20) == 0
    assert report["starts"] == 1


def test_stopped_the_command_tells_what_was_bought_from_each_api() -> None:
    """Who tried a provider against it sees the calls and the money, and not only the referee's counts of other calls."""
    command = [sys.executable, "-m", "jobdaemon", "sandbox", "--port", "0", "--latency", "1s", "--scale", "0.01"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[2].rstrip(";")
        asyncio.run(_buy_once(url))
        process.terminate()
        told = process.stdout.read().splitlines()
        assert process.wait(timeout=20) == 0
    assert told == ["starts 0, above limit 0, stored twice 0", "openai_images: calls 1, rejected 0, images bought 2, money 0.08"]


async def _buy_once(url: str) -> None:
    headers = {"Authorization": "Bearer sk-test"}
    wanted = {"model": "gpt-image-2", "prompt": "a portrait", "n": 2}
    async with aiohttp.ClientSession(url, headers=headers) as session:
        assert (await _post(session, "/v1/images/generations", wanted))[0] == 200


async def _call_once(url: str) -> None:
    async with aiohttp.ClientSession(url) as session:
        assert (await _post(session, "/call", CALL))[0] == 200


def test_wrong_options_are_one_sentence() -> None:
    """A latency or fault that cannot be read ends with exit code 2."""
    for option in (["--latency", "soon"], ["--faults", "404=1"]):
        done = subprocess.run(
            [sys.executable, "-m", "jobdaemon", "sandbox", *option], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1

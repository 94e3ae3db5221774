"""Volcengine's signature: vectors that the official SDK agrees with."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta, timezone

import pytest

from jobdaemon.providers.jimeng.signature import KeyPair, canonical_query, canonical_request, signed_headers, signing_key

ID, SECRET = "AKLTEXAMPLE1234567890", "SKEXAMPLEexampleEXAMPLE=="
NOW = datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC)
HOST = "visual.volcengineapi.com"
SUBMIT = {"Action": "CVSync2AsyncSubmitTask", "Version": "2022-08-31"}
RESULT = {"Action": "CVSync2AsyncGetResult", "Version": "2022-08-31"}
SUBMIT_BODY = '{"req_key":"jimeng_t2i_v40","prompt":"一只猫 a cat","force_single":true}'.encode()
RESULT_BODY = b'{"req_key":"jimeng_t2i_v40","task_id":"7392616336519610409","req_json":"{\\"return_url\\":true}"}'


def signed(
    query: dict[str, str], body: bytes, *, token: str | None = None, host: str = HOST, now: datetime = NOW
) -> dict[str, str]:
    return signed_headers(KeyPair(ID, SECRET, token), method="POST", host=host, path="/", query=query, body=body, now=now)


def signature(headers: dict[str, str]) -> str:
    return headers["Authorization"].rpartition("Signature=")[2]


@pytest.mark.parametrize(
    ("query", "body", "token", "body_hash", "expected"),
    [
        (
            SUBMIT,
            SUBMIT_BODY,
            None,
            "60dc71ffc3067fce4bc6a094e0775787aa6fab1b92649671de72b0327ab86edc",
            "674d6f7f06492ae2073be09c6503b87ebeb69dfc2aa54c8370d1986766ae7fc5",
        ),
        (
            SUBMIT,
            SUBMIT_BODY,
            "STSTOKENEXAMPLE",
            "60dc71ffc3067fce4bc6a094e0775787aa6fab1b92649671de72b0327ab86edc",
            "aceedf90644a6022f70fa00641f1be034f3761151752a4f3e34f7c0e4f82d588",
        ),
        (
            RESULT,
            RESULT_BODY,
            None,
            "72bc0f27b583a6cd9fb1a5acdb4dcd116821b16384838a8e4fc7a8eebac52b1e",
            "eaddc40a8c478efcd61a7359e459e1982ad5966d3d8291719e738b71ccfaac8b",
        ),
    ],
    ids=["submit", "submit with a session token", "result"],
)
def test_the_vectors(query: dict[str, str], body: bytes, token: str | None, body_hash: str, expected: str) -> None:
    """Body hash and signature are those of the official signer."""
    headers = signed(query, body, token=token)
    assert headers["X-Content-Sha256"] == body_hash
    assert headers["X-Date"] == "20250102T030405Z"
    assert headers.get("X-Security-Token") == token
    assert signature(headers) == expected


def test_the_steps_of_the_vector() -> None:
    """The request as it is hashed and the key of the day, each on its own: a broken step is named."""
    headers = {name: value for name, value in signed(SUBMIT, SUBMIT_BODY).items() if name != "Authorization"}
    canonical, names = canonical_request("POST", "/", SUBMIT, headers)
    assert names == "content-type;host;x-content-sha256;x-date"
    assert hashlib.sha256(canonical.encode()).hexdigest() == "c5187957e9a8d62c553356c39452128685b50582120603cebb5deacd8d62a849"
    assert signing_key(SECRET, "20250102").hex() == "e82e3c3bb2d2d9d48799cfb3afa5172e64be3d14307990548cae960043fa61e7"


def test_the_authorization_names_key_and_scope() -> None:
    """The service finds key, day, region and service in the header."""
    assert signed(SUBMIT, SUBMIT_BODY)["Authorization"].startswith(
        f"HMAC-SHA256 Credential={ID}/20250102/cn-north-1/cv/request, SignedHeaders=content-type;host;x-content-sha256;x-date, "
    )


@pytest.mark.parametrize("port", [80, 443])
def test_a_usual_port_is_not_signed(port: int) -> None:
    """The signer drops the ports that need not be written, and no others."""
    assert signature(signed(SUBMIT, b"", host=f"{HOST}:{port}")) == signature(signed(SUBMIT, b""))
    assert signature(signed(SUBMIT, b"", host=f"{HOST}:8{port}")) != signature(signed(SUBMIT, b""))


def test_the_moment_is_utc() -> None:
    """Another time zone names the same moment."""
    shanghai = NOW.astimezone(timezone(timedelta(hours=8)))
    assert signed(SUBMIT, b"", now=shanghai) == signed(SUBMIT, b"")


def test_a_query_is_sorted_and_quoted() -> None:
    """Names in order, spaces as %20, only -_.~ left alone."""
    assert canonical_query({"b": "1 2+/=", "a": "ä-_.~"}) == "a=%C3%A4-_.~&b=1%202%2B%2F%3D"


def test_a_key_pair_shows_no_secret() -> None:
    """What is printed by mistake names the id only."""
    assert "SKEXAMPLE" not in repr(KeyPair(ID, SECRET, "STSTOKENEXAMPLE"))
    assert "STS" not in repr(KeyPair(ID, SECRET, "STSTOKENEXAMPLE"))

"""What the settings of the backend photo_enhance refuse and warn of, before anything starts."""

from __future__ import annotations

import pytest

from jobdaemon.app import open_backend
from jobdaemon.errors import SettingsError
from jobdaemon.settings import Settings, load_settings

CHOSEN = {"JOBDAEMON_BEAUTIFY__BACKEND": "photo_enhance"}
URL = "JOBDAEMON_BEAUTIFY__PHOTO_ENHANCE__URL"
TIMEOUT = "JOBDAEMON_BEAUTIFY__PHOTO_ENHANCE__TIMEOUT"


def settings(**environ: str) -> Settings:
    return load_settings(None, CHOSEN | environ)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({}, r"beautify\.photo_enhance\.url: must be set"),
        ({URL: "10.0.0.7:8000"}, r"beautify\.photo_enhance\.url: must be a web address"),
        ({URL: "ftp://10.0.0.7"}, r"beautify\.photo_enhance\.url: must be a web address"),
        ({URL: "http://user:secret@10.0.0.7"}, r"beautify\.photo_enhance\.url: must be a web address"),
        ({URL: "http://10.0.0.7/api/v1/enhance"}, r"beautify\.photo_enhance\.url: must be the address of the service alone"),
        ({URL: "http://10.0.0.7/api/v1/api/v1"}, r"beautify\.photo_enhance\.url: must be the address of the service alone"),
        ({URL: "http://10.0.0.7", TIMEOUT: "5min"}, r"shorter than queues\.beautify\.run_timeout, that is 5min"),
    ],
)
def test_a_service_that_cannot_be_used_stops_the_start(environ: dict[str, str], words: str) -> None:
    """Without an address, with one that is none, or with a deadline that never comes, the settings are refused in a sentence."""
    with pytest.raises(SettingsError, match=words) as told:
        settings(**environ)
    assert "secret" not in str(told.value)


@pytest.mark.parametrize("url", ["http://10.0.0.7/photos/api/v1", "http://10.0.0.7/photos/api/v1/", "http://10.0.0.7/photos"])
def test_the_version_may_be_given_and_is_not_doubled(url: str) -> None:
    """An address copied from the service's documentation means the same as one without the version."""
    assert settings(**{URL: url}).beautify.photo_enhance.url == "http://10.0.0.7/photos"


def test_the_service_may_be_missing_where_it_is_not_used() -> None:
    """The section alone asks for nothing."""
    assert load_settings(None, {TIMEOUT: "1h"}).beautify.photo_enhance.url is None


@pytest.mark.parametrize(
    ("url", "warned"), [("http://10.0.0.7", True), ("https://enhance.example", False), ("http://localhost", False)]
)
def test_photos_that_travel_unencrypted_draw_a_warning(url: str, warned: bool) -> None:
    """Plain http to another machine is allowed, and told."""
    assert any("unencrypted" in warning for warning in settings(**{URL: url}).warnings()) == warned


async def test_the_backend_is_opened_without_asking_the_service() -> None:
    """A service that is down does not keep a daemon from starting."""
    backend = open_backend(settings(**{URL: "http://127.0.0.1:9/enhance/"}))
    assert backend.name == "photo_enhance"
    await backend.close()

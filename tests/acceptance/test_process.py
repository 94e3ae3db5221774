"""`jobdaemon process`, as a person uses it."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from PIL import Image
from typer.testing import CliRunner

from jobdaemon.cli.program import app
from jobdaemon.embedded import EmbeddedPostgres
from jobdaemon.storage.files import TEMPORARY_PREFIX
from tests.acceptance.conftest import PORTRAIT, Command

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def portrait(tmp_path: Path) -> Path:
    """A portrait under a name of its own."""
    path = tmp_path / "ada.png"
    shutil.copyfile(PORTRAIT, path)
    return path


def images_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[0-9]*.jpg"))


def one_sentence_each(stderr: str, *names: str) -> None:
    """Each name is on exactly one line, which says something about it."""
    for name in names:
        lines = [line for line in stderr.splitlines() if name in line and ": " in line and "images" not in line]
        assert len(lines) == 1, f"{name}: {stderr}"
        assert 20 < len(lines[0]) < 300


def test_a_free_order_gives_two_different_images_a_contact_sheet_and_order_json(
    jobdaemon: Command, portrait: Path, tmp_path: Path, cold_data_dir: Path
) -> None:
    """One command on a fresh machine: two finished, different images, and JSON that says what they are."""
    result = jobdaemon("process", portrait, "--out", tmp_path / "out", "--json")
    assert result.returncode == 0, result.stderr
    order = json.loads(result.stdout)
    folder = tmp_path / "out" / "ada"
    images = images_of(folder)
    assert [path.name for path in images] == ["01.jpg", "02.jpg"]
    assert len({path.read_bytes() for path in images}) == 2
    assert (folder / "contact-sheet.jpg").stat().st_size > 10_000
    assert json.loads((folder / "order.json").read_text())["order_id"] == order["order_id"]
    assert order["status"] == "completed"
    assert order["images_stored"] == 2
    for image, path in zip(order["images"], images, strict=True):
        assert image["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        with Image.open(path) as picture:
            assert picture.size == (image["width"], image["height"])
    assert not list(folder.glob(".*"))


def test_the_same_call_again_is_the_same_order(jobdaemon: Command, portrait: Path, tmp_path: Path) -> None:
    """A second call makes nothing again, and puts back what was deleted from the folder."""
    first = json.loads(jobdaemon("process", portrait, "--out", tmp_path / "out", "--json").stdout)
    (tmp_path / "out" / "ada" / "02.jpg").unlink()
    second = json.loads(jobdaemon("process", portrait, "--out", tmp_path / "out", "--json").stdout)
    assert second["order_id"] == first["order_id"]
    assert len(images_of(tmp_path / "out" / "ada")) == 2
    third = json.loads(jobdaemon("process", portrait, "--out", tmp_path / "out", "--prompt", "film", "--json").stdout)
    assert third["order_id"] != first["order_id"]


def test_bad_photos_never_stop_the_good_one(jobdaemon: Command, portrait: Path, tmp_path: Path) -> None:
    """Each bad photo gets one sentence, the good one its images, and the exit code tells."""
    good = portrait.read_bytes()
    (tmp_path / "text.jpg").write_text("this is no picture at all")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "bomb.png").write_bytes(png_of(50_000, 50_000))
    names = ["missing.jpg", "text.jpg", "empty.jpg", "cut.png", "bomb.png"]
    result = jobdaemon("process", *(tmp_path / name for name in names), portrait, "--out", tmp_path / "out")
    assert result.returncode == 4, result.stderr
    one_sentence_each(result.stderr, *names)
    assert len(images_of(tmp_path / "out" / "ada")) == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ada"]


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it is that large; its pixels are 50 kB of zeros."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(50_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["ada.png", "--plan", "Gold"], 4, 'nknown plan "Gold"'),
        (["ada.png", "--prompt", ""], 4, "rompt 1 is empty"),
        (["ada.png", "--prompt", "x" * 100_000], 4, "at most 4000"),
        (["ada.png", *["--prompt", "x"] * 10_000], 4, "10000 prompts"),
        (["ada.png", "--images", "71"], 4, "not 71"),
        (["empty-folder"], 2, "has no photos"),
        (["ada.png", "--out", "a-file/out"], 2, "cannot be written"),
        (["ada.png", "--nonsense"], 2, "--nonsense"),
        ([], 2, "PHOTO"),
    ],
    ids=["plan", "empty-prompt", "long-prompt", "many-prompts", "images", "empty-folder", "out", "option", "nothing"],
)
def test_a_wrong_wish_is_refused_in_one_sentence(
    data_dir: Path,
    portrait: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    """What concerns every photo ends the call at once, with its exit code and one sentence."""
    (tmp_path / "empty-folder").mkdir()
    (tmp_path / "a-file").write_text("")
    monkeypatch.setenv("JOBDAEMON_DATA_DIR", str(data_dir))
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["process", *arguments])
    assert result.exit_code == code, result.stderr
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""
    assert not (tmp_path / "jobdaemon-out" / "ada").exists()


def test_equal_stems_are_kept_apart(jobdaemon: Command, tmp_path: Path) -> None:
    """Two photos of one name get two folders, the same ones in each call."""
    for name, angle in (("a", 0), ("b", 180)):
        (tmp_path / name).mkdir()
        with Image.open(PORTRAIT) as picture:
            picture.rotate(angle).save(tmp_path / name / "ada.png")
    call = ("process", tmp_path / "a", tmp_path / "b", "--images", "1", "--out", tmp_path / "out", "--json")
    folders = []
    for _ in range(2):
        result = jobdaemon(*call)
        assert result.returncode == 0, result.stderr
        folders.append({json.loads(line)["photo"]: json.loads(line)["folder"] for line in result.stdout.splitlines()})
    assert folders[0] == folders[1]
    assert len(set(folders[0].values())) == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 5), (signal.SIGKILL, -9)], ids=["Ctrl-C", "kill -9"])
def test_an_interrupted_call_is_finished_by_the_next(
    jobdaemon: Command, start: Start, portrait: Path, tmp_path: Path, data_dir: Path, number: signal.Signals, code: int
) -> None:
    """Whatever ended the first call, the same call completes the order, every image once."""
    call = ("process", portrait, "--plan", "Start", "--images", "12", "--out", tmp_path / "out")
    process = start(*call)
    assert process.stderr is not None
    for line in process.stderr:
        if "generating, 3/12" in line:
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    result = jobdaemon(*call, "--json")
    assert result.returncode == 0, result.stderr
    order = json.loads(result.stdout)
    assert order["images_stored"] == 12
    assert len({path.read_bytes() for path in images_of(tmp_path / "out" / "ada")}) == 12
    stored = [path.name for path in (data_dir / "artifacts" / "orders" / str(order["order_id"])).iterdir()]
    if number is signal.SIGKILL:
        # What was being written is no image; the store clears it away a day later.
        stored = [name for name in stored if not name.startswith(TEMPORARY_PREFIX)]
    assert len(stored) == 12, stored
    if number is signal.SIGINT:
        # A killed process may have stored an image and not have cleared away what it was made from; an interrupted one has.
        assert not list((data_dir / "artifacts" / "work" / str(order["order_id"])).glob("0*"))
    with EmbeddedPostgres(data_dir) as server, psycopg.connect(server.acquire()) as connection:
        spent = connection.execute(
            "SELECT count(*) FROM jobdaemon.procrastinate_jobs WHERE attempts <> 1 AND (args ->> 'order_id')::bigint = %s",
            [order["order_id"]],
        ).fetchone()
    assert spent == (0,)

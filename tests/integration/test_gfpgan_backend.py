"""The backend gfpgan with a small network in a real child on the CPU: photos in, photos out."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from jobdaemon.backends.faces import Pixels
from jobdaemon.backends.gfpgan import child
from jobdaemon.backends.gfpgan.backend import GfpganBackend, GfpganRules, what_is_missing
from jobdaemon.errors import UnsupportedImageError
from jobdaemon.photo import PhotoLimits, read_photo
from jobdaemon.ports import BeautifyBackend
from tests.daemons import until
from tests.gfpgan_weights import Weights, narrow_weights

__all__ = ["narrow_weights"]

PORTRAIT = (Path(__file__).parents[1] / "data" / "astronaut.png").read_bytes()
STAND_IN = Path(__file__).with_name("gfpgan_stand_in.py")
pytestmark = pytest.mark.newest_postgres


@asynccontextmanager
async def backend(weights: Weights, *, batch: int | None = None) -> AsyncIterator[GfpganBackend]:
    made = GfpganBackend(GfpganRules(weights.path, weights.sha256, device="cpu", batch=batch), threads=2)
    try:
        await made.start()
        yield made
    finally:
        await made.close()


def pixels_of(content: bytes) -> Pixels:
    return read_photo(content, limits=PhotoLimits()).pixels


def png(pixels: Pixels) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def two_people() -> bytes:
    portrait = pixels_of(PORTRAIT)
    return png(np.concatenate([portrait, portrait[:, ::-1]], axis=1))


async def test_faces_are_restored_and_the_rest_stays(narrow_weights: Weights) -> None:
    """The face changes, what is far from it does not; the result says how many, by which model and where."""
    async with backend(narrow_weights) as made:
        port: BeautifyBackend = made
        result = await port.beautify(PORTRAIT, strength=0.7)
    before, after = pixels_of(PORTRAIT).astype(int), pixels_of(result.content).astype(int)
    change = np.abs(after - before).mean(axis=2)
    assert (result.faces, result.unrestored, result.device) == (1, 0, "cpu")
    assert result.model == f"narrow-{narrow_weights.sha256[:8]}"
    assert (result.width, result.height, result.media_type) == (512, 512, "image/jpeg")
    assert change[60:160, 180:260].mean() > 10  # her face
    assert change[350:].mean() < 3  # a JPEG, but the same picture


async def test_the_same_photo_gives_the_same_bytes(narrow_weights: Weights) -> None:
    """Alone, in company, and when the child was killed in between: a retry gives what the first attempt gave."""
    async with backend(narrow_weights, batch=4) as made:
        alone = await made.beautify(PORTRAIT, strength=0.7)
        company = await asyncio.gather(*(made.beautify(photo, strength=0.7) for photo in [two_people(), PORTRAIT, PORTRAIT]))
        assert [result.faces for result in company] == [2, 1, 1]
        work = asyncio.ensure_future(made.beautify(PORTRAIT, strength=0.7))
        await until(lambda: made._restorer._waiting.running > 0)
        assert made._restorer._life is not None
        os.kill(made._restorer._life.pid, signal.SIGKILL)
        again = await work
    assert {result.content for result in [alone, *company[1:], again]} == {alone.content}


async def test_strength_zero_and_no_face_leave_the_pixels(narrow_weights: Weights) -> None:
    """Nothing is restored then, and the result says so."""
    landscape = png(np.full((200, 300, 3), (90, 140, 200), np.uint8))
    async with backend(narrow_weights) as made:
        untouched = await made.beautify(PORTRAIT, strength=0)
        empty = await made.beautify(landscape, strength=1)
        with pytest.raises(UnsupportedImageError):
            await made.beautify(b"no picture", strength=1)
        with pytest.raises(ValueError, match="strength"):
            await made.beautify(PORTRAIT, strength=2)
    assert (untouched.faces, untouched.unrestored) == (0, 1)
    assert np.abs(pixels_of(untouched.content).astype(int) - pixels_of(PORTRAIT)).mean() < 2
    assert (empty.faces, empty.unrestored) == (0, 0)
    assert np.abs(pixels_of(empty.content).astype(int) - pixels_of(landscape)).max() <= 2


def test_the_daemon_never_imports_torch() -> None:
    """What runs in the daemon, this backend included, works on a machine without torch."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'torchvision', 'spandrel', 'safetensors']));"
        "import jobdaemon.app, jobdaemon.cli.run, jobdaemon.cli.service, jobdaemon.stages.beautify;"
        "from jobdaemon.backends.gfpgan import backend; from pathlib import Path;"
        "backend.GfpganBackend(backend.GfpganRules(Path('x')))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_what_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without weights or torch there is a reason, found without starting anything."""
    assert what_is_missing(None) == "beautify.weights is not set"
    assert what_is_missing(tmp_path / "x.pth") == f"there is no {tmp_path / 'x.pth'}"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert what_is_missing(Path(__file__)) == "torch is not installed"


def test_a_child_without_torch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence instead of a traceback."""
    monkeypatch.setitem(sys.modules, "torch", None)
    arguments = ["--channel", "0", "--memory", "0", "--parent", "0", "--batch", "1", "--weights", "x.pth", "--device", "cuda"]
    with pytest.raises(child.LacksDeviceError, match=r"torch, which is not installed here .*; docs/gfpgan\.md says how"):
        child.load_network(child._parsed(arguments))


def test_a_device_that_cannot_be_used_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card is still counted after its driver broke, or was replaced by one that torch does not know: so auto is not gfpgan."""
    cuda = SimpleNamespace(device_count=lambda: 1, is_available=lambda: False)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__="2.13.0", cuda=cuda))
    arguments = ["--channel", "0", "--memory", "0", "--parent", "0", "--batch", "1", "--weights", "x.pth", "--device", "cuda"]
    with pytest.raises(child.LacksDeviceError, match=r'beautify.device: is "cuda", but torch .* finds 0 CUDA devices here'):
        child.load_network(child._parsed(arguments))


async def test_the_result_names_what_restored_it(tmp_path: Path) -> None:
    """A child that comes back may have found another released file under the same name; what it makes is labelled so."""
    names = tmp_path / "model"
    names.write_text("GFPGANv1.3")
    made = GfpganBackend(GfpganRules(tmp_path / "journal", device=str(names)))
    made._restorer._command = [sys.executable, str(STAND_IN), "--weights", str(tmp_path / "journal"), "--device", str(names)]
    await made.start()
    try:
        assert (await made.beautify(PORTRAIT, strength=0.7)).model == "GFPGANv1.3"
        names.write_text("GFPGANv1.4")
        assert made._restorer._life is not None
        os.kill(made._restorer._life.pid, signal.SIGKILL)
        await until(lambda: made._restorer._life is None)
        assert (await made.beautify(PORTRAIT, strength=0.7)).model == "GFPGANv1.4"
    finally:
        await made.close()


MEMORY = """
import asyncio, sys
from pathlib import Path
from jobdaemon.backends.gfpgan.backend import GfpganBackend, GfpganRules

def kib(pid, name):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

async def main():
    photo = Path(sys.argv[1]).read_bytes()
    backend = GfpganBackend(GfpganRules(Path(sys.argv[2]), sys.argv[3], device="cpu"))
    await backend.start()
    while backend._restorer._life is None:
        await asyncio.sleep(0.01)
    child = backend._restorer._life.pid
    model = kib(child, "VmRSS")
    result = await backend.beautify(photo, strength=0.7)
    assert (result.faces, result.width) == (1, 8000), result
    print(kib("self", "VmHWM"), kib(child, "VmHWM") - model)
    await backend.close()

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_photo_of_48_megapixels_fits(narrow_weights: Weights, tmp_path: Path) -> None:
    """Daemon and child together stay below 1.5 GB beside what the child holds without a photo."""
    photo = tmp_path / "large.jpg"
    with Image.open(io.BytesIO(PORTRAIT)) as image:
        image.convert("RGB").resize((8000, 6000), Image.Resampling.BICUBIC).save(photo, quality=92)
    command = [sys.executable, "-c", MEMORY, str(photo), str(narrow_weights.path), narrow_weights.sha256]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    daemon_kib, child_kib = map(int, ended.stdout.split())
    print(f"daemon {daemon_kib / 1024:.0f} MiB, child {child_kib / 1024:.0f} MiB beside its model")  # noqa: T201 - to report
    assert (daemon_kib + child_kib) * 1024 < 1.5e9

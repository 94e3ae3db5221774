"""The weights file: only the one it should be is read, whole, without running what it holds; else a sentence says why."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if not all(importlib.util.find_spec(package) for package in ("torch", "spandrel")):  # not imported: that needs care
    pytest.skip("torch or spandrel is not installed (scripts/test installs them)", allow_module_level=True)

import torch
from safetensors.torch import save_file

from jobdaemon.backends.gfpgan import weights
from jobdaemon.backends.gfpgan.architecture import build
from jobdaemon.backends.gfpgan.network import FaceNetwork
from jobdaemon.backends.gfpgan.weights import KNOWN_SHA256, identify, load_weights
from jobdaemon.errors import SettingsError
from tests.face_network import random_network, save_weights

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return dict(random_network(narrow=True).state_dict())


@pytest.fixture
def narrow_path(tmp_path: Path, tensors: Tensors) -> Path:
    path = tmp_path / "narrow.pth"
    torch.save({"params_ema": tensors}, path)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def refusal(path: Path, *, sha256: str | None = None) -> str:
    """What is said when the file is loaded with its own digest, or with *sha256*."""
    with pytest.raises(SettingsError) as caught:
        FaceNetwork.load(path, sha256=sha256 or digest(path), device="cpu")
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_released_file_is_known_by_its_digest(narrow_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose digest is that of a release needs no setting and has the release's name."""
    monkeypatch.setitem(KNOWN_SHA256, digest(narrow_path), "GFPGANv1.9")
    assert identify(narrow_path).name == "GFPGANv1.9"
    assert FaceNetwork.load(narrow_path, device="cpu").name == "GFPGANv1.9"


def test_unknown_file_is_refused_with_its_digest(narrow_path: Path) -> None:
    """A file that nobody released is refused unless its digest is configured, and the message says the digest."""
    with pytest.raises(SettingsError, match=f"none of the released.*set weights_sha256 to {digest(narrow_path)}"):
        identify(narrow_path)
    found = identify(narrow_path, sha256=f" {digest(narrow_path).upper()}\n")
    assert (found.name, found.sha256) == ("narrow", digest(narrow_path))


def test_configured_digest_is_the_only_one_taken(narrow_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a configured digest even a released file is refused when it is another one."""
    monkeypatch.setitem(KNOWN_SHA256, digest(narrow_path), "GFPGANv1.9")
    assert "is not the file that weights_sha256 names" in refusal(narrow_path, sha256="0" * 64)


@pytest.mark.parametrize("group", ["params_ema", "params"])
def test_both_groups_are_read(tmp_path: Path, tensors: Tensors, group: str) -> None:
    """Weights lie under params_ema or params; where there are both, params_ema counts."""
    path = tmp_path / "weights.pth"
    other = {"params": {"x": torch.zeros(300_000)}} if group == "params_ema" else {}
    torch.save({group: tensors, **other}, path)
    _, read = load_weights(path, sha256=digest(path))
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("prefix", ["", "params_ema."])
def test_safetensors_are_read(tmp_path: Path, tensors: Tensors, prefix: str) -> None:
    """A .safetensors file has the names as they are, or with the group before them."""
    path = tmp_path / "weights.safetensors"
    save_file({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, path)
    _, read = load_weights(path, sha256=digest(path))
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_half_precision_becomes_single(tmp_path: Path, tensors: Tensors) -> None:
    """Weights kept in half precision are read as float32."""
    path = tmp_path / "half.pth"
    torch.save({"params": {name: tensor.half() for name, tensor in tensors.items()}}, path)
    _, read = load_weights(path, sha256=digest(path))
    assert {tensor.dtype for tensor in read.values()} == {torch.float32}


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.made,))


@pytest.mark.parametrize("zipped", [True, False])
def test_program_in_a_checkpoint_does_not_run(tmp_path: Path, zipped: bool) -> None:
    """A pickle that calls something is refused, in both formats of torch, and nothing of it runs."""
    path, made = tmp_path / "evil.pth", tmp_path / "made"
    content = {"params_ema": {"x": torch.zeros(400_000)}, "more": Evil(made)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert "holds more than weights, perhaps a program" in refusal(path)
    plain = tmp_path / "plain.pth"
    plain.write_bytes(pickle.dumps([b"\0" * 2_000_000, Evil(made)], protocol=2))
    refusal(plain)
    assert not made.exists()


def damage(change: Callable[[bytes], bytes], path: Path) -> str:
    path.write_bytes(change(path.read_bytes()))
    return refusal(path)


def test_damaged_files_are_refused(narrow_path: Path, tmp_path: Path, tensors: Tensors) -> None:
    """A truncated file is refused whatever its digest, in both formats; so are bytes that are no file of torch's."""
    assert "is damaged" in damage(lambda content: content[: len(content) // 2], narrow_path)
    flat = tmp_path / "weights.safetensors"
    save_file(tensors, flat)
    assert "is damaged" in damage(lambda content: content[: len(content) // 2], flat)
    noise = tmp_path / "noise.pth"
    noise.write_bytes(b"\0\1\2\3" * 500_000)
    refusal(noise)


def test_truncated_download_is_told_by_its_digest(narrow_path: Path) -> None:
    """A released file that was not downloaded to its end is refused before it is opened."""
    with pytest.raises(SettingsError, match=r"downloaded to its end"):
        identify(narrow_path)


def test_notes_and_stubs_instead_of_weights_are_told(tmp_path: Path) -> None:
    """Git LFS's pointer, an error page and an empty file are named for what they are."""
    path = tmp_path / "GFPGANv1.4.pth"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:e2cd47\nsize 348632874\n")
    assert "Git LFS's note" in refusal(path)
    path.write_text("<html>404</html>")
    assert "has 16 bytes" in refusal(path)
    path.write_bytes(b"")
    assert "has 0 bytes" in refusal(path)


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    """One that nobody writes to is refused at once."""
    path = tmp_path / "fifo.pth"
    os.mkfifo(path)
    with pytest.raises(SettingsError) as caught:
        identify(path)
    assert str(caught.value) == f"The weights file {path} is not a file."


def test_missing_file_and_wrong_kind_are_told(tmp_path: Path) -> None:
    """No file, a folder, and another kind of file are refused in a sentence."""
    assert "There is no weights file" in refusal(tmp_path / "none.pth", sha256="0" * 64)
    folder = tmp_path / "folder.pth"
    folder.mkdir()
    assert "cannot be read" in refusal(folder, sha256="0" * 64)
    assert "neither .pth nor .safetensors" in refusal(tmp_path / "model.onnx", sha256="0" * 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"state_dict": t}, "neither params_ema nor params"),
        (lambda t: list(t.values()), "neither params_ema nor params"),
        (lambda t: {"params": {**t, "epoch": 3}}, "'epoch', which is no table of numbers"),
        (lambda t: {"params": {**t, "count": torch.ones(2, dtype=torch.int64)}}, "'count', which is no table of numbers"),
        (lambda t: {"params": {**t, "extra": torch.ones(2)}}, "extra"),
        (lambda t: {"params": {k: v for k, v in t.items() if k != "final_conv.bias"}}, "final_conv.bias"),
        (lambda t: {"params": {**t, "final_conv.bias": t["final_conv.bias"][:5]}}, "final_conv.bias"),
        (lambda t: {"params": {**t, "final_conv.bias": t["final_conv.bias"] / 0}}, "final_conv.bias holds values"),
        (lambda t: {"params": {k.replace("condition", "other"): v for k, v in t.items()}}, "another network"),
        (lambda t: {"params": {"stylegan_decoder.constant_input.weight": torch.ones(1_000_000)}}, "another network"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, tensors: Tensors, change: Callable[[Tensors], Any], message: str) -> None:
    """Another network's weights, missing, additional, misshapen and infinite ones are refused by name."""
    path = tmp_path / "weights.pth"
    torch.save(change(tensors), path)
    assert message in refusal(path)


def test_network_keeps_the_widths_of_the_file(tmp_path: Path) -> None:
    """The network is as wide as the tensors in the file are."""
    network = random_network(narrow=True)
    path = tmp_path / "weights.pth"
    _, read = load_weights(path, sha256=save_weights(network, path))
    built = build(read, path=path)
    assert built.stylegan_decoder.channels == network.stylegan_decoder.channels
    assert {name: tensor.shape for name, tensor in built.state_dict().items()} == {name: t.shape for name, t in read.items()}


def test_digest_is_checked_without_torch(narrow_path: Path) -> None:
    """The daemon identifies a file without importing torch."""
    program = (
        "import sys; from pathlib import Path; from jobdaemon.backends.gfpgan.weights import identify;"
        f"print(identify(Path({str(narrow_path)!r}), sha256={digest(narrow_path)!r}).name, 'torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True, cwd=Path(__file__).parents[2]) == "narrow False\n"
    assert weights.SUFFIXES == (".pth", ".safetensors")

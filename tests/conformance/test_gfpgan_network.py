"""The face network: our computation gives the authors' numbers, and the same face the same bytes whatever its company."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if not all(importlib.util.find_spec(package) for package in ("torch", "spandrel")):  # not imported: that needs care
    pytest.skip("torch or spandrel is not installed (scripts/test installs them)", allow_module_level=True)

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from jobdaemon.backends.gfpgan import execution
from jobdaemon.backends.gfpgan.architecture import build
from jobdaemon.backends.gfpgan.frames import FacesFailedError
from jobdaemon.backends.gfpgan.network import FaceNetwork, Pixels, fitting_batch
from jobdaemon.backends.gfpgan.optimised import OptimisedNetwork
from jobdaemon.backends.gfpgan.weights import load_weights
from jobdaemon.errors import DeviceMemoryError, RetryableError, SettingsError
from tests.face_network import NARROW, authors_network_class, random_network, save_weights

CPU = torch.device("cpu")
AS_TRAINED: dict[str, Any] = {"input_is_latent": True, "different_w": True, "sft_half": True}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tests run side by side; torch's threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def narrow() -> nn.Module:
    return random_network(narrow=True)


@pytest.fixture(scope="module")
def network(narrow: nn.Module) -> FaceNetwork:
    return FaceNetwork(narrow, device="cpu")


@pytest.fixture(scope="module")
def authors_class() -> Any:
    try:
        return authors_network_class()
    except ImportError as error:
        pytest.skip(f"the gfpgan package is not installed (scripts/test installs it): {error}")


def faces(count: int, seed: int = 1) -> Pixels:
    """(N, 512, 512, 3): coarse random colours, different for each face."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3)).astype(np.uint8)
    return coarse.repeat(32, axis=1).repeat(32, axis=2)


def numbers(crops: Pixels) -> torch.Tensor:
    """As the network's authors make them: (N, 3, H, W), -1 to 1."""
    return torch.from_numpy(crops.transpose(0, 3, 1, 2).astype(np.float32) / 255 * 2 - 1).contiguous()


def stock(original: nn.Module, crops: Pixels) -> torch.Tensor:
    with torch.inference_mode():
        return original(numbers(crops), return_rgb=False, randomize_noise=False)[0]


def as_pixels(output: torch.Tensor) -> Pixels:
    """As the network's authors make pixels of it."""
    pixels: Pixels = ((output.clamp(-1, 1) + 1) / 2 * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return pixels


@pytest.mark.timeout(300)  # two forward passes of 400 billion operations each
def test_full_network_gives_the_authors_numbers(tmp_path: Path, authors_class: Any) -> None:
    """Full width, through a .pth file: ours differ from those of the gfpgan package's network by less than 1e-4."""
    path = tmp_path / "full.pth"
    _, tensors = load_weights(path, sha256=save_weights(random_network(narrow=False), path))
    path.unlink()
    authors = authors_class(out_size=512, channel_multiplier=2, **AS_TRAINED).eval()
    authors.load_state_dict(tensors, strict=True, assign=True)
    face = faces(1)
    truth = stock(authors, face)
    with torch.inference_mode():
        ours = OptimisedNetwork(build(tensors, path=path), device=CPU, dtype=torch.float32).compute(numbers(face))
    assert 0.1 < truth.std() < 0.7, "a picture, or figures in levels of one mean nothing"
    assert (ours - truth).abs().max() < 1e-4


def test_spandrels_network_is_the_authors(narrow: nn.Module, authors_class: Any) -> None:
    """The class we build from and the gfpgan package's take the same weights and give the same numbers to the bit."""
    authors = authors_class(out_size=512, **NARROW, **AS_TRAINED).eval()
    authors.load_state_dict(narrow.state_dict(), strict=True)
    assert torch.equal(stock(narrow, faces(1)), stock(authors, faces(1)))


def test_full_safetensors_file_is_the_same_network(tmp_path: Path) -> None:
    """A full .safetensors file holds the same 86 million numbers, and is read back as they are."""
    network = random_network(narrow=False)
    path = tmp_path / "full.safetensors"
    _, tensors = load_weights(path, sha256=save_weights(network, path))
    path.unlink()
    again = build(tensors, path=path).state_dict()
    assert sum(tensor.numel() for tensor in again.values()) > 86_000_000
    assert all(torch.equal(again[name], tensor) for name, tensor in network.state_dict().items())


def test_our_computation_gives_the_stock_numbers(narrow: nn.Module) -> None:
    """Shared weights, channels last, pooling: two faces at once differ from the stock network's by rounding only."""
    crops = faces(2)
    with torch.inference_mode():
        ours = OptimisedNetwork(narrow, device=CPU, dtype=torch.float32).compute(numbers(crops))
    assert (ours - stock(narrow, crops)).abs().max() < 1e-4


def test_pictures_lie_channels_last_all_the_way(narrow: nn.Module) -> None:
    """No convolution gets a picture that it would have to transpose first, nor do the colours, and no large one is copied."""
    asked: list[tuple[str, bool]] = []

    class Watch(TorchDispatchMode):  # type: ignore[misc]  # torch counts as untyped
        def __torch_dispatch__(self, called: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
            if any(name in str(called) for name in ("convolution", "conv2d")):
                asked.append(("convolution", args[0].is_contiguous(memory_format=torch.channels_last)))
            elif "bmm" in str(called):
                asked.append(("colours", args[0].is_contiguous()))
            elif "clone" in str(called):
                asked.append(("copy", args[0].numel() < 512 * 512))
            return called(*args, **(kwargs or {}))

    network = OptimisedNetwork(narrow, device=CPU, dtype=torch.float32)
    pictures = numbers(faces(2)).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), Watch():
        network.compute(pictures)
    assert {what for what, _ in asked} >= {"convolution", "colours"}
    assert [what for what, fits in asked if not fits] == []


def test_pixels_are_scaled_as_the_authors_do(narrow: nn.Module, network: FaceNetwork) -> None:
    """Bytes in and out give the authors' pixels, but for those on the edge between two values."""
    crops = faces(1)
    difference = np.abs(network.restore(crops).astype(int) - as_pixels(stock(narrow, crops)))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_face_is_the_same_alone_and_in_company(network: FaceNetwork) -> None:
    """On the CPU a face gives the same bytes alone, among others, and again."""
    crops = faces(3)
    together = network.restore(crops)
    for index in (0, 2):
        assert np.array_equal(network.restore(crops[index : index + 1])[0], together[index])
    assert not np.array_equal(together[0], together[1])


def test_filled_up_batches_give_the_same_faces(narrow: nn.Module, network: FaceNetwork) -> None:
    """In batches of a fixed size, the last one filled up, a face is the same in any place and within a level of its own alone."""
    batched = FaceNetwork(narrow, device="cpu", batch_size=2)
    crops = faces(3)
    together = batched.restore(crops)
    assert np.array_equal(batched.restore(crops[1:2])[0], together[1])
    assert np.abs(together.astype(int) - network.restore(crops)).max() <= 1


def test_noise_comes_from_the_checkpoint(narrow: nn.Module) -> None:
    """Torch's random numbers change nothing."""
    crops = faces(1)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(FaceNetwork(narrow, device="cpu").restore(crops))
    assert np.array_equal(results[0], results[1])


def test_bfloat16_stays_close(narrow: nn.Module, network: FaceNetwork) -> None:
    """In bfloat16 pixels differ by less than 1.5 levels in the mean."""
    crops = faces(1)
    reduced = FaceNetwork(narrow, device="cpu", dtype="bfloat16").restore(crops)
    assert np.abs(reduced.astype(int) - network.restore(crops)).mean() < 1.5


def test_network_says_what_it_is(network: FaceNetwork, tmp_path: Path, narrow: nn.Module) -> None:
    """The name of an unreleased model is its file's; device and precision are told."""
    path = tmp_path / "ours.pth"
    loaded = FaceNetwork.load(path, sha256=save_weights(narrow, path, group="params"), device="cpu")
    assert (loaded.name, loaded.device, loaded.dtype, loaded.batch_size) == ("ours", "cpu", "float32", 1)
    crops = faces(1)
    assert np.array_equal(loaded.restore(crops), network.restore(crops))


@pytest.mark.parametrize("shape", [(1, 256, 256, 3), (512, 512, 3), (1, 512, 512, 4)])
def test_other_shapes_are_refused(network: FaceNetwork, shape: tuple[int, ...]) -> None:
    """Only whole crops are taken; other sizes would come out as nonsense."""
    with pytest.raises(ValueError, match="512, 512, 3"):
        network.restore(np.zeros(shape, np.uint8))


def test_no_face_is_no_work(network: FaceNetwork) -> None:
    """An empty stack gives an empty stack."""
    assert network.restore(np.empty((0, 512, 512, 3), np.uint8)).shape == (0, 512, 512, 3)


class Device:
    """Stands for a device whose memory holds so many faces: instead of the network, it brightens pixels."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, holds: int, error: Exception | None = None) -> None:
        self.batches: list[int] = []
        self.holds = holds
        self.error = error or torch.OutOfMemoryError("CUDA out of memory.")
        monkeypatch.setattr(OptimisedNetwork, "forward", lambda _, crops: self.forward(crops))

    def forward(self, crops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.batches.append(len(crops))
        if len(crops) > self.holds:
            raise self.error
        return crops + 1, torch.ones(len(crops), dtype=torch.bool)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to …"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to allocate …"),
        torch.AcceleratorError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
    ids=["torch", "linux", "elsewhere", "driver", "cublas", "cudnn"],
)
def test_batch_is_halved_when_memory_is_full(narrow: nn.Module, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Out of memory halves the batch until it fits; every face is restored in its place, and the smaller size stays."""
    device = Device(monkeypatch, holds=2, error=error)
    reports: list[str] = []
    network = FaceNetwork(narrow, device="cpu", batch_size=8, report=reports.append)
    crops = faces(5) // 2
    assert np.array_equal(network.restore(crops), crops + 1)
    assert device.batches == [8, 4, 2, 2, 2]
    assert network.batch_size == 2
    assert [report.rsplit(" ", 1)[1] for report in reports] == ["4.", "2."]


SHORT_OF_MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
import torch
from jobdaemon.backends.gfpgan.network import FaceNetwork

torch.set_num_threads(1)
alone, together = (FaceNetwork.load(Path(sys.argv[1]), sha256=sys.argv[2], device="cpu", batch_size=size) for size in (1, 16))
crops = np.arange(16, dtype=np.uint8)[:, None, None, None] * np.ones((1, 512, 512, 3), np.uint8)
one = alone.restore(crops[:1])
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)
restored = together.restore(crops)
print(together.batch_size, np.abs(restored[0].astype(int) - one[0]).max())
"""


def test_batch_is_halved_when_the_kernel_gives_no_more(narrow: nn.Module, tmp_path: Path) -> None:
    """The real thing, in a process that may have 300 MB more: every face comes out, in smaller batches."""
    path = tmp_path / "narrow.pth"
    sha256 = save_weights(narrow, path)
    command = [sys.executable, "-c", SHORT_OF_MEMORY, str(path), sha256]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    batch_size, difference = map(int, ended.stdout.split())
    assert 1 <= batch_size < 16
    assert difference <= 1
    assert "ran out of memory with 16 faces at once" in ended.stderr


def test_smaller_batch_is_not_compiled_again(narrow: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the memory was full the network runs as it is: compiling it again would hold faces up for minutes."""
    asked: list[Any] = []

    def compiler(network: nn.Module, **_: Any) -> Any:
        asked.append(network)
        return network

    Device(monkeypatch, holds=2)
    monkeypatch.setattr(torch, "compile", compiler)
    network = FaceNetwork(narrow, device="cpu", batch_size=4, compile=True, report=lambda _: None)
    assert np.array_equal(network.restore(faces(1) // 2), faces(1) // 2 + 1)
    assert len(asked) == 1


def test_memory_for_no_face_is_an_error(narrow: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not even one face fits, that is a retryable error, never an unrestored face; later it may fit."""
    device = Device(monkeypatch, holds=0)
    network = FaceNetwork(narrow, device="cpu", batch_size=2, report=lambda _: None)
    with pytest.raises(DeviceMemoryError, match="cpu has no memory for one face"):
        network.restore(faces(1))
    device.holds = 1
    assert np.array_equal(network.restore(faces(1) // 2), faces(1) // 2 + 1)


def test_other_failures_are_not_taken_for_missing_memory(narrow: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other error is the faces' at once."""
    device = Device(monkeypatch, holds=0, error=ZeroDivisionError())
    with pytest.raises(FacesFailedError, match="ZeroDivisionError"):
        FaceNetwork(narrow, device="cpu", batch_size=2).restore(faces(1))
    assert device.batches == [2]


def test_values_that_are_no_numbers_are_an_error() -> None:
    """A network whose values explode gives an error, never a picture."""
    broken = random_network(narrow=True)
    broken.final_linear.bias.data.fill_(float("inf"))
    with pytest.raises(RetryableError, match="no numbers on cpu"):
        FaceNetwork(broken, device="cpu").restore(faces(1))


@pytest.mark.parametrize("how", ["no numbers", "raises"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_poisoned_face_leaves_the_others_alone(
    narrow: nn.Module, monkeypatch: pytest.MonkeyPatch, how: str, batch_size: int
) -> None:
    """Where the network breaks over a face, the others of the call have the bytes they have alone; a raise fails its batch."""
    poison = 77
    compute = OptimisedNetwork.compute

    def poisoned(network: OptimisedNetwork, numbers: torch.Tensor) -> torch.Tensor:
        evil = (((numbers[:, :, 0, 0] + 1) * 127.5).round() == poison).all(1)
        if how == "raises" and evil.any():
            raise RuntimeError("a convolution that met its match")
        output = compute(network, numbers)
        output[evil, 0, 0, 0] = torch.nan
        return output

    monkeypatch.setattr(OptimisedNetwork, "compute", poisoned)
    network = FaceNetwork(narrow, device="cpu", batch_size=batch_size)
    crops = faces(5)
    crops[2, 0, 0] = poison
    with pytest.raises(FacesFailedError, match="no numbers on cpu" if how == "no numbers" else "RuntimeError") as told:
        network.restore(crops)
    assert told.value.failed == ([2, 3] if (how, batch_size) == ("raises", 2) else [2])
    for place in {0, 1, 3, 4} - set(told.value.failed):
        assert np.array_equal(told.value.restored[place], network.restore(crops[place : place + 1])[0])


def test_dead_compiler_falls_back(narrow: nn.Module, network: FaceNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch.compile fails, that is told once and the network computes the same without."""

    def dead(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler here\nand a long story")

    monkeypatch.setattr(torch, "compile", dead)
    reports: list[str] = []
    plain = FaceNetwork(narrow, device="cpu", compile=True, report=reports.append)
    crops = faces(1)
    plain.warm_up()
    assert np.array_equal(plain.restore(crops), network.restore(crops))
    assert reports == ["The network could not be compiled and runs without: RuntimeError: no compiler here"]


def test_compiled_network_is_asked_for_one_batch_size(narrow: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is compiled whole, for the one kind of batch it is then always called with: another would compile it again."""
    asked: list[dict[str, Any]] = []
    kinds: list[tuple[int, bool]] = []

    def compiler(network: nn.Module, **options: Any) -> Any:
        asked.append(options)

        def forward(crops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            kinds.append((len(crops), crops.is_inference()))
            return crops, torch.ones(len(crops), dtype=torch.bool)

        return forward

    monkeypatch.setattr(torch, "compile", compiler)
    FaceNetwork(narrow, device="cpu", batch_size=4, compile=True).restore(faces(5))
    assert asked == [{"dynamic": False, "fullgraph": True}]
    assert set(kinds) == {(4, False)}


def test_two_batches_are_in_flight(narrow: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next batch is started before the last one is waited for, never a third, and each result lands in its place."""
    steps: list[str] = []

    class Slow(execution.PlainExecution):
        def submit(self, crops: Pixels) -> Any:
            number = sum(step.startswith("start") for step in steps)
            steps.append(f"start {number}")

            def wait() -> execution.Restored:
                steps.append(f"wait {number}")
                return execution.Restored(crops + 1, np.ones(len(crops), bool))

            return wait

    monkeypatch.setattr(execution, "PlainExecution", Slow)
    crops = faces(5) // 2
    assert np.array_equal(FaceNetwork(narrow, device="cpu", batch_size=2).restore(crops), crops + 1)
    assert steps == ["start 0", "start 1", "wait 0", "start 2", "wait 1", "wait 2"]


@pytest.mark.parametrize(
    ("per_face", "free", "size"), [(1, 100, 16), (10, 100, 4), (5, 100, 8), (35, 100, 2), (99, 100, 1), (500, 100, 1), (1, 0, 1)]
)
def test_batch_takes_its_share_of_the_free_memory(per_face: int, free: int, size: int) -> None:
    """The largest size that takes at most 70 % of the free memory, at least 1."""
    assert fitting_batch(per_face_bytes=per_face, free_bytes=free) == size


def test_wrong_device_or_precision_stops_the_start(narrow: nn.Module) -> None:
    """A device that is not there and a precision that gives wrong faces are refused in a sentence."""
    with pytest.raises(SettingsError, match="no device 'gpu'"):
        FaceNetwork(narrow, device="gpu")
    with pytest.raises(SettingsError, match="not in 'float16'"):
        FaceNetwork(narrow, device="cpu", dtype="float16")
    if not torch.cuda.is_available():
        with pytest.raises(SettingsError, match="finds no CUDA device"):
            FaceNetwork(narrow, device="cuda")


@pytest.mark.gpu
def test_on_a_gpu_a_face_is_the_same_in_any_company(narrow: nn.Module) -> None:
    """On CUDA a face gives the same bytes in every place of a batch, with and without the recorded graph, and anew."""
    reports: list[str] = []
    network = FaceNetwork(narrow, device="cuda", report=reports.append)
    crops = faces(2 * network.batch_size + 3)
    together = network.restore(crops)
    assert np.array_equal(network.restore(crops), together)
    for index in (0, 1, len(crops) - 1):
        assert np.array_equal(network.restore(crops[index : index + 1])[0], together[index])
    monkeypatched = pytest.MonkeyPatch()
    with monkeypatched.context() as patch:
        patch.setattr(execution.CudaExecution, "_record", lambda *_: None)
        again = FaceNetwork(narrow, device="cuda", batch_size=network.batch_size)
        assert np.array_equal(again.restore(crops), together)
    assert reports == []


@pytest.mark.gpu
def test_on_a_gpu_precise_numbers_are_the_processors(
    narrow: nn.Module, network: FaceNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA a face differs from the CPU's by a level at most in full float32, in bfloat16 by less than 1.5 in the mean."""
    crops = faces(2)
    truth = network.restore(crops).astype(int)
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)  # on by default: convolutions with 10 bits after the point
        precise = FaceNetwork(narrow, device="cuda", dtype="float32").restore(crops)
    assert np.abs(precise - truth).max() <= 1
    assert np.abs(FaceNetwork(narrow, device="cuda").restore(crops) - truth).mean() < 1.5


@pytest.mark.gpu
def test_on_a_gpu_full_memory_halves_the_batch() -> None:
    """With a cap on the device's memory the batch shrinks until it fits."""
    network = FaceNetwork(random_network(narrow=False), device="cuda", batch_size=16, report=lambda _: None)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2.5e9) / total)
    try:
        network.restore(faces(3))
        assert network.batch_size < 16
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)

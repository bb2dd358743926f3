"""CUDA is initialised and a GPU selected before anything asks about it, wherever work on a device begins."""

from __future__ import annotations

import argparse
import re
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch

from app.core.errors import DeviceFault, NibbleError, OutOfMemory
from tests.tiny_models import assignment, random_model, save_model, tiny_spec
from workers.child import calibration_rank
from workers.child.job_run import run_job
from workers.child.ranks import RankAssignment, SharedLayers
from workers.devices import profile_measurement
from workers.devices.selection import select_device
from workers.serving.__main__ import ReadyPipe, parse_arguments, run
from workers.serving.engine import Engine, EngineLimits
from workers.serving.loading import LoadRequest, load_model
from workers.serving.server_metrics import ServerMetrics

CALL = re.compile(r"torch\.cuda\.(\w+)")
SELECTING = {"init", "set_device"}
GPU = "cuda:1"  # not the one that is current without a word


class ReachedError(Exception):
    """A question about a GPU that was selected."""


class PretendedCuda:
    """What PyTorch does without a GPU can't show this: what it answers before and after a GPU is selected."""

    def __init__(self) -> None:
        self.initialised = False
        self.current: dict[int, str] = {}  # the GPU of each thread

    def init(self) -> None:
        self.initialised = True

    def set_device(self, device: torch.device) -> None:
        assert self.initialised
        self.current[threading.get_ident()] = str(device)

    def question(self, name: str) -> Callable[..., NoReturn]:
        def ask(*_: object, **__: object) -> NoReturn:
            if threading.get_ident() not in self.current:
                raise RuntimeError(f"Invalid device argument: torch.cuda.{name}")
            raise ReachedError(name)

        return ask


def calls_of_cuda(repository: Path) -> dict[str, set[str]]:
    """The functions of torch.cuda that our sources name, with the files that do."""
    found: dict[str, set[str]] = {}
    for folder in ("workers", "kernels"):
        for path in (repository / folder).rglob("*.py"):
            for name in CALL.findall(path.read_text("utf-8")):
                found.setdefault(name, set()).add(path.name)
    return found


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, repository: Path) -> PretendedCuda:
    pretended = PretendedCuda()
    for name in calls_of_cuda(repository):
        stand_in = getattr(pretended, name) if name in SELECTING else pretended.question(name)
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return pretended


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(random_model("llama"), tmp_path_factory.mktemp("model"))


def serve(folder: Path, _: Path) -> None:
    options = parse_arguments(["--artifact", str(folder), "--name", "tiny", "--device", GPU])
    with socket.socket() as bound:
        run(options, bound, ReadyPipe(None))


def load(folder: Path, _: Path) -> None:
    load_model(LoadRequest(folder, torch.device(GPU)))


def quantize(folder: Path, work: Path) -> None:
    run_job(assignment(tiny_spec(), folder, work, device=GPU), lambda message: None)


def calibrate(folder: Path, work: Path) -> None:
    job = assignment(tiny_spec(), folder, work, device=GPU)
    shared = SharedLayers(start=0, stop=1)
    rank = RankAssignment(assignment=job, shared=shared, rank=1, size=2, rendezvous=work / "meet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration_rank, "joined", torch.cuda.synchronize)  # NCCL asks CUDA, too
        calibration_rank.run(rank)


def profile(_: Path, work: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["profile_measurement", "--device", GPU, "--folder", str(work)])
        patch.setattr(profile_measurement, "measure", lambda device, *_: profile_measurement.wait_for(device))
        profile_measurement.main()


@pytest.mark.parametrize("entry", [serve, load, quantize, calibrate, profile])
def test_the_first_thing_asked_of_cuda_is_to_select_the_device(
    entry: Callable[[Path, Path], None], cuda: PretendedCuda, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match="Invalid device argument"):
        torch.cuda.reset_peak_memory_stats(GPU)
    with pytest.raises(ReachedError):
        entry(folder, tmp_path)
    assert cuda.current == {threading.get_ident(): GPU}


def test_the_engine_selects_it_in_its_own_thread(cuda: PretendedCuda) -> None:
    """The current GPU belongs to a thread: that of the main one says nothing."""
    select_device(GPU)
    batch = SimpleNamespace(device=torch.device(GPU), sequences=[])
    limits = EngineLimits(max_model_len=8, max_sequences=1, max_waiting=1, max_cells=8, prefill_tokens=8)
    engine = Engine(batch, None, limits, ServerMetrics("tiny"), frozenset())  # type: ignore[arg-type]
    ended = threading.Event()
    engine.on_failure = ended.set
    engine._await_work = torch.cuda.synchronize  # type: ignore[method-assign]
    engine.start()
    assert ended.wait(10)
    assert engine.failure == "the engine failed: ReachedError: synchronize"
    assert list(cuda.current.values()) == [GPU, GPU]


def test_no_other_place_selects_a_device(repository: Path) -> None:
    """The probe asks about all devices and selects none."""
    calls = calls_of_cuda(repository)
    assert calls["set_device"] == {"selection.py"}
    assert calls["init"] == {"selection.py", "host_probe.py"}


def test_a_cpu_needs_nothing() -> None:
    assert select_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(DeviceFault, match=f"^{name} can't be used: .") as caught:
        select_device(name)
    assert "nibble doctor" in caught.value.remedy


def test_a_gpu_without_room_is_out_of_memory(cuda: PretendedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Selecting a GPU makes PyTorch's context on it, which takes some hundred MB."""

    def full(_: object) -> NoReturn:
        raise torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported")

    monkeypatch.setattr(torch.cuda, "set_device", full)
    with pytest.raises(OutOfMemory, match=r"cuda:1 has no memory left: CUDA error: out of memory$"):
        select_device(GPU)


def test_the_server_says_why_it_does_not_start(folder: Path) -> None:
    options = argparse.Namespace(threads=None, artifact=folder, device="cuda:99")
    with socket.socket() as bound, pytest.raises(NibbleError, match="cuda:99 can't be used") as caught:
        run(options, bound, ReadyPipe(None))
    assert caught.value.code == "device_failed"

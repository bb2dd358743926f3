"""Checks of GPUs, PyTorch and compilers. Facts that need torch come from a separate process."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from app.commands.checks.check import Check
from app.commands.terminal import human_seconds
from app.core.errors import InvalidRequest
from app.core.planning.host_devices import DEVICE, gpu_names, listed_gpus
from app.core.records.counted import counted

PROBE_LIMIT_S = 180
UNFINISHED = "the compilation ended without an answer"
CUDA_INDEX = "https://download.pytorch.org/whl/cu130"


def chosen_device(device: str) -> str:
    """Resolve `auto`. Raises InvalidRequest for an unknown device or an absent GPU."""
    if DEVICE.fullmatch(device) is None:
        raise InvalidRequest(
            f"--device {device!r} is not a device", code="device_unknown", remedy="use auto, cpu or cuda:N"
        )
    if device == "cpu":
        return device
    names = gpu_names()
    if device == "auto":
        return "cuda:0" if names else "cpu"
    number = int(device.partition(":")[2])
    if number >= len(names) and not Path(f"/dev/nvidia{number}").exists():
        raise InvalidRequest(
            f"there is no {device}: the driver shows {counted(len(names), 'GPU')}",
            code="device_absent",
            remedy="use auto or cpu; `nibble doctor` checks the GPUs",
        )
    return device


def check_devices() -> list[Check]:
    """Check the driver, PyTorch and the compilers."""
    names = [gpu.name for gpu in listed_gpus()]  # also those that CUDA_VISIBLE_DEVICES hides
    if importlib.util.find_spec("torch") is None:
        return [Check("pytorch", "ok", "not installed: this host can run the API but no worker")]
    facts = probed()
    if "error" in facts:
        remedy = "reinstall it: pip install --force-reinstall torch"
        return [Check("pytorch", "problem", str(facts["error"]), remedy)]
    checks = [Check("pytorch", "ok", str(facts["torch"])), check_driver(names, facts)]
    if names:
        checks.append(check_cuda_compiler(facts))
    return [*checks, check_compiler(facts)]


def check_kernels(on_kernel: Callable[[Mapping[str, Any]], None]) -> Check:
    """Compile the usual CUDA kernels into the cache. `on_kernel` hears of each that is ready.

    It takes as long as it takes: what is in the cache by then stays there if it is interrupted.
    """
    facts: dict[str, Any] = {"error": UNFINISHED}
    began = time.monotonic()
    for facts in answers_of("workers.devices.kernel_compilation"):
        if "source" in facts:
            on_kernel(facts)
    if "error" in facts or "source" in facts:
        remedy = (
            "install PyTorch's CUDA build or the CUDA toolkit; otherwise kernels are compiled at first use"
        )
        return Check("cuda kernels", "warning", str(facts.get("error", UNFINISHED)), remedy)
    counts = ", ".join(f"{count} for {name}" for name, count in facts["kernels"].items())
    took = human_seconds(time.monotonic() - began)
    return Check("cuda kernels", "ok", f"{counts} in {facts['folder']}, by {facts['compiler']}, in {took}")


def answers_of(module: str) -> Iterator[dict[str, Any]]:
    """Each line of JSON that a program of the worker prints, as it comes; `error` at its end if it fails."""
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            [sys.executable, "-m", module], stdout=subprocess.PIPE, stderr=errors, text=True
        ) as program:
            for line in program.stdout or ():
                if line.startswith("{"):
                    yield json.loads(line)
        if program.returncode:
            errors.seek(0)
            yield {"error": (errors.read().strip().splitlines() or [UNFINISHED])[-1]}


def probed() -> dict[str, Any]:
    """The facts of `python -m workers.devices.host_probe`; `error` if it fails."""
    return facts_of("workers.devices.host_probe", PROBE_LIMIT_S)


def facts_of(module: str, limit_s: float) -> dict[str, Any]:
    """What a program of the worker prints as JSON in its last line; `error` if it fails."""
    command = [sys.executable, "-m", module]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except (OSError, subprocess.SubprocessError) as fault:
        return {"error": f"the probe failed: {fault}"}
    if answer.returncode:
        return {"error": (answer.stderr.strip().splitlines() or ["it can't be imported"])[-1]}
    facts: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return facts


def check_driver(names: list[str], facts: Mapping[str, Any]) -> Check:
    """Check the devices that jobs would run on."""
    if not names:
        if shutil.which("nvidia-smi") is not None:
            remedy = "if this host has a GPU: install its driver, or give the container access to it"
            return Check("gpu", "warning", "nvidia-smi exists but sees no GPU", remedy)
        return Check("gpu", "ok", "no NVIDIA GPU: jobs run on the CPU")
    if facts.get("torch_cuda") is None:
        finding = f"{', '.join(names)}, but this PyTorch is built without CUDA"
        return Check("gpu", "problem", finding, f"pip install torch --index-url {CUDA_INDEX}")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = facts.get("devices", [])
    if not devices:
        if hidden is not None:
            finding = f"CUDA_VISIBLE_DEVICES={hidden!r} hides {', '.join(names)}"
            return Check("gpu", "problem", finding, "unset it, or name a device that exists")
        finding = f"PyTorch can't use {', '.join(names)}: {facts.get('cuda_error') or 'no reason given'}"
        return Check("gpu", "problem", finding, "install a driver as new as PyTorch's CUDA, then restart")
    listing = ", ".join(f"{device['name']} (compute capability {device['capability']})" for device in devices)
    foreign = [device["name"] for device in devices if not device["own_kernels"]]
    if foreign:
        remedy = "nothing to do: those of Triton or PyTorch are used; Nibble's need 8.x, 9.x, 10.x or 12.x"
        return Check("gpu", "warning", f"{listing}: Nibble has no kernels for {', '.join(foreign)}", remedy)
    return Check("gpu", "ok", listing)


def check_cuda_compiler(facts: Mapping[str, Any]) -> Check:
    version = facts.get("cuda_compiler")
    if version:
        return Check("cuda compiler", "ok", str(version))
    remedy = "install PyTorch's CUDA build (it brings NVRTC), or nvcc; Triton or PyTorch are used until then"
    return Check("cuda compiler", "warning", "neither nvcc nor NVRTC", remedy)


def check_compiler(facts: Mapping[str, Any]) -> Check:
    """Check the compiler of the CPU kernels, which are compiled at first use."""
    fault = facts.get("compiler_error")
    if fault:
        remedy = "install g++ (apt install g++); until then PyTorch's slower kernels are used on the CPU"
        return Check("c++ compiler", "warning", str(fault), remedy)
    lacking = facts.get("cpu_lacks")
    if lacking:
        finding = (
            f"{facts.get('compiler')}; the processor lacks {', '.join(lacking)}: PyTorch's kernels are used"
        )
        return Check("c++ compiler", "ok", finding)
    return Check("c++ compiler", "ok", str(facts.get("compiler")))

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from workers.main import describe_worker, parse_arguments, resolve_device


def test_arguments_have_defaults() -> None:
    options = parse_arguments([])
    assert (options.device, options.name, options.burst) == ("auto", None, False)


@pytest.mark.parametrize(
    "arguments",
    [["--device", "tpu"], ["--device", "cuda"], ["--device", "cuda:x"], ["--name", "a/b"], ["--name", ""]],
)
def test_bad_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(arguments)
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda:3"])
def test_a_named_device_is_taken_at_its_word(device: str) -> None:
    assert resolve_device(device) == device


def test_auto_finds_a_device() -> None:
    assert resolve_device("auto") in {"cpu", "cuda:0"}


def test_a_worker_describes_itself() -> None:
    record = describe_worker("cpu", None)
    assert record.pid == os.getpid()
    assert record.name.endswith(f"-cpu-{os.getpid()}")
    assert describe_worker("cpu", "mine").name == "mine"


def test_the_worker_process_loads_no_torch() -> None:
    program = (
        "import sys; import workers.main, workers.tasks; "
        "print([name for name in ('torch', 'numpy', 'transformers', 'safetensors') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

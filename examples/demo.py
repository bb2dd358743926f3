"""The whole service in one run: start it, quantize a model over HTTP, have transformers judge the result.

`make demo` runs this. Everything but the fetched model is in a temporary folder that goes away.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from demo_model import CHOICES, REPOSITORY, DemoModel, demo_model
from local_service import DemoFailed, ended, free_port, running_service
from rich.console import Console

from app.client import JobAnswer, NibbleClient
from app.commands.show import show_job, show_report
from app.commands.watching import watch_job

TEST_TEXT = REPOSITORY / "workers" / "texts" / "builtin" / "wikitext2" / "test.txt"
# The loader computes in its own order and dtype; a packing mistake is off by far more.
MAX_DIFFERENCE = 0.005


def run_job(client: NibbleClient, console: Console, model: DemoModel) -> JobAnswer:
    job = client.submit(
        {
            "model": model.folder.as_uri(),
            "recipe": [{"method": "rtn", "bits": 4}, {"method": "awq", "bits": 4}],
            **model.text(),
            "formats": ["awq", "compressed-tensors"],
        }
    )
    console.print(f"submitted {job.id}: {model.name}, RTN and AWQ, 4 bits, two formats")
    job = watch_job(client, job.id, console)
    show_job(console, job)
    if job.state != "succeeded":
        raise DemoFailed(f"the job is {job.state}")
    return job


def chosen_artifact(client: NibbleClient, job: JobAnswer) -> str:
    """The AWQ candidate in the format that compressed-tensors reads."""
    for artifact_id in job.artifacts:
        artifact = client.artifact(artifact_id)
        if artifact.recipe["method"] == "awq" and artifact.format == "compressed-tensors":
            return artifact_id
    raise DemoFailed("the job has no compressed-tensors artifact of the AWQ recipe")


def loaded_perplexity(folder: Path, model: DemoModel) -> float:
    """The perplexity that transformers gets with the artifact, through the compressed-tensors library."""
    # Imported here: the service above is up before this process loads torch.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    shape = (model.evaluation_windows, model.sequence_length)
    ids = tokenizer(TEST_TEXT.read_text("utf-8"), verbose=False)["input_ids"]
    windows = torch.tensor(ids[: shape[0] * shape[1]]).view(shape)
    with torch.inference_mode():
        losses = [loaded(window[None], labels=window[None]).loss.item() for window in windows]
    return float(torch.tensor(losses, dtype=torch.float64).mean().exp())


def compare(reported: float, loaded: float, console: Console) -> None:
    difference = abs(loaded / reported - 1)
    console.print(
        f"perplexity of the AWQ artifact: reported {reported:.3f}, loaded by transformers {loaded:.3f}"
    )
    if difference > MAX_DIFFERENCE:
        raise DemoFailed(f"they differ by {difference:.2%}, more than {MAX_DIFFERENCE:.1%}")
    console.print(f"they differ by {difference:.4%}: the files hold what the service measured")


def run(console: Console, choice: str) -> None:
    started = time.monotonic()
    model = demo_model(choice, console)
    with tempfile.TemporaryDirectory(prefix="nibble-demo-") as temporary:
        folder = Path(temporary)
        with running_service(folder / "state", free_port(), model.folder) as client:
            console.print(f"the service is ready at {client.url} after {time.monotonic() - started:.1f} s")
            job = run_job(client, console, model)
            report = client.report(job.id)
            show_report(console, report)
            client.download(chosen_artifact(client, job), folder / "artifact")
        awq = next(row for row in report["candidates"] if row["recipe"]["method"] == "awq")
        compare(awq["perplexity"], loaded_perplexity(folder / "artifact", model), console)
    console.print(
        f"done in {time.monotonic() - started:.0f} s; the service is stopped and its folder removed"
    )


if __name__ == "__main__":
    reader = argparse.ArgumentParser(description="Quantize a model over HTTP and judge the result.")
    reader.add_argument("--model", choices=CHOICES, default=CHOICES[0])
    asked = reader.parse_args()
    sys.exit(ended(lambda console: run(console, asked.model)))

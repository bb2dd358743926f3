"""The whole service in one run: start it, quantize the bundled model over HTTP, judge the result, stop it.

`make demo` runs this. Everything is kept in a temporary folder that goes away at the end.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from local_service import MODEL, REPOSITORY, DemoFailed, ended, free_port, running_service
from rich.console import Console

from app.client import JobAnswer, NibbleClient
from app.commands.jobs import watch_job
from app.commands.show import show_job, show_report

TEST_TEXT = REPOSITORY / "workers" / "texts" / "builtin" / "wikitext2" / "test.txt"
WINDOWS = 100
WINDOW_TOKENS = 512
# The loader computes in its own order and dtype; a packing mistake is off by far more.
MAX_DIFFERENCE = 0.005

JOB = {
    "model": MODEL.as_uri(),
    "recipe": [
        {"method": "rtn", "bits": 4, "group_size": 128},
        {"method": "awq", "bits": 4, "group_size": 128},
    ],
    "calibration": {"dataset": "builtin:wikitext2", "num_samples": 128, "sequence_length": WINDOW_TOKENS},
    "evaluation": {"dataset": "builtin:wikitext2", "num_samples": WINDOWS},
    "formats": ["awq", "compressed-tensors"],
}


def run_job(client: NibbleClient, console: Console) -> JobAnswer:
    job = client.submit(JOB)
    console.print(f"submitted {job.id}: RTN and AWQ, 4 bits, groups of 128, two formats")
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


def loaded_perplexity(folder: Path) -> float:
    """The perplexity that transformers gets with the artifact, through the compressed-tensors library."""
    # Imported here: the service above is up before this process loads torch.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    ids = tokenizer(TEST_TEXT.read_text("utf-8"), verbose=False)["input_ids"][: WINDOWS * WINDOW_TOKENS]
    windows = torch.tensor(ids).view(WINDOWS, WINDOW_TOKENS)
    with torch.inference_mode():
        losses = [model(window[None], labels=window[None]).loss.item() for window in windows]
    return float(torch.tensor(losses, dtype=torch.float64).mean().exp())


def compare(reported: float, loaded: float, console: Console) -> None:
    difference = abs(loaded / reported - 1)
    console.print(
        f"perplexity of the AWQ artifact: reported {reported:.3f}, loaded by transformers {loaded:.3f}"
    )
    if difference > MAX_DIFFERENCE:
        raise DemoFailed(f"they differ by {difference:.2%}, more than {MAX_DIFFERENCE:.1%}")
    console.print(f"they differ by {difference:.4%}: the files hold what the service measured")


def run(console: Console) -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nibble-demo-") as temporary:
        folder = Path(temporary)
        with running_service(folder / "state", free_port()) as client:
            console.print(f"the service is ready at {client.url} after {time.monotonic() - started:.1f} s")
            job = run_job(client, console)
            report = client.report(job.id)
            show_report(console, report)
            client.download(chosen_artifact(client, job), folder / "artifact")
        awq = next(row for row in report["candidates"] if row["recipe"]["method"] == "awq")
        compare(awq["perplexity"], loaded_perplexity(folder / "artifact"), console)
    console.print(
        f"done in {time.monotonic() - started:.0f} s; the service is stopped and its folder removed"
    )


if __name__ == "__main__":
    sys.exit(ended(run))

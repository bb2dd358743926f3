"""From nothing to an assistant that answers: start the service, quantize a model, serve it, talk to it.

`make chat` runs this. On a terminal a conversation follows; else one question is asked, the first argument,
and its answer printed. The original answers each question, too, from a deployment of its own. Everything but
the fetched model is kept in a temporary folder that goes away at the end.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from copy import deepcopy
from pathlib import Path

from demo_model import CHOICES, DemoModel, demo_model
from local_service import DemoFailed, ended, free_port, running_service
from rich.console import Console
from rich.markup import escape

from app.client import JobAnswer, NibbleClient
from app.commands.chat import Conversation, Pace, answer, converse
from app.commands.deployments import await_change, is_ready
from app.commands.gains import show_outcome
from app.commands.watching import watch_job

ORIGINAL = "original"  # its name
PORT = 8420  # where `nibble up` listens; another one if it is taken


def job_body(model: DemoModel, num_samples: int | None) -> dict[str, object]:
    """AWQ with 4 bits; the groups are the largest that fit."""
    return {
        "model": model.folder.as_uri(),
        "recipe": {"method": "awq", "bits": 4},
        **model.text(num_samples),
        "formats": ["compressed-tensors"],
        "deploy": {"name": model.name},
    }


def quantized(client: NibbleClient, console: Console, model: DemoModel, num_samples: int | None) -> JobAnswer:
    texts = model.text(num_samples)
    console.print(
        f"quantizing {model.name} to 4 bits with AWQ; text: {texts['calibration']['num_samples']} windows of "
        f"{model.sequence_length} tokens to calibrate, {texts['evaluation']['num_samples']} to judge"
    )
    job = client.submit(job_body(model, num_samples))
    job = watch_job(client, job.id, console)
    if job.state != "succeeded":
        raise DemoFailed(f"the job is {job.state}: {job.error.message if job.error else ''}")
    show_outcome(console, client.report(job.id))
    return job


class Beside:
    """Prints what the original answers to the same conversation; its answer is not added."""

    def __init__(self, client: NibbleClient, console: Console) -> None:
        self.client, self.console = client, console
        self.pace = Pace()

    def __call__(self, talk: Conversation) -> None:
        self.console.print(f"[bold yellow]{ORIGINAL}[/] ", end="")
        other = deepcopy(talk)
        other.model, other.pace = ORIGINAL, Pace()
        answer(self.client, other, self.console)
        self.pace += other.pace


def talk_to(client: NibbleClient, console: Console, model: DemoModel, prompt: str) -> tuple[Pace, Pace]:
    """A conversation on a terminal; else one answer of each. Returns the original's pace and the other's."""
    conversation = Conversation(model=model.name, parameters=dict(model.parameters))
    beside = Beside(client, console)
    if prompt or not sys.stdin.isatty():
        question = prompt or model.opening
        conversation.say(question)
        console.print(f"[bold cyan]you[/] {escape(question)}")
        beside(conversation)
        console.print(f"[bold green]{model.name}[/] ", end="")
        answer(client, conversation, console)
        return beside.pace, conversation.pace
    console.print(f"[dim]{model.advice} Each question is answered twice: by the original, then quantized.[/]")
    console.print("[dim]/help lists the commands; Ctrl-D ends the conversation and the service.[/]")
    converse(client, conversation, console, beside=beside)
    return beside.pace, conversation.pace


def compare(client: NibbleClient, console: Console, job: JobAnswer, paces: tuple[Pace, Pace]) -> None:
    """What was won, with the tokens per second of this conversation."""
    report = client.report(job.id)
    before, after = (pace.tokens_per_s for pace in paces)
    report["original"]["tokens_per_s"] = before
    report["candidates"][0]["tokens_per_s"] = after
    console.print()
    show_outcome(console, report)


def run(console: Console, prompt: str, choice: str, num_samples: int | None) -> None:
    started = time.monotonic()
    model = demo_model(choice, console)
    with tempfile.TemporaryDirectory(prefix="nibble-chat-") as temporary:
        folder = Path(temporary)
        console.print("starting the service")
        with running_service(folder / "state", free_port(PORT), model.folder) as client:
            job = quantized(client, console, model, num_samples)
            original = client.deploy({"name": ORIGINAL, "artifact": job.artifacts[0], "original": True})
            for deployment in (client.deployment_named(model.name), original):
                await_change(client, deployment, console, quiet=True, until=is_ready)
            link = client.login_link().path
            console.print(f"served after {time.monotonic() - started:.0f} s")
            console.print(f"dashboard (the link logs a browser in, once): [bold]{client.url}{link}[/]\n")
            paces = talk_to(client, console, model, prompt)
            compare(client, console, job, paces)
    console.print("the service is stopped and its folder removed")


def main() -> int:
    reader = argparse.ArgumentParser(
        description="Serve a model, quantized, beside its original; talk to both."
    )
    reader.add_argument("prompt", nargs="?", default="", help="one question, instead of a conversation")
    reader.add_argument("--model", choices=CHOICES, default=CHOICES[0])
    reader.add_argument("--num-samples", type=int, help="windows of calibration")
    asked = reader.parse_args()
    return ended(lambda console: run(console, asked.prompt.strip(), asked.model, asked.num_samples))


if __name__ == "__main__":
    sys.exit(main())

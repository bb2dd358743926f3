"""From nothing to a model that answers: start the service, quantize the bundled model, serve it, talk to it.

`make chat` runs this. On a terminal a conversation follows; else one question is asked, the first argument,
and its answer printed. Everything is kept in a temporary folder that goes away at the end.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from local_service import MODEL, DemoFailed, ended, free_port, running_service
from rich.console import Console
from rich.markup import escape

from app.client import JobAnswer, NibbleClient
from app.commands.chat import Conversation, answer, converse
from app.commands.deployments import await_ready
from app.commands.jobs import watch_job

PORT = 8420  # where `nibble up` listens; another one if it is taken
NAME = "wikitext"
OPENING = "My lord, I pray you, tell me what the king"
# The bundled model continues texts. Short answers suit it best.
PARAMETERS: dict[str, float | int] = {"temperature": 0.6, "max_tokens": 64}


def job_body(num_samples: int) -> dict[str, object]:
    return {
        "model": MODEL.as_uri(),
        "recipe": {"method": "awq", "bits": 4, "group_size": 128},
        "calibration": {"num_samples": num_samples},
        "evaluation": {"num_samples": num_samples},
        "formats": ["compressed-tensors"],
        "deploy": {"name": NAME},
    }


def quantized(client: NibbleClient, console: Console, num_samples: int) -> JobAnswer:
    job = client.submit(job_body(num_samples))
    job = watch_job(client, job.id, console)
    if job.state != "succeeded":
        raise DemoFailed(f"the job is {job.state}: {job.error.message if job.error else ''}")
    (candidate,) = client.report(job.id)["candidates"]
    console.print(
        f"quantized to {candidate['bits_per_weight']:.2f} bits per weight: "
        f"perplexity {candidate['perplexity']:.2f}, {candidate['perplexity_ratio']:.4f} times the original's"
    )
    return job


def talk(client: NibbleClient, console: Console, prompt: str) -> None:
    """A conversation on a terminal; else one answer."""
    conversation = Conversation(model=NAME, parameters=dict(PARAMETERS))
    if prompt or not sys.stdin.isatty():
        question = prompt or OPENING
        conversation.say(question)
        console.print(f"[bold cyan]you[/] {escape(question)}\n[bold green]{NAME}[/] ", end="")
        answer(client, conversation, console)
        return
    console.print(
        "[dim]It is small and has read plays, novels and articles: start a sentence, it goes on.[/]"
    )
    console.print("[dim]/help lists the commands; Ctrl-D ends the conversation and the service.[/]")
    converse(client, conversation, console)


def run(console: Console, prompt: str, num_samples: int) -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nibble-chat-") as folder:
        console.print("starting the service")
        with running_service(Path(folder) / "state", free_port(PORT)) as client:
            console.print("quantizing the bundled model to 4 bits")
            quantized(client, console, num_samples)
            await_ready(client, client.deployment_named(NAME), console, quiet=True)
            link = client.login_link().path
            console.print(f"served after {time.monotonic() - started:.0f} s")
            console.print(f"dashboard (the link logs a browser in, once): [bold]{client.url}{link}[/]\n")
            talk(client, console, prompt)
    console.print("the service is stopped and its folder removed")


def main() -> int:
    reader = argparse.ArgumentParser(description="Serve the bundled model, quantized, and talk to it.")
    reader.add_argument("prompt", nargs="?", default="", help="one question, instead of a conversation")
    reader.add_argument("--num-samples", type=int, default=32, help="windows of calibration and evaluation")
    given = reader.parse_args()
    return ended(lambda console: run(console, given.prompt.strip(), given.num_samples))


if __name__ == "__main__":
    sys.exit(main())

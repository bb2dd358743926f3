"""An inference server without a model: it speaks the command lines of `workers.serving` and of `vllm serve`.

`stand_in.json` among the artifact's files says how it starts and what its answers begin with. A request's
fields say how it answers: `tokens` (how many), `gate` (go on when this file exists), `die_after` (kill itself
after so many).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route


class StandIn:
    def __init__(self, name: str, behaviour: dict[str, Any]) -> None:
        self.name = name
        self.queue = int(behaviour.get("queue", 1000))
        self.prefix = str(behaviour.get("prefix", ""))
        self.counts: Counter[str] = Counter()

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        if body["model"] != self.name:
            return refusal(404, "no such model")
        if self.counts["running"] >= self.queue:
            return refusal(429, "the queue is full")
        if body.get("stream"):
            return StreamingResponse(self.chunks(request, body), media_type="text/event-stream")
        text = "".join([json.loads(chunk[6:])["choices"][0]["delta"]["content"]
                        async for chunk in self.chunks(request, body) if b"content" in chunk])  # fmt: skip
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "length"}
        return JSONResponse({"id": "x", "object": "chat.completion", "created": 1, "model": self.name,
                             "choices": [choice], "pid": os.getpid()})  # fmt: skip

    async def chunks(self, request: Request, body: dict[str, Any]) -> AsyncIterator[bytes]:
        self.counts["running"] += 1
        try:
            for index in range(body.get("tokens", 3)):
                if index == body.get("die_after", -1):
                    os.kill(os.getpid(), signal.SIGKILL)
                content = f"{'' if index else self.prefix}t{index} "
                choice = {"index": 0, "delta": {"content": content}, "finish_reason": None}
                chunk = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": self.name,
                         "choices": [choice]}  # fmt: skip
                yield f"data: {json.dumps(chunk)}\n\n".encode()
                await self.wait_for_gate(request, body)
                await asyncio.sleep(body.get("pause", 0))
            yield b"data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.counts["cancelled"] += 1
            raise
        finally:
            self.counts["running"] -= 1

    async def wait_for_gate(self, request: Request, body: dict[str, Any]) -> None:
        while "gate" in body and not Path(body["gate"]).exists():
            await asyncio.sleep(0.01)
            # Nobody but us looks for a caller who leaves before an answer that is no stream.
            if not body.get("stream") and await request.is_disconnected():
                raise asyncio.CancelledError

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(
            f'vllm:num_requests_running{{model_name="{self.name}"}} {self.counts["running"]}.0\n'
            f'vllm:num_requests_waiting{{model_name="{self.name}"}} 0.0\n'
            f"cancelled {self.counts['cancelled']}\n"
        )

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": self.name, "max_model_len": 512}]})

    async def echo(self, request: Request) -> Response:
        """Of vLLM's many other routes."""
        headers = {name: request.headers.get(name) for name in ("anthropic-version", "authorization")}
        return JSONResponse({"path": request.url.path, "body": await request.json(), "headers": headers})

    async def health(self, request: Request) -> Response:
        return Response()

    def routes(self) -> list[Route]:
        return [
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/health", self.health),
            Route("/{path:path}", self.echo, methods=["POST"]),
        ]


def refusal(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "server_error", "code": None}}, status)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    if sys.argv[1] == "serve":  # vLLM's command line
        parser.add_argument("command")
        parser.add_argument("artifact", type=Path)
    else:
        parser.add_argument("--artifact", type=Path)
        parser.add_argument("--device", choices=["cpu"])
        parser.add_argument("--kernel-backend", choices=["auto"])
    parser.add_argument("--name", "--served-model-name", dest="name")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--ready-fd", type=int)
    parser.add_argument("--drain-s", type=float, default=30.0)
    return parser.parse_known_args()[0]


def main() -> None:
    options = parse_arguments()
    described = options.artifact / "stand_in.json"
    behaviour = json.loads(described.read_text()) if described.exists() else {}
    report = os.fdopen(options.ready_fd, "w", buffering=1) if options.ready_fd is not None else sys.stdout
    report.write(json.dumps({"kind": "loading"}) + "\n")
    if "fail" in behaviour and Path(behaviour.get("fail_when", "/")).exists():
        report.write(json.dumps({"kind": "failed", **behaviour["fail"]}) + "\n")
        sys.exit(1)
    if behaviour.get("crash"):
        sys.exit("the stand-in crashes")
    if options.ready_fd is None:
        known = sorted(name for name in os.environ if name.startswith("VLLM_"))
        sys.stdout.write(
            f"argv {sys.argv[1:]} devices {os.environ.get('CUDA_VISIBLE_DEVICES')} vllm {known}\n"
        )
        sys.stdout.flush()
        subprocess.Popen(["sleep", "600"])  # as vLLM's own engine process
    time.sleep(behaviour.get("load_s", 0))
    while "load_gate" in behaviour and not Path(behaviour["load_gate"]).exists():
        time.sleep(0.05)
    bound = socket.socket(proto=socket.IPPROTO_TCP)  # asyncio sets TCP_NODELAY for it
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((options.host, options.port))
    bound.listen()
    report.write(json.dumps({"kind": "ready", "port": bound.getsockname()[1]}) + "\n")
    app = Starlette(routes=StandIn(options.name, behaviour).routes())
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=max(1, int(options.drain_s)))
    uvicorn.Server(config).run(sockets=[bound])


if __name__ == "__main__":
    main()

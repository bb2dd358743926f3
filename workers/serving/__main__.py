"""`python -m workers.serving`: one artifact behind OpenAI's routes.

It reports to its starter through `--ready-fd`, one JSON line for each message: `loading`, then `ready` with
the port, or `failed` with code, message and remedy.
"""

from __future__ import annotations

import gc

if __name__ == "__main__":
    # Imported modules stay: collecting garbage among them takes a fifth of the start.
    gc.disable()

import argparse
import asyncio
import json
import logging
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from app.core.deployments.context_length import check_length, longest_context
from app.core.errors import NibbleError, OutOfMemory
from app.core.faults.system_faults import STATE_FOLDER, system_fault
from app.core.records.serving_options import ServerOptions
from app.core.telemetry.logs import log_warnings
from kernels.cpu.whole_decoder import NativeDecoder
from workers.devices.selection import select_device
from workers.devices.torch_process import leave
from workers.modeling.native_decoder import native_decoder
from workers.serving.batch import Batch, bytes_per_token, device_of
from workers.serving.engine import Engine, EngineLimits
from workers.serving.http_server import listen, serve
from workers.serving.loading import LoadedModel, LoadRequest, load_model
from workers.serving.routes import create_app
from workers.serving.served_model import ServedModel
from workers.serving.server_metrics import ServerMetrics
from workers.serving.slot_batch import RUNNERS, SlotBatch, runner_of
from workers.serving.slot_cache import SlotLimits
from workers.serving.step_attention import KINDS, use_step_attention
from workers.serving.tokenization import Tokenization

log = logging.getLogger(__name__)

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CACHE_SHARE = 0.25  # of a host's free memory; of a GPU's it is most of what the weights leave
GPU_CACHE_SHARE = 0.8
PREFILL_TOKENS = {"cuda": 2048}
STEPS = ("auto", "rows", *RUNNERS)
STEPS_HELP = (
    "rows: in memory that grows; in memory that stays: eager, as graphs (CUDA's), or traced, which repeats "
    "operators as a graph would, on any device; auto: graphs on a GPU, else rows"
)


class ReadyPipe:
    """Messages to the process that started the server, if it listens."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        if descriptor is not None:
            os.set_inheritable(descriptor, False)

    def send(self, kind: str, **content: Any) -> None:
        if self._descriptor is not None:
            with os.fdopen(self._descriptor, "wb", closefd=False) as pipe:
                pipe.write(json.dumps({"kind": kind, **content}).encode() + b"\n")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m workers.serving", description=__doc__)
    parser.add_argument("--artifact", type=Path, required=True, help="the artifact's folder")
    parser.add_argument(
        "--original", action="store_true", help="the folder is a source of jobs: plain weights are read of it"
    )
    parser.add_argument("--adapter", type=Path, help="with --original: the adapter's folder, merged into it")
    parser.add_argument("--name", required=True, help="what requests call the model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), default="auto", help="of activations; auto: the model's"
    )
    parser.add_argument("--kernel-backend", default="auto")
    parser.add_argument("--ready-fd", type=int, help="where to report")
    parser.add_argument("--threads", type=int, help="of the CPU; all if absent")
    parser.add_argument(
        "--max-model-len", type=int, help="tokens of a prompt and its answer; the model's if absent"
    )
    parser.add_argument("--max-sequences", type=int, default=32, help="that run at the same time")
    parser.add_argument("--max-waiting", type=int, default=256, help="requests beyond those; more get 429")
    parser.add_argument("--cache-tokens", type=int, help="in the cache; a share of free memory if absent")
    parser.add_argument(
        "--cache-share",
        type=float,
        help=f"of the free memory for the cache; if absent {CACHE_SHARE}, of a GPU's {GPU_CACHE_SHARE}",
    )
    parser.add_argument(
        "--max-batch-tokens", type=int, help="of prompts, read between two tokens; 512, on a GPU 2048"
    )
    parser.add_argument("--steps", choices=STEPS, default="auto", help="how steps run: " + STEPS_HELP)
    parser.add_argument(
        "--attention",
        choices=KINDS,
        default="grouped",
        help="of steps in memory that stays; split: our kernel",
    )
    parser.add_argument("--drain-s", type=float, default=30.0, help="for running requests after SIGTERM")
    return parser.parse_args(arguments)


def limits_of(options: argparse.Namespace, loaded: LoadedModel, device: torch.device) -> EngineLimits:
    cells = options.cache_tokens or cache_cells(loaded, device, options.cache_share)
    asked: int | None = options.max_model_len
    if asked is not None:
        check_length(loaded.config, ServerOptions(max_model_len=asked), "transformers")
        if asked > cells:
            raise OutOfMemory(
                f"max_model_len is {asked}, and the memory for the cache holds {cells} tokens",
                code="cache_too_small",
                remedy="ask for fewer tokens, raise cache_share, or use a device with more memory",
            )
    length = asked or min(longest_context(loaded.config), cells)
    return EngineLimits(
        max_model_len=length,
        max_sequences=options.max_sequences,
        max_waiting=options.max_waiting,
        max_cells=min(cells, options.max_sequences * length),
        prefill_tokens=options.max_batch_tokens or PREFILL_TOKENS.get(device.type, 512),
    )


def cache_cells(loaded: LoadedModel, device: torch.device, share: float | None) -> int:
    """Tokens whose keys and values fit into this share of the memory that is free."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] * (share or GPU_CACHE_SHARE)
    else:
        free = psutil.virtual_memory().available * (share or CACHE_SHARE)
    return max(int(free) // bytes_per_token(loaded.model), 1)


def decoder_of(model: PreTrainedModel, positions: int, metrics: ServerMetrics) -> NativeDecoder | None:
    """The decoder that runs all layers in one call, or None; the log and the metrics say which."""
    decoder = native_decoder(model, positions)
    if isinstance(decoder, str):
        log.info("the decoder runs in PyTorch, layer by layer; no native call: %s", decoder)
        metrics.decoder("torch", decoder)
        return None
    log.info("the decoder runs as one native call a step")
    metrics.decoder("native", "")
    return decoder


def batch_of(
    model: PreTrainedModel, limits: EngineLimits, options: argparse.Namespace, metrics: ServerMetrics
) -> Batch:
    """The batch whose steps run as the options say; the log and the metrics say how they do."""
    steps: str = options.steps
    if steps == "auto":
        steps = "graphs" if device_of(model).type == "cuda" else "rows"
    if steps == "rows":
        return Batch(model, limits.max_cells, decoder_of(model, limits.max_model_len, metrics))
    memory = SlotLimits(limits.max_sequences, limits.max_cells, limits.max_model_len)
    attention = use_step_attention(model, options.attention)
    batch = SlotBatch(model, memory, runner_of(model, steps))
    batch.warm_up()
    note = batch.runner.note
    log.info("steps run as %s, attention as %s", f"eager: {note}" if note else steps, attention)
    metrics.decoder("eager" if note else steps, note)
    return batch


def run(options: argparse.Namespace, bound: socket.socket, pipe: ReadyPipe) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    pipe.send("loading", artifact=str(options.artifact), device=options.device)
    device = select_device(options.device)
    request = LoadRequest(
        options.artifact,
        device,
        DTYPES[options.dtype],
        options.kernel_backend,
        is_original=options.original,
        adapter=options.adapter,
    )
    loaded = load_model(request)
    with request.text_folder() as folder:
        tokenization = Tokenization(folder, int(loaded.model.config.get_text_config().vocab_size))
    metrics = ServerMetrics(options.name)
    limits = limits_of(options, loaded, device)
    batch = batch_of(loaded.model, limits, options, metrics)
    engine = Engine(batch, tokenization, limits, metrics, tokenization.end_tokens)
    served = ServedModel(options.name, engine, tokenization, metrics)
    gc.freeze()  # collections then skip these objects and pause the engine less
    gc.enable()

    def ready(port: int) -> None:
        pipe.send(
            "ready", port=port, kernels=loaded.kernels, packed_bytes=loaded.packed_bytes,
            peak_bytes=loaded.peak_bytes, max_model_len=limits.max_model_len,
        )  # fmt: skip

    asyncio.run(serve(create_app(served), served, bound, options.drain_s, ready))
    if engine.failure is not None:
        raise NibbleError(engine.failure, code="engine_failed", remedy="see the server's log")


def main() -> int:
    """0 after an orderly end; 1 if the artifact can't be served."""
    options = parse_arguments(None)
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    log_warnings()
    pipe = ReadyPipe(options.ready_fd)
    try:
        with listen(options.host, options.port) as bound:
            run(options, bound, pipe)
    except NibbleError as error:
        return failed(pipe, error)
    except (MemoryError, torch.OutOfMemoryError) as error:
        remedy = "use a device with more memory"
        return failed(pipe, OutOfMemory(f"{options.device} ran out of memory: {error}", remedy=remedy))
    except Exception as error:  # noqa: BLE001  # the process's boundary: its starter must hear what happened
        traceback.print_exc()
        own = NibbleError(f"{type(error).__name__}: {error}", remedy="see the server's log")
        return failed(pipe, system_fault(error, STATE_FOLDER) or own)
    return 0


def failed(pipe: ReadyPipe, error: NibbleError) -> int:
    pipe.send("failed", code=error.code, message=error.message, remedy=error.remedy)
    sys.stderr.write(f"{error.message}; {error.remedy}\n")
    return 1


if __name__ == "__main__":
    leave(main())

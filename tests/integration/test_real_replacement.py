"""A replacement with real models: gateway, worker, inference servers, 8 streams at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from tests.integration.api_service import Service
from tests.integration.serving_floor import Floor
from tests.integration.test_deployment_changes import STREAMS, load, patch, replaced
from tests.waiting import wait_until

GREEDY = {
    "temperature": 0,
    "max_tokens": 24,
    "messages": [{"role": "user", "content": "The history of the city"}],
}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def other_model(folder: Path) -> Mapping[str, bytes]:
    """The same artifact whose output head prefers other tokens."""
    files = contents(folder)
    for name in (name for name in files if name.endswith(".safetensors")):
        tensors = load_file(folder / name)
        heads = {
            key: torch.roll(tensors[key], 7, 0)
            for key in tensors
            if key.endswith(("lm_head.weight", "embed_tokens.weight"))
        }
        files[name] = save({**tensors, **heads}, {"format": "pt"})
    return files


def test_8_streams_see_no_gap_while_a_model_is_replaced(service: Service, small_artifact: Path) -> None:
    floor = Floor(service)
    old, new = (
        service.publish(service.submit()["id"], files).id
        for files in (contents(small_artifact), other_model(small_artifact))
    )
    with floor.worker(real=True):
        options = {
            "engine": "transformers",
            "max_model_len": 128,
            "max_num_seqs": STREAMS,
            "cache_share": 0.05,
        }
        deployment_id = floor.deploy("tiny", old, **options)
        # Loading torch takes long where several tests share a core.
        wait_until(lambda: floor.view(deployment_id)["state"] == "ready", 120)
        wait_until(lambda: floor.client.get("/v1/models").json()["data"][0]["max_model_len"] == 128)
        with load(floor, "tiny", **GREEDY) as streams:
            before = set(streams.texts)
            patch(floor, deployment_id, artifact=new).raise_for_status()
            wait_until(lambda: replaced(floor, deployment_id, 2, 1), 120)
            end = len(streams.texts)
            wait_until(lambda: streams.failures or len(streams.texts) >= end + 2 * STREAMS, 60)
        assert streams.failures == []
        after = set(streams.texts[-STREAMS:])
        assert len(before) == len(after) == 1
        assert before != after
        assert set(streams.texts) == before | after
        assert floor.chat("tiny", **GREEDY).json()["choices"][0]["message"]["content"] in after
        # What the engine can't take is said, and changes nothing.
        patch(floor, deployment_id, cache_share=0.000001).raise_for_status()
        wait_until(lambda: floor.view(deployment_id)["replacement"]["error"], 120)
        assert floor.view(deployment_id)["replacement"]["error"]["code"] == "cache_too_small"
        assert floor.chat("tiny", **GREEDY).status_code == 200

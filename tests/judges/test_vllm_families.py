"""vLLM's CPU build computes our files of a hybrid and two multimodal families as the report says.

`make judges FAMILIES=1` does so with every family and records what came of it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.judges.families import files_of, judged, outcomes
from tests.judges.family_results import Outcome, recorded

SAMPLE = ("qwen3_5", "qwen3_vl", "gemma3")


@pytest.fixture(scope="module")
def verdicts(
    vllm_environment: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Outcome]]:
    folders = files_of(list(SAMPLE), tmp_path_factory.mktemp("families"))
    assert [folder.name for folder in folders] == list(SAMPLE)
    judged(folders, vllm_environment)
    return {folder.name: outcomes(folder) for folder in folders}


@pytest.mark.parametrize("model_type", SAMPLE)
def test_vllm_computes_our_files_as_the_report_says(
    verdicts: dict[str, dict[str, Outcome]], model_type: str
) -> None:
    expected = recorded().families[model_type]
    assert verdicts[model_type].keys() == expected.keys()
    for name, outcome in verdicts[model_type].items():
        assert outcome.refusal == expected[name].refusal, name
        assert outcome.perplexity_off is None or outcome.near, name
    assert any(
        each.perplexity_off is not None for name, each in verdicts[model_type].items() if name != "original"
    )

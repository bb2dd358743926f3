from __future__ import annotations

import io

import pytest
from rich.console import Console

from app.commands.show import show_estimate, show_report
from app.commands.terminal import human_bytes, human_seconds

REPORT = {
    "version": 1,
    "model": "a/b",
    "original": {"perplexity": 59.3834},
    "candidates": [
        {
            "label": "awq w4 g128", "perplexity": 59.6, "perplexity_ratio": 1.00365, "kl": 0.01234,
            "bytes": {"awq": 3_400_000, "compressed-tensors": 3_500_000}, "bits_per_weight": 4.25,
            "perplexity_ratio_interval": {"standard_error": 0.001, "low": 1.00169, "high": 1.00561},
            "beyond_noise": True, "kl_p99": 0.1357, "top1_agreement": 0.9432,
        },
    ],
    "notes": ["16 evaluation windows leave much noise"],
    "stages": {"calibrating": 9.5, "searching": 1.25},
}  # fmt: skip


def text_of(show: object, document: dict[str, object]) -> str:
    out = io.StringIO()
    assert callable(show)
    show(Console(file=out, width=200), document)
    return out.getvalue()


def test_a_report_shows_every_figure() -> None:
    text = text_of(show_report, REPORT)
    for figure in (
        "59.383", "59.600", "1.00365", "1.00169 to 1.00561", "0.01234", "0.1357", "94.3%", "3.4 MB",
        "3.5 MB", "4.25", "9.50", "10.75", "16 evaluation windows leave much noise",
    ):  # fmt: skip
        assert figure in text
    assert "noise" not in text.replace("leave much noise", "")


def test_a_report_says_where_the_text_cannot_tell_a_model_from_the_original() -> None:
    interval = {"standard_error": 0.001, "low": 0.9995, "high": 1.0012}
    candidate = {"label": "a", "perplexity_ratio_interval": interval, "beyond_noise": False}
    assert "0.99950 to 1.00120, noise" in text_of(show_report, {**REPORT, "candidates": [candidate]})


def test_a_report_of_an_earlier_version_lacks_figures() -> None:
    candidate = {"label": "a", "perplexity": 59.6, "perplexity_ratio": 1.00365, "kl": 0.01234}
    assert "1.00365" in text_of(show_report, {**REPORT, "candidates": [candidate]})


def test_a_report_without_an_evaluation_shows_sizes_and_errors_of_weights() -> None:
    linears = [
        {"linear": "a", "weight_error": 0.0263}, {"linear": "b", "weight_error": 0.0191},
        {"linear": "c", "weight_error": None},
    ]  # fmt: skip
    candidate = {
        "label": "rtn fp8", "perplexity": None, "perplexity_ratio": None, "perplexity_ratio_interval": None,
        "kl": None, "kl_p99": None, "top1_agreement": None, "bits_per_weight": 8.01, "linears": linears,
        "bytes": {"compressed-tensors": 3_500_000}, "layers": [],
    }  # fmt: skip
    document = {
        **REPORT, "evaluation": None, "original": {"perplexity": None, "bytes": 7_000_000},
        "notes": ["a note"],
        "candidates": [candidate, {**candidate, "label": "rtn mxfp4", "linears": []}],
    }  # fmt: skip
    text = text_of(show_report, document)
    for part in ("rtn fp8", "rtn mxfp4", "3.5 MB", "7.0 MB", "8.01", "1.9% to 2.6%", "10.75", "a note"):
        assert part in text
    assert "not evaluated: its quality is unknown" in text
    assert not any(word in text for word in ("perplexity", "KL", "None", "nan"))


def test_a_report_shows_the_scales_of_a_cache() -> None:
    cache = {
        "numbers": "fp8",
        "layers": 6,
        "key_scales": [0.011047, 0.02356],
        "value_scales": [0.009, 0.0121],
    }
    text = text_of(show_report, {**REPORT, "candidates": [{"label": "awq w4 kv fp8", "cache": cache}]})
    scales = "scales of 0.011 to 0.0236 and 0.009 to 0.0121"
    assert f"awq w4 kv fp8: keys and values of 6 layers are fp8, with {scales}" in text


def test_a_report_shows_task_scores_with_their_errors() -> None:
    interval = {"standard_error": 0.01, "low": 0.951, "high": 1.002}
    score = {
        "task": "builtin:agreement", "metric": "acc", "documents": 200, "original": 0.76,
        "original_standard_error": 0.0302, "quantized": 0.745, "quantized_standard_error": None,
        "recovery": 0.98, "recovery_interval": interval,
    }  # fmt: skip
    tasks = {"recovery": 0.9731, "recovery_interval": None, "scores": [score]}
    text = text_of(show_report, {**REPORT, "candidates": [{"label": "awq w3", "tasks": tasks}]})
    for part in (
        "builtin:agreement", "acc", "200", "0.7600 ± 0.0302", "0.7450", "98.0%", "95.1 to 100.2%", "97.3%",
        "mean of each task's first metric",
    ):  # fmt: skip
        assert part in text
    assert "task scores" not in text_of(show_report, REPORT)


def test_a_report_shows_the_tries_and_the_prediction_beside_the_fact() -> None:
    tried = {
        "label": "awq w3 g128 mixed 3.61", "rung": "more bits", "perplexity_ratio": 1.00412, "kl": 0.02,
        "bits_per_weight": 3.61, "seconds": 7.5, "meets_target": True,
    }  # fmt: skip
    prediction = {"seconds": {"calibrating": 8.25}, "ram_bytes": 900_000_000, "vram_bytes": 0}
    used = {"peak_rss_bytes": 1_100_000_000, "peak_vram_bytes": None, "cpu_seconds": {"calibrating": 19.0}}
    document = {**REPORT, "tries": [tried], "prediction": prediction, **used}
    text = text_of(show_report, document)
    verdict = "met, but the 95 % interval of the perplexity ratio reaches 1.01300"
    assert verdict in text_of(show_report, {**REPORT, "tries": [{**tried, "verdict": verdict}]})
    for part in ("awq w3 g128 mixed 3.61", "more bits", "1.00412", "7.50", "met", "predicted", "8.25"):
        assert part in text
    assert "peak memory 1.1 GB, estimated 900.0 MB\nprocessor 2.0 cores on average\n" in text
    assert "GPU memory" not in text
    assert "predicted" not in text_of(show_report, REPORT)


def test_the_report_of_a_job_without_a_result_shows_what_it_did() -> None:
    document: dict[str, object] = {
        "complete": False, "state": "failed", "model": "a/b", "recipes": ["awq w4 g64"], "attempts": 2,
        "error": {"code": "child_crashed", "message": "it ended with exit code 3", "remedy": "retry"},
        "stage": "searching", "finished_layers": 7, "layers": 30,
        "stages": {"calibrating": 9.5, "searching": 1.25},
        "prediction": {"seconds": {"calibrating": 8.25}}, "notes": ["lm_head keeps its precision"],
        "output": "the last words",
    }  # fmt: skip
    text = text_of(show_report, document)
    for part in (
        "a/b, awq w4 g64: failed", "exit code 3 [child_crashed]\nremedy retry\n",
        "it ended in the stage searching, 7 of 30 layers finished, attempt 2",
        "9.50", "8.25", "10.75", "lm_head keeps its precision", "the last words",
    ):  # fmt: skip
        assert part in text
    waited: dict[str, object] = {"complete": False, "state": "cancelled", "attempts": 0, "waited_s": 60}
    assert "no worker started it within 1 min 00 s" in text_of(show_report, waited)


def test_an_estimate_shows_figures_and_notes() -> None:
    document = {
        "time_s": 90.0,
        "ram_bytes": 2_000_000,
        "layers": [{}],
        "notes": ["lm_head keeps its precision"],
    }
    text = text_of(show_estimate, document)
    for part in ("1 min 30 s", "2.0 MB", "lm_head keeps its precision"):
        assert part in text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2.5e9, "2.5 GB"), (3e12, "3.0 TB")]
)
def test_human_bytes(size: float, text: str) -> None:
    assert human_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (1.25, "1.2 s"), (75, "1 min 15 s"), (7260, "2 h 01 min")]
)
def test_human_seconds(seconds: float | None, text: str) -> None:
    assert human_seconds(seconds) == text

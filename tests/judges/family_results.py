"""What vLLM said of our files of each family, recorded in family_results.json, and its table.

make judges FAMILIES=1
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from pydantic import BaseModel

from tests.judges.results import GUIDE, upward

RECORD = Path(__file__).with_name("family_results.json")
MARKERS = (
    "<!-- families judged by vLLM: made by make judges FAMILIES=1 -->\n",
    "<!-- end of the families -->\n",
)
QUANTIZED, DENSE, TWO_SCHEMES = "quantized", "quantized but for experts", "of two schemes"
TOLERANCE = 0.01  # vLLM multiplies in half precision, the report's figures are of float32
FAMILIES = (
    "qwen3_5", "qwen3_5_moe", "qwen3_next", "qwen3_vl", "qwen3_vl_moe", "qwen2_vl", "qwen2_5_vl", "gemma",
    "gemma3", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "glm4", "glm4_moe", "glm_moe_dsa",
    "gpt_oss", "mistral3", "ministral3", "mistral4", "minimax_m2", "deepseek_v32", "kimi_linear", "granite",
    "granitemoehybrid", "olmo2", "olmo3", "olmoe", "smollm3", "cohere2", "lfm2", "lfm2_moe", "seed_oss",
    "ernie4_5", "ernie4_5_moe", "hunyuan_v1_dense", "hunyuan_v1_moe", "exaone4", "nemotron_h", "llama4",
    "llama4_text", "falcon_h1", "phimoe", "starcoder2", "stablelm", "bloom", "qwen2", "qwen3", "qwen3_moe",
    "mixtral", "deepseek_v2", "deepseek_v3", "phi3", "gemma2", "gemma3_text", "cohere", "opt", "gpt_neox",
    "llama", "mistral",
)  # fmt: skip


class Outcome(BaseModel, frozen=True, extra="forbid"):
    """vLLM's reason for refusing files, or how far it is from what the report says of them."""

    refusal: str | None = None
    dtype: str | None = None  # in which vLLM computed
    perplexity_off: float | None = None  # relative to the report's figure
    kl_off: float | None = None

    @property
    def near(self) -> bool:
        """Whether what vLLM computed is the report's figure, in perplexity or in KL.

        A perplexity is that of 380 tokens, which a random model may give any chance; KL is of all that it
        could have said.
        """
        return any(off is not None and off <= TOLERANCE for off in (self.perplexity_off, self.kl_off))


class Record(BaseModel, frozen=True, extra="forbid"):
    version: str  # of vLLM
    families: dict[str, dict[str, Outcome]]  # by model type, and by which of its files


def reason(error: str) -> str:
    """The words of vLLM's error that say why: of several kernels, of that for a CPU; of a log, its end."""
    words = " ".join(error.split())
    kernel = re.search(r"CPUWNA16LinearKernel cannot implement due to: ([^\n]*)", error)
    if kernel is not None:
        return kernel[1].strip()
    if words.startswith("the process ended"):
        return words[:27] + " … " + words[-150:]
    return words.removeprefix("NotImplementedError: ")[:220]


def recorded() -> Record:
    if not RECORD.exists():
        return Record(version="", families={})
    return Record.model_validate_json(RECORD.read_text())


def write_record(record: Record) -> None:
    """Write the record and the guide's table."""
    RECORD.write_text(json.dumps(record.model_dump(exclude_defaults=True), indent=1) + "\n")
    before, _, rest = GUIDE.read_text().partition(MARKERS[0])
    after = rest.partition(MARKERS[1])[2]
    GUIDE.write_text(before + MARKERS[0] + table(record) + MARKERS[1] + after)


def guide_table() -> str:
    return GUIDE.read_text().partition(MARKERS[0])[2].partition(MARKERS[1])[0]


def table(record: Record) -> str:
    """A row for each family."""
    lines = [
        f"| family | the original in vLLM {record.version} on a CPU | our files | our files of two schemes |",
        "|---|---|---|---|",
    ]
    for model_type, outcomes in record.families.items():
        verdicts = {name: verdict(outcome) for name, outcome in outcomes.items()}
        ours, dense = verdicts.get(QUANTIZED, "not made"), verdicts.get(DENSE)
        if dense not in (None, ours):
            ours = f"{ours}; without experts {dense}"
        two = verdicts.get(TWO_SCHEMES, "not tried")
        two = "the same" if two in (ours, verdicts.get(QUANTIZED), dense) else two
        lines.append(f"| `{model_type}` | {verdicts['original']} | {ours} | {two} |")
    return "\n".join(lines) + "\n"


def verdict(outcome: Outcome) -> str:
    if outcome.perplexity_off is None:
        return f"`{(outcome.refusal or '').replace('|', '/').replace('`', '')}`"
    kl = f", KL within {upward(outcome.kl_off)}" if outcome.kl_off is not None else ""
    return f"perplexity within {upward(outcome.perplexity_off)}{kl} ({outcome.dtype})"

"""The GPTQ layout, first version: qweight packed down the input channels, zero points less one.

g_idx names the group of each input channel; scales are always float16. Source: GPTQModel
`nn_modules/qlinear`, where the first version is the checkpoint format `gptq`.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from app.core.formats.file_format import FileFormat, FormatRefusal, ModuleSchemes, Scheme, StoredTensor, words
from app.core.formats.targets import compact_patterns, expert_set, fused_names

RENAMED = ("gpt_neox", "mixtral", "phi3")  # transformers' modules have other names than the checkpoints


class GptqFormat(FileFormat):
    """Zero points are stored less one, so 0 has no place; vLLM reads symmetric files only."""

    suffixes = ("qweight", "qzeros", "scales", "g_idx")
    multiples = (32, 32)
    scale_dtype = "F16"
    transformers_needs = ("gptqmodel>=1.4.3", "optimum>=1.24.0")
    config_file = "quantize_config.json"  # GPTQ's own place for what is in config.json too

    def tensors(
        self, out_features: int, in_features: int, scheme: Scheme, dtype: str
    ) -> dict[str, StoredTensor]:
        groups = scheme.groups(in_features)
        return {
            "qweight": StoredTensor((words(in_features, scheme.bits), out_features), "I32"),
            "qzeros": StoredTensor((groups, words(out_features, scheme.bits)), "I32"),
            "scales": StoredTensor((groups, out_features), "F16"),
            "g_idx": StoredTensor((in_features,), "I32"),
        }

    def entry(self, modules: ModuleSchemes) -> dict[str, Any]:
        """The scheme of most linears, and `dynamic` for the others."""
        dynamic = dynamic_rules(modules)
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": modules.common.bits,
            "group_size": modules.common.group_size,
            "desc_act": False,
            "sym": True,
            "lm_head": modules.head is not None,
            "pack_dtype": "int32",
            **({"dynamic": dynamic} if dynamic else {}),
            "meta": {"quantizer": [f"nibble:{version('nibble')}"]},
        }

    def refusal(self, schemes: set[Scheme]) -> FormatRefusal | None:
        if (refusal := super().refusal(schemes)) is not None:
            return refusal
        if not all(scheme.symmetric for scheme in schemes):
            return FormatRefusal(why="holds symmetric grids only", nearest="symmetric true")
        return None

    def loader_notes(self, modules: ModuleSchemes, model_type: str) -> Iterator[str]:
        yield from self.head_notes(modules, "transformers 5.24 with optimum")
        if model_type in RENAMED:
            yield f"GPTQModel does not find all weights of {model_type} by their names in files"
        if modules.narrow:
            yield (
                f"GPTQModel opens gptq files of {modules.narrow} bits; vLLM 0.33 and SGLang 0.5.23 take 4 "
                "and 8 bits"
            )
        if modules.of_experts - {modules.common}:
            yield (
                "SGLang 0.5.23 reads all experts of gptq files by the scheme of most linears; let "
                "`overrides` and `ignore` match no experts if it has to"
            )


def dynamic_rules(modules: ModuleSchemes) -> dict[str, dict[str, int]]:
    """GPTQModel's rules by name: `-:` keeps a module's precision, `+:` gives it another scheme."""
    schemes: dict[str, Scheme | None] = dict(modules.linears)
    schemes |= dict.fromkeys((name for name in modules.full_precision if name != "lm_head"), None)
    # The whole has the scheme of its parts: sets that servers fuse share one.
    schemes |= {whole: scheme for name, scheme in schemes.items() for whole in wholes(name)}
    base = modules.common
    rules: dict[str, dict[str, int]] = {f"-:{tower}": {} for tower in modules.tower_patterns}
    for scheme in dict.fromkeys(schemes.values()):
        if scheme == base:
            continue
        for pattern in compact_patterns([name for name in schemes if schemes[name] == scheme], schemes):
            if scheme is None:
                rules["-:" + pattern] = {}
            else:
                rules["+:" + pattern] = {"bits": scheme.bits, "group_size": scheme.group_size}
    return rules


def wholes(name: str) -> tuple[str, ...]:
    """The names by which vLLM asks for what the linear is a part of: the experts of a layer are one."""
    experts = expert_set(name)
    return fused_names(name) if experts is None else (experts,)

"""Which loaders open a candidate's files, where not all do.

Read in the sources of vLLM 0.33.0 (`auto_gptq.py`, `compressed_tensors_wNa16.py` and the kernels that it
chooses from), SGLang 0.5.23 (`compressed_tensors_wNa16.py`, `gptq.py`) and transformers 5.24.0 (`quantizers`,
`integrations`). compressed-tensors 0.17, 0.18 and 0.20 and GPTQModel 7.7.0 were run.
"""

from __future__ import annotations

from collections.abc import Iterator

from app.core.planning.architectures import Architecture
from app.core.planning.format_limits import Scheme, common_scheme
from app.core.planning.linear_plan import LinearPlan
from app.core.records.specs import FormatName

RENAMED = ("gpt_neox", "mixtral", "phi3")  # transformers' modules have other names than the checkpoints
EVERYWHERE = (4, 8)  # bits that all servers read


def loader_notes(
    name: FormatName, linears: tuple[LinearPlan, ...], architecture: Architecture
) -> Iterator[str]:
    """What of the format's files not every loader opens."""
    schemes = {linear.scheme for linear in linears if linear.scheme is not None}
    experts = {linear.scheme for linear in linears if ".experts." in linear.name}
    narrow = " and ".join(map(str, sorted({scheme.bits for scheme in schemes} - set(EVERYWHERE))))
    if name == "compressed-tensors":
        yield from compressed_tensors_notes(schemes, experts, narrow)
    elif name == "gptq":
        yield from gptq_notes(linears, experts, narrow, architecture)
    elif experts:
        yield "transformers 5.24 reads awq files of linears alone, not of experts"


def compressed_tensors_notes(schemes: set[Scheme], experts: set[Scheme | None], narrow: str) -> Iterator[str]:
    unopened = "transformers cannot open compressed-tensors files"
    if narrow:
        yield (
            f"vLLM 0.33 runs compressed-tensors files of {narrow} bits on NVIDIA GPUs alone; SGLang 0.5.23 "
            "takes 4 and 8 bits alone"
        )
    if any(scheme.bits == 3 for scheme in schemes):
        yield "transformers opens 3 bits with compressed-tensors 0.18 or later; vLLM 0.33 installs 0.17"
    asymmetric = not all(scheme.symmetric for scheme in schemes)
    if asymmetric and experts - {None}:
        yield f"{unopened} of asymmetric experts; set symmetric to true if it has to"
    elif len(experts) > 1 or None in experts:
        yield (
            f"{unopened} whose experts have several schemes or keep their precision; let `overrides` and "
            "`ignore` match no experts if it has to"
        )
    if asymmetric and len(schemes) > 1:
        yield (
            f"{unopened} of several asymmetric schemes; leave out the overrides or set symmetric to true "
            "if it has to"
        )


def gptq_notes(
    linears: tuple[LinearPlan, ...], experts: set[Scheme | None], narrow: str, architecture: Architecture
) -> Iterator[str]:
    if architecture.model_type in RENAMED:
        yield f"GPTQModel does not find all weights of {architecture.model_type} by their names in files"
    if narrow:
        yield f"GPTQModel opens gptq files of {narrow} bits; vLLM 0.33 and SGLang 0.5.23 take 4 and 8 bits"
    if experts - {common_scheme(linear.scheme for linear in linears)}:
        yield (
            "SGLang 0.5.23 reads all experts of gptq files by the scheme of most linears; let `overrides` "
            "and `ignore` match no experts if it has to"
        )

"""Experts as the linears that checkpoints hold.

transformers fuses a block's experts into 3-D tensors. One linear per projection and expert has the names of
the checkpoint, can be observed on its own, and sees only the tokens that are routed to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from app.core.planning.family import Experts
from app.core.records.specs import Frozen


class ExpertsForm(Frozen):
    """How a module of transformers holds its experts.

    Rows of gate and up may be `interleaved`, matrices `transposed`. Where `sorted_input`, the module is
    called with all tokens for the first expert, then all for the second, …, already weighted. Where
    `identities`, choices beyond the last expert pass the token on.
    """

    count: int
    hidden: int
    inner: int
    gated: bool
    transposed: bool
    interleaved: bool
    biased: bool
    sorted_input: bool
    identities: bool

    def shapes(self, names: Experts) -> Iterator[tuple[str, int, int]]:
        """Name, in_features and out_features of each linear of an expert."""
        if self.gated:
            yield names.gate, self.hidden, self.inner
        yield names.up, self.hidden, self.inner
        yield names.down, self.inner, self.hidden


def experts_of(module: nn.Module) -> ExpertsForm | None:
    """The form of fused experts; None for other modules, and for experts of a form that is not known here."""
    parameters = dict(module.named_parameters(recurse=False))
    gated = "gate_up_proj" in parameters
    first, down = parameters.get("gate_up_proj" if gated else "up_proj"), parameters.get("down_proj")
    arguments = len(inspect.signature(module.forward).parameters)
    if first is None or down is None or first.dim() != 3 or down.dim() != 3 or arguments not in (1, 3):
        return None
    if "gate_proj" in parameters or not (hasattr(module, "act_fn") or hasattr(module, "_apply_gate")):
        return None
    count, hidden, inner = down.shape
    outer = 2 if gated else 1
    transposed = getattr(module, "is_transposed", tuple(first.shape[1:]) != (outer * inner, hidden))
    if transposed:
        hidden, inner = inner, hidden
    rows, columns = outer * inner, hidden
    identities = hasattr(module, "identity_expert")
    if tuple(first.shape[1:]) != ((columns, rows) if transposed else (rows, columns)):
        return None
    if first.shape[0] != count and not identities:
        return None
    return ExpertsForm(
        count=count, hidden=hidden, inner=inner, gated=gated, transposed=transposed,
        interleaved=not getattr(module, "is_concatenated", True),
        biased="down_proj_bias" in parameters, sorted_input=arguments == 1, identities=identities,
    )  # fmt: skip


class Expert(nn.Module):
    """down(activation(gate(x), up(x))) or down(activation(up(x))), under the checkpoint's names.

    The activation is that of the fused module, with its clamps and constants.
    """

    def __init__(self, names: Experts, form: ExpertsForm, fused: nn.Module) -> None:
        super().__init__()
        self.names, self.form = names, form
        self.fused: tuple[Any] = (fused,)  # in a tuple: not a submodule
        for name, columns, rows in form.shapes(names):
            self.add_module(name, nn.Linear(columns, rows, bias=form.biased))

    def forward(self, x: Tensor) -> Tensor:
        up = getattr(self, self.names.up)(x)
        inner = self.gated(getattr(self, self.names.gate)(x), up) if self.form.gated else self.activation(up)
        output: Tensor = getattr(self, self.names.down)(inner)
        return output

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        function: Callable[[Tensor], Tensor] = self.fused[0].act_fn
        return function

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        apply: Callable[[Tensor], Tensor] | None = getattr(self.fused[0], "_apply_gate", None)
        if apply is None:
            return self.activation(gate) * up
        if self.form.interleaved:
            return apply(torch.stack((gate, up), dim=-1).flatten(-2))
        return apply(torch.cat((gate, up), dim=-1))


class SplitExperts(nn.Module):
    """Replaces transformers' fused experts; computes the same sum over the experts of each token."""

    shows_all = False  # the experts every token while statistics are collected
    observed = False  # statistics are collected now

    def __init__(self, names: Experts, form: ExpertsForm, fused: nn.Module) -> None:
        super().__init__()
        self.form = form
        self.routed = [0] * form.count  # tokens sent to each expert
        for number in range(form.count):
            self.add_module(str(number), Expert(names, form, fused))
        norm = getattr(fused, "post_expert_norm", None)
        if norm is not None:
            self.post_expert_norm = norm

    def expert(self, number: int, states: Tensor) -> Tensor:
        """(tokens, hidden) through one expert, and its norm where it has one."""
        output: Tensor = getattr(self, str(number))(states)
        return self.post_expert_norm(output) if hasattr(self, "post_expert_norm") else output

    def forward(self, states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """states: (tokens, hidden); chosen and weights: (tokens, experts per token)."""
        output = torch.zeros_like(states)
        for number in range(self.form.count):
            token, slot = torch.where(chosen == number)
            self.routed[number] += token.numel()
            if self.observed and self.shows_all:
                result = self.expert(number, states)[token]
            elif token.numel():
                result = self.expert(number, states[token])
            else:
                continue
            share = result * weights[token, slot, None]
            output.index_add_(0, token, share.to(output.dtype))
        if self.form.identities:
            passed = (weights * (chosen >= self.form.count)).sum(-1, keepdim=True)
            output += (states * passed).to(output.dtype)
        return output


class SortedExperts(SplitExperts):
    """Experts that are called with every token for each of them: those not routed there are zeros.

    Nothing shows them further tokens: the router's weights are part of their input.
    """

    def forward(self, states: Tensor) -> Tensor:  # type: ignore[override] # transformers' other call
        """states: (experts * tokens, hidden)."""
        output = torch.zeros_like(states).view(self.form.count, -1, self.form.hidden)
        for number, routed in enumerate(states.view_as(output)):
            (token,) = torch.where(routed.any(-1))
            self.routed[number] += token.numel()
            if token.numel():
                output[number, token] = self.expert(number, routed[token])
        return output.view_as(states)


def show_all_tokens(model: nn.Module) -> None:
    """Show the experts every token while statistics are collected."""
    for module in model.modules():
        if isinstance(module, SplitExperts):
            module.shows_all = not module.form.sorted_input


def split_experts(layer: nn.Module, names: Experts) -> None:
    """Replace the fused experts of a decoder layer, if it has any: with their weights, unless on meta.

    Raises ValueError for experts of an unknown form.
    """
    *path, last = names.module.split(".")
    block: nn.Module | None = layer
    for attribute in path:
        block = getattr(block, attribute, None)
    fused = getattr(block, last, None)
    if not isinstance(fused, nn.Module) or isinstance(fused, SplitExperts):
        return
    form = experts_of(fused)
    if form is None:
        raise ValueError(f"{names.module} ({type(fused).__name__}) holds experts in a form that is not known")
    with torch.device("meta"):
        split = (SortedExperts if form.sorted_input else SplitExperts)(names, form, fused)
    if fused.down_proj.device.type != "meta":
        split.load_state_dict(dict(split_weights(fused, form, names)), strict=False, assign=True)
    for name, _ in list(fused.named_parameters(recurse=False)):
        setattr(fused, name, None)  # only its activation is used from here on
    layer.set_submodule(names.module, split.requires_grad_(requires_grad=False).eval())


def split_weights(fused: nn.Module, form: ExpertsForm, names: Experts) -> Iterator[tuple[str, Tensor]]:
    """Weights and biases of each expert's linears, by name within the experts."""
    first = "gate_up_proj" if form.gated else "up_proj"
    for number in range(form.count):
        for kind, suffix in (("weight", ""), ("bias", "_bias"))[: 1 + form.biased]:
            outer, down = (getattr(fused, name + suffix)[number].detach() for name in (first, "down_proj"))
            if form.transposed and kind == "weight":
                outer, down = outer.T, down.T
            values = {names.up: outer, names.down: down}
            if form.gated:
                gate, up = (outer[::2], outer[1::2]) if form.interleaved else outer.chunk(2)
                values |= {names.gate: gate, names.up: up}
            for name, value in values.items():
                yield f"{number}.{name}.{kind}", value.contiguous()

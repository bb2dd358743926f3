"""The model's side of the engine: prompts are read in chunks, rows advance together."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from kernels.cpu.whole_decoder import NativeDecoder, TokenPlaces
from workers.serving.requests import Sequence
from workers.serving.row_cache import PromptCache, RowCache, has_states, prompt_cache

PIECES = (9, 2, 5, 1, 3)  # of a trial prompt
PIECES_DIFFER = 0.05  # relative, in half precision


class Prefill:
    """A prompt on its way into the cache, for all the sequences that start with it."""

    def __init__(self, sequences: list[Sequence]) -> None:
        self.sequences = sequences
        self.tokens = list(sequences[0].tokens)
        self.done = 0
        self.cache: DynamicCache | PromptCache | None = None  # until its first tokens are read

    @property
    def left(self) -> int:
        return len(self.tokens) - self.done


class Batch:
    """The sequences that run, one row of the cache each."""

    def __init__(self, model: PreTrainedModel, max_cells: int, native: NativeDecoder | None = None) -> None:
        self.model, self.native = model, native
        self.device = device_of(model)
        self.cache = RowCache(max_cells)
        self._cache_argument = cache_argument(model)
        self._in_pieces = native is not None or reads_in_pieces(model)
        self.sequences: list[Sequence] = []

    def read(self, prefill: Prefill, limit: int) -> Tensor | None:
        """Up to `limit` tokens of a prompt; after the last one, float32 logits (1, vocabulary)."""
        limit = limit if self._in_pieces else len(prefill.tokens)
        tokens = prefill.tokens[prefill.done : prefill.done + limit]
        if self.native is not None and self.native.reads_prompts:
            return self.read_natively(self.native, prefill, tokens)
        if prefill.cache is None:
            prefill.cache = prompt_cache(self.model)
        positions = torch.arange(prefill.done, prefill.done + len(tokens), device=self.device)[None]
        logits = self.forward([tokens], positions, prefill.cache, None)
        prefill.done += len(tokens)
        return None if prefill.left else logits

    def read_natively(self, native: NativeDecoder, prefill: Prefill, tokens: list[int]) -> Tensor | None:
        if prefill.cache is None:
            config = self.model.config
            shape = (1, native.kv_heads, len(prefill.tokens), native.head_size)
            prefill.cache = PromptCache(shape, config.num_hidden_layers, self.model.dtype)
        count, columns = len(tokens), range(prefill.done, prefill.done + len(tokens))
        prefill.done += count
        asked = [] if prefill.left else [count - 1]
        places = TokenPlaces(tokens, columns, [0] * count, columns, [0] * count, asked)
        logits = native(places, *prefill.cache.tensors())
        return None if prefill.left else logits

    def join(self, prefill: Prefill) -> None:
        """The sequences of a prompt that was read get a row each."""
        assert prefill.cache is not None
        for sequence in prefill.sequences:
            self.cache.join(prefill.cache, prefill.done)
            self.sequences.append(sequence)

    def leave(self, row: int) -> Sequence:
        """Remove a row; the last one takes its place."""
        self.cache.leave(row)
        sequence = self.sequences[row]
        self.sequences[row] = self.sequences[-1]
        self.sequences.pop()
        return sequence

    def advance(self) -> Tensor:
        """Run the last token of every row: float32 logits (rows, vocabulary)."""
        self.cache.reserve(len(self.sequences), self.cache.window.width)
        if self.native is not None:
            logits = self.native(self.places(), *self.cache.tensors())
            self.cache.advance()
            return logits
        positions = torch.tensor([[length] for length in self.cache.lengths], device=self.device)
        mask = self.cache.mask(self.device)
        logits = self.forward([[s.tokens[-1]] for s in self.sequences], positions, self.cache, mask)
        self.cache.advance()
        return logits

    def places(self) -> TokenPlaces:
        """The last token of every row, and its place in the cache."""
        lengths, end = self.cache.lengths, self.cache.window.end
        rows = range(len(self.sequences))
        tokens = [sequence.tokens[-1] for sequence in self.sequences]
        return TokenPlaces(tokens, lengths, rows, [end] * len(rows), [end - n for n in lengths], rows)

    def forward(
        self, tokens: list[list[int]], positions: Tensor, cache: DynamicCache | RowCache, mask: Tensor | None
    ) -> Tensor:
        """Logits after the last column of (rows, tokens)."""
        output = self.model(
            input_ids=torch.tensor(tokens, device=self.device),
            position_ids=positions,
            attention_mask=mask,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: cache},
        )
        logits: Tensor = output.logits[:, -1]
        return logits.float()


def cache_argument(model: PreTrainedModel) -> str:
    """The name of the argument that takes a cache: transformers 5.24 renamed it in most classes."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def device_of(model: PreTrainedModel) -> torch.device:
    """Where its weights are; towers that no text reaches have none."""
    weights: dict[str, Tensor] = model.state_dict()
    return next(each.device for each in weights.values() if each.device.type != "meta")


@torch.no_grad()
def reads_in_pieces(model: PreTrainedModel) -> bool:
    """Whether a prompt may be read piece by piece.

    With keys and values alone it may. Recurrences of some models of transformers 5.24 (jamba) start anew with
    a piece that is shorter than their convolution: theirs are tried, and prompts read whole if it matters.
    """
    if not has_states(prompt_cache(model)):
        return True
    tokens = torch.arange(1, 1 + sum(PIECES), device=device_of(model))[None]
    ends = []
    for pieces in ((sum(PIECES),), PIECES):
        cache, done = prompt_cache(model), 0
        for size in pieces:
            positions = torch.arange(done, done + size, device=device_of(model))[None]
            output = model(
                input_ids=tokens[:, done : done + size], position_ids=positions, use_cache=True,
                **{cache_argument(model): cache},
            )  # fmt: skip
            done += size
        ends.append(output.logits[:, -1].float())
    return bool((ends[0] - ends[1]).norm() <= PIECES_DIFFER * ends[0].norm())


@torch.no_grad()
def bytes_per_token(model: PreTrainedModel) -> int:
    """Of keys and values, as the model itself keeps them.

    Raises ModelRefused for a model that keeps what rows can't hold.
    """
    cache, tokens = prompt_cache(model), torch.zeros(1, 2, dtype=torch.long, device=device_of(model))
    model(input_ids=tokens, use_cache=True, logits_to_keep=1, **{cache_argument(model): cache})
    pairs = ((getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers)
    held = [each for pair in pairs for each in pair if each is not None]
    return max(1, int(sum(each.nbytes for each in held)) // tokens.numel())

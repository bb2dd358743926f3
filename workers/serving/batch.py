"""The model's side of the engine: prompts are read in chunks, rows advance together."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from kernels.cpu.whole_decoder import NativeDecoder, TokenPlaces
from workers.serving.prompt_scores import scores_of, tokens_of_a_pass
from workers.serving.requests import PromptScore, Sequence
from workers.serving.row_cache import PromptCache, RowCache, has_states, prompt_cache
from workers.serving.sampling import Drawn

PIECES = (9, 2, 5, 1, 3)  # of a trial prompt
PIECES_DIFFER = 0.05  # relative, in half precision


class Prefill:
    """A prompt on its way into the cache, for all the sequences that start with it."""

    def __init__(self, sequences: list[Sequence]) -> None:
        self.sequences = sequences
        self.tokens = list(sequences[0].tokens)
        self.done = 0
        self.cache: DynamicCache | PromptCache | None = None  # until its first tokens are read
        self.scores: list[PromptScore] = []
        first = sequences[0]
        # A sequence that comes back to be read again has its scores already.
        self.top = None if first.generated else first.generation.prompt_logprobs

    @property
    def scored(self) -> bool:
        return self.top is not None

    @property
    def only_scored(self) -> bool:
        """Whether no second token follows it, so that nothing reads its cache."""
        return self.scored and not self.done and self.sequences[0].stopping.max_tokens <= 1

    def score(self, logits: Tensor) -> None:
        """Scores the tokens that follow those just read, by their float32 logits (tokens, vocabulary)."""
        start = len(self.scores) + 1  # the first token follows nothing
        tokens = self.tokens[start : start + len(logits)]
        self.scores += scores_of(logits[: len(tokens)], tokens, self.top or 0)

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
        self._logit_rows = tokens_of_a_pass(model.config.get_text_config().vocab_size)
        self.sequences: list[Sequence] = []

    def read(self, prefill: Prefill, limit: int) -> Tensor | None:
        """Up to `limit` tokens of a prompt; after the last one, float32 logits (1, vocabulary)."""
        if not self._in_pieces:
            limit = len(prefill.tokens)
        elif prefill.scored:
            limit = min(limit, self._logit_rows)
        tokens = prefill.tokens[prefill.done : prefill.done + limit]
        if self.native is not None and self.native.reads_prompts:
            logits = self.read_natively(self.native, prefill, tokens)
        else:
            logits = self.read_in_torch(prefill, tokens)
        if prefill.scored:
            prefill.score(logits)
        prefill.done += len(tokens)
        return None if prefill.left else logits[-1:]

    def read_in_torch(self, prefill: Prefill, tokens: list[int]) -> Tensor:
        """float32 logits (tokens, vocabulary) where they are scored, else those after the last token."""
        if prefill.cache is None:
            prefill.cache = prompt_cache(self.model)
        positions = torch.arange(prefill.done, prefill.done + len(tokens), device=self.device)[None]
        whole = len(tokens) > self._logit_rows
        if prefill.scored and whole:
            self.score_whole(prefill)
        asked = len(tokens) if prefill.scored and not whole else 1
        return self.forward([tokens], positions, prefill.cache, None, asked)[0]

    def score_whole(self, prefill: Prefill) -> None:
        """Scores a prompt that is read whole and whose logits don't fit at once, in a pass for each slice."""
        tokens = torch.tensor([prefill.tokens], device=self.device)
        for rows in torch.split(torch.arange(len(prefill.tokens) - 1, device=self.device), self._logit_rows):
            logits = self.model(input_ids=tokens, use_cache=False, logits_to_keep=rows).logits
            prefill.score(logits[0].float())

    def only_scored(self, prefills: list[Prefill], limit: int) -> list[Prefill]:
        """Those at the head of `prefills` that one pass of up to `limit` tokens can score together."""
        chosen: list[Prefill] = []
        width = 0
        for prefill in prefills:
            width = max(width, len(prefill.tokens))
            fits = width * (len(chosen) + 1) <= min(limit, self._logit_rows)
            if not (prefill.only_scored and fits):
                break
            chosen.append(prefill)
        return chosen

    def score_together(self, prefills: list[Prefill]) -> list[Tensor]:
        """Float32 logits (1, vocabulary) after each prompt; nothing is cached.

        They are padded on the right, where no token of theirs looks.
        """
        rows = [torch.tensor(prefill.tokens) for prefill in prefills]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
        logits = self.model(input_ids=tokens, use_cache=False).logits
        ends = []
        for row, prefill in enumerate(prefills):
            own = logits[row, : len(prefill.tokens)].float()
            prefill.score(own)
            prefill.done = len(prefill.tokens)
            ends.append(own[-1:])
        return ends

    def read_natively(self, native: NativeDecoder, prefill: Prefill, tokens: list[int]) -> Tensor:
        """The same in the native call; of a piece that is not the last, none where they are not scored."""
        if prefill.cache is None:
            config = self.model.config
            shape = (1, native.kv_heads, len(prefill.tokens), native.head_size)
            prefill.cache = PromptCache(shape, config.num_hidden_layers, self.model.dtype)
        count, columns = len(tokens), range(prefill.done, prefill.done + len(tokens))
        last = prefill.left == count
        asked = range(count) if prefill.scored else [count - 1] if last else []
        places = TokenPlaces(tokens, columns, [0] * count, columns, [0] * count, asked)
        return native(places, *prefill.cache.tensors())

    def join(self, prefill: Prefill) -> None:
        """The sequences of a prompt that was read, and that go on, get a row each."""
        for sequence in prefill.sequences:
            if sequence.finished:
                continue
            assert prefill.cache is not None
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
        logits = self.forward([[s.tokens[-1]] for s in self.sequences], positions, self.cache, mask)[:, -1]
        self.cache.advance()
        return logits

    def draw_ahead(self, logits: Tensor) -> Drawn | None:
        """The tokens of all rows, where the next step can start before the host has seen them; else None."""
        return None

    def places(self) -> TokenPlaces:
        """The last token of every row, and its place in the cache."""
        lengths, end = self.cache.lengths, self.cache.window.end
        rows = range(len(self.sequences))
        tokens = [sequence.tokens[-1] for sequence in self.sequences]
        return TokenPlaces(tokens, lengths, rows, [end] * len(rows), [end - n for n in lengths], rows)

    def forward(
        self,
        tokens: list[list[int]],
        positions: Tensor,
        cache: DynamicCache | RowCache,
        mask: Tensor | None,
        asked: int = 1,
    ) -> Tensor:
        """Float32 logits (rows, asked, vocabulary) after the last columns of (rows, tokens)."""
        output = self.model(
            input_ids=torch.tensor(tokens, device=self.device),
            position_ids=positions,
            attention_mask=mask,
            use_cache=True,
            logits_to_keep=asked,
            **{self._cache_argument: cache},
        )
        logits: Tensor = output.logits[:, -asked:]
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

"""Log-probabilities of a prompt's own tokens, from the logits of the pass that reads it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.serving.requests import Alternative, PromptScore

# The logits of a pass that is scored stay below this: a prompt of 8,000 tokens and a vocabulary of 150,000
# would take 5 GB at once.
MAX_LOGITS_BYTES = 128 * 1024**2
FLOAT_BYTES = 4


def tokens_of_a_pass(vocabulary: int) -> int:
    """How many tokens' logits may be in memory at the same time."""
    return max(1, MAX_LOGITS_BYTES // (FLOAT_BYTES * vocabulary))


def scores_of(logits: Tensor, tokens: Sequence[int], top: int) -> list[PromptScore]:
    """The scores of `tokens`, each by its row of float32 logits (tokens, vocabulary), with the `top` best."""
    if not tokens:
        return []
    total = logits.logsumexp(-1)
    own = logits.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = (logits > own).sum(-1) + 1
    best = logits.topk(min(top, logits.shape[-1]), -1)
    rows = zip(
        tokens, (own[:, 0] - total).tolist(), ranks.tolist(),
        (best.values - total[:, None]).tolist(), best.indices.tolist(), strict=True,
    )  # fmt: skip
    return [
        PromptScore(token, logprob, tuple(map(Alternative, ids, values)), rank)
        for token, logprob, rank, values, ids in rows
    ]

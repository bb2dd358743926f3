"""Fields of OpenAI and of other servers that are not honoured: refused where they would change the answer.

What only says who asks, where an answer is kept or how it is computed changes nothing, and is accepted.
A test goes through every field of OpenAI's and vLLM's requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.core.errors import InvalidRequest
from workers.serving.protocol import Body

# Accepted, since the answer would be the same.
NO_EFFECT = frozenset({
    "cache_salt", "ec_transfer_params", "guided_decoding_backend", "kv_transfer_params", "media_io_kwargs",
    "metadata", "mm_payload", "moderation", "prediction", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "request_id", "return_mm_kwargs", "return_routed_experts",
    "return_token_offsets", "routed_experts_prompt_start", "safety_identifier", "service_tier", "session_id",
    "store", "stream_interval", "user",
})  # fmt: skip


@dataclass(frozen=True)
class Unsupported:
    """`neutral` are the values that ask for nothing, besides null."""

    remedy: str
    neutral: tuple[Any, ...] = ()


ONLY_TEXT = "text is all that is read and written here: leave it out"
LEAVE_OUT = "leave it out, or deploy with engine: vllm"
REFUSED: Mapping[str, Unsupported] = {
    "audio": Unsupported(ONLY_TEXT),
    "bad_words": Unsupported("ban tokens by logit_bias of -100", ([],)),
    "chat_template": Unsupported("a template is code: only the model's own runs"),
    "echo": Unsupported("to continue a last message, set continue_final_message", (False,)),
    "function_call": Unsupported("use tool_choice", ("none",)),
    "functions": Unsupported("use tools", ([],)),
    "guided_whitespace_pattern": Unsupported(LEAVE_OUT),
    "length_penalty": Unsupported("beams are not searched here: leave it out", (1,)),
    "logits_processors": Unsupported("it is code of the server: use logit_bias", ([],)),
    "logprob_token_ids": Unsupported("ask for top_logprobs or logprobs", ([],)),
    "mm_processor_kwargs": Unsupported(ONLY_TEXT, ({},)),
    "modalities": Unsupported(ONLY_TEXT, (["text"], [])),
    "priority": Unsupported("requests are answered in the order of their arrival: leave it out", (0,)),
    "prompt_embeds": Unsupported("send text or tokens as prompt", ([],)),
    "repetition_detection": Unsupported("use repetition_penalty or frequency_penalty"),
    "spaces_between_special_tokens": Unsupported("leave it out", (True,)),
    "thinking_token_budget": Unsupported("use max_tokens", (-1,)),
    "use_beam_search": Unsupported("beams are not searched here: use n or temperature", (False,)),
    "verbosity": Unsupported("say it in a message", ("medium",)),
    "vllm_xargs": Unsupported(LEAVE_OUT, ({},)),
    "watermarking": Unsupported(LEAVE_OUT, (False,)),
    "web_search_options": Unsupported("search in your own program, as a tool"),
}


def refuse_unsupported(body: Body) -> None:
    """Raises InvalidRequest for the first field whose effect the caller would miss."""
    refuse_fields(body.model_extra or {}, REFUSED)


def refuse_fields(sent: Mapping[str, Any], refused: Mapping[str, Unsupported]) -> None:
    """Raises InvalidRequest for the first that `refused` has, with a value that asks for something."""
    for name, value in sent.items():
        refusal = refused.get(name)
        if refusal is not None and value is not None and value not in refusal.neutral:
            raise InvalidRequest(
                f"{name} is not supported by this server",
                code="unsupported_parameter", param=name, remedy=refusal.remedy,
            )  # fmt: skip


def unknown_fields(body: Body) -> list[str]:
    """Names that no server is known for; they were accepted without effect."""
    return sorted(set(body.model_extra or {}) - NO_EFFECT - set(REFUSED))

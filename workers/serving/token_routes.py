"""/tokenize and /detokenize, in vLLM's form: what a prompt costs, before it is sent."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from app.core.errors import InvalidRequest
from workers.serving.conversations import render, template_of
from workers.serving.protocol import Boolean, ChatRequest, Received, Tokens
from workers.serving.served_model import ServedModel

CHAT_FIELDS = (
    "messages", "tools", "tool_choice", "add_generation_prompt", "continue_final_message",
    "chat_template_kwargs",
)  # fmt: skip


class TokenizeRequest(Received):
    """A text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = Field(default=None, min_length=1)
    add_special_tokens: Boolean | None = None  # a text gets them, a conversation has those of its template
    return_token_strs: Boolean | None = None


class DetokenizeRequest(Received):
    model: str | None = None
    tokens: Tokens


def tokenized(served: ServedModel, request: TokenizeRequest) -> dict[str, Any]:
    """Raises InvalidRequest, or pydantic's error for a conversation."""
    served.check_name(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequest("prompt or messages is needed", param="prompt", remedy="send one of them")
    if request.prompt is not None:
        tokens = served.tokenization.encode(
            request.prompt, special_tokens=request.add_special_tokens is not False
        )
    else:
        sent = request.model_dump(exclude_unset=True)
        chat = ChatRequest.model_validate({name: sent[name] for name in CHAT_FIELDS if name in sent})
        tokens = chat_tokens(served, chat, special=bool(request.add_special_tokens))
    texts = [served.tokenization.token_text(token) for token in tokens]
    return {
        "count": len(tokens),
        "max_model_len": served.max_model_len,
        "tokens": tokens,
        "token_strs": texts if request.return_token_strs else None,
    }


def chat_tokens(served: ServedModel, chat: ChatRequest, *, special: bool = False) -> list[int]:
    """The tokens of a conversation's prompt. Raises InvalidRequest."""
    template = template_of(served.tokenization)
    text = render(template, chat)
    return served.tokenization.encode(text, special_tokens=template.is_default or special)


def detokenized(served: ServedModel, request: DetokenizeRequest) -> dict[str, Any]:
    """Raises InvalidRequest for a token that the model does not have."""
    served.check_name(request.model)
    if any(not 0 <= token < served.tokenization.vocabulary for token in request.tokens):
        raise InvalidRequest(
            f"a token is outside of 0..{served.tokenization.vocabulary - 1}",
            param="tokens", remedy="use this model's tokens",
        )  # fmt: skip
    return {"prompt": served.tokenization.decode(request.tokens, skip_special_tokens=False)}

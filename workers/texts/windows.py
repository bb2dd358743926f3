"""Documents to windows of token ids.

Documents are joined with the end-of-text token between them and cut into windows without overlap: no
document is dropped for its length, and no window is padded.
"""

from __future__ import annotations

import errno
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from app.core.errors import ModelRefused, TextRefused
from app.core.faults.system_faults import system_number
from app.core.records.specs import CalibrationSpec, EvaluationSpec, TextSpec
from app.core.sources.json_file import parse_json
from app.core.sources.text_shapes import Document
from workers.texts.chat_template import ChatTemplate, RefusedByTemplate, chat_template
from workers.texts.documents import read_documents


@dataclass(frozen=True)
class Windows:
    """(num_samples, sequence_length) int64 token ids and the digest that names them."""

    tokens: Tensor
    available: int  # windows that the text would have given
    left_out: int = 0  # images, sounds and videos of its conversations

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.tokens.to(torch.int32).numpy().tobytes()).hexdigest()

    def batches(self, size: int) -> list[Tensor]:
        return list(torch.split(self.tokens, size))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer; code in the folder is never run.

    Raises TextRefused if it can't be loaded, ModelRefused for a chat_template.json that holds no template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as fault:  # the tokenizers library raises nothing more precise
        if system_number(fault) not in (None, errno.ENOENT):
            raise  # the host's fault: the tokenizer may be right
        message = " ".join(str(fault).split())
        raise TextRefused(
            f"the model's tokenizer can't be loaded: {message}", code="tokenizer_invalid",
            remedy="add tokenizer.json and tokenizer_config.json to the model",
        ) from fault  # fmt: skip
    tokenizer.chat_template = tokenizer.chat_template or processor_template(folder)
    return tokenizer


def processor_template(folder: Path) -> str | None:
    """Some models with images keep their one template in chat_template.json, where processors look."""
    file = folder / "chat_template.json"
    if not file.exists():
        return None
    template: str | None = parse_json(file.name, file.read_bytes()).value.get("chat_template")
    if template is None:
        raise ModelRefused(
            "chat_template.json holds no chat_template", code="chat_template_invalid", param="model",
            remedy="put the template under the key chat_template, or remove the file",
        )  # fmt: skip
    return template


def calibration_windows(
    spec: CalibrationSpec, tokenizer: PreTrainedTokenizerBase, file: Path | None
) -> Windows:
    """`num_samples` windows drawn without replacement with the seed of the spec."""
    documents = read_documents(spec, file, split="valid")
    every = all_windows(spec, spec.sequence_length, tokenizer, documents)
    return drawn_windows(spec, every, left_out_of(documents))


def drawn_windows(spec: CalibrationSpec, every: Tensor, left_out: int = 0) -> Windows:
    """`num_samples` of the windows, drawn without replacement with the seed of the spec."""
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(spec.seed))
    return Windows(every[order[: spec.num_samples]], len(every), left_out)


def evaluation_windows(
    spec: EvaluationSpec, sequence_length: int, tokenizer: PreTrainedTokenizerBase, file: Path | None
) -> Windows:
    """The first `num_samples` windows of the held-out text."""
    documents = read_documents(spec, file, split="test")
    every = all_windows(spec, sequence_length, tokenizer, documents)
    return Windows(every[: spec.num_samples], len(every), left_out_of(documents))


def left_out_of(documents: list[Document]) -> int:
    return sum(document.left_out for document in documents)


def all_windows(
    spec: TextSpec, sequence_length: int, tokenizer: PreTrainedTokenizerBase, documents: list[Document]
) -> Tensor:
    """Raises TextRefused if the text has fewer windows than were asked for."""
    ids: list[int] = []
    template = needed_template(spec, tokenizer, documents)
    for number, document in enumerate(documents):
        if number and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        ids.extend(token_ids(tokenizer, document, template, as_turn=spec.chat_template == "always"))
    return cut_windows(spec, ids, sequence_length)


def cut_windows(spec: TextSpec, ids: list[int], sequence_length: int) -> Tensor:
    """All windows of a text. Raises TextRefused if there are fewer than were asked for."""
    count = len(ids) // sequence_length
    if count < spec.num_samples:
        raise TextRefused(
            f"{spec.source} gives {len(ids)} tokens, {count} windows of {sequence_length}; "
            f"{spec.num_samples} were asked for",
            code="text_too_short",
            remedy="give more text, or lower num_samples or sequence_length",
        )
    return torch.tensor(ids[: count * sequence_length]).view(count, sequence_length)


def needed_template(
    spec: TextSpec, tokenizer: PreTrainedTokenizerBase, documents: list[Document]
) -> ChatTemplate | None:
    """The model's chat template, if a document or the spec asks for one; another if it is not to be used.

    Raises TextRefused if there is none, ModelRefused for one that is no template.
    """
    if spec.chat_template != "always" and all(document.text is not None for document in documents):
        return None
    if spec.chat_template == "never":
        return ChatTemplate(None, tokenizer.special_tokens_map)
    if tokenizer.chat_template is None:
        raise TextRefused(
            "the model has no chat template, but the text needs one", code="chat_template_missing",
            remedy="set chat_template to never, or to auto and give plain text",
        )  # fmt: skip
    return chat_template(tokenizer)


def token_ids(
    tokenizer: PreTrainedTokenizerBase, document: Document, template: ChatTemplate | None, *, as_turn: bool
) -> list[int]:
    """A conversation, or with `as_turn` a text as a user's turn, by the template; other text as it is.

    Raises TextRefused for messages that the template refuses.
    """
    if document.text is not None and not as_turn:
        return list(tokenizer(document.text, verbose=False)["input_ids"])
    assert template is not None
    turns = document.messages or [{"role": "user", "content": document.text or ""}]
    try:
        rendered = template.render(turns, tools=document.tools)
    except RefusedByTemplate as refusal:
        raise refused_by_template(refusal) from refusal
    # A model's own template writes the special tokens, too.
    return list(tokenizer(rendered, add_special_tokens=template.is_default, verbose=False)["input_ids"])


def refused_by_template(refusal: RefusedByTemplate) -> TextRefused:
    return TextRefused(
        f"the model's chat template refuses a conversation: {refusal}", code="chat_template_failed",
        remedy="give conversations that follow the template, or plain text",
    )  # fmt: skip

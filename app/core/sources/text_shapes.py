"""The accepted shapes of a text dataset's rows, in one table, and the document that each is read as.

The first shape whose fields have content in a row decides; other fields are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from app.core.sources.json_file import json_fault

Row = dict[str, Any]
Turn = dict[str, Any]

ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "function_call": "assistant", "observation": "tool", "function_response": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Document:
    """Plain text, or the turns of a conversation and the tools that it may call.

    A question with its answer is both: text, and two turns for whoever asks for the chat template.
    """

    text: str | None = None
    messages: list[Turn] | None = None
    tools: list[dict[str, Any]] | None = None
    left_out: int = 0  # images, sounds and videos of the turns

    @property
    def is_empty(self) -> bool:
        return not (self.text or "").strip() if self.text is not None else not self.messages


class RowRefused(ValueError):
    """What a row lacks, or what is wrong with it."""


class RowShape(NamedTuple):
    """`fields` are those that a row needs; `read` makes a document of it, or raises RowRefused."""

    fields: tuple[str, ...]
    example: str
    read: Callable[[Row], Document]


def document_of(row: object) -> Document:
    """Raises RowRefused for a row of no shape, saying what it lacks of the nearest one."""
    if not isinstance(row, dict):
        is_conversation = isinstance(row, list) and row and is_turn(row[0])
        kind = "a list of turns" if is_conversation else kind_of(row)
        raise RowRefused(f"{kind} instead of an object{' with `messages`' if is_conversation else ''}")
    present = {field for field, value in row.items() if value is not None}
    fitting = [shape for shape in SHAPES if present.issuperset(shape.fields)]
    if fitting:
        filled = (shape for shape in fitting if any(map(has_content, map(row.get, shape.fields))))
        return next(filled, fitting[0]).read(row)
    if is_turn(row):
        raise RowRefused("a turn alone instead of an object with `messages`")
    near = [shape for shape in SHAPES if not row.keys().isdisjoint(shape.fields)]
    if near:
        missing = next(field for field in near[0].fields if field not in present)
        others = " and ".join(f"`{field}`" for field in near[0].fields if field in present)
        raise RowRefused(
            f"`{missing}` is {'null' if missing in row else 'missing'}{' beside ' if others else ''}{others}"
        )
    named = ", ".join(f"`{str(field)[:40]}`" for field in list(row)[:6]) or "no fields"
    raise RowRefused(f"{named}, but none of the fields that are read")


def has_content(value: object) -> bool:
    return bool(value.strip()) if isinstance(value, str) else bool(value)


def is_turn(value: object) -> bool:
    return isinstance(value, dict) and any(value.keys() >= set(names) for names in (OPENAI, SHAREGPT))


def plain(row: Row) -> Document:
    return Document(text=text_in(row, "text"))


def conversation(row: Row, field: str, names: tuple[str, str]) -> Document:
    """`names` are those of a turn's role and content in this shape; the other shape's are read, too."""
    turns = row[field]
    if not isinstance(turns, list):
        raise RowRefused(f"`{field}` is {kind_of(turns)} instead of a list of turns")
    if not turns:
        raise RowRefused(f"`{field}` is empty")
    read = [turn_of(number, turn, names) for number, turn in enumerate(turns, start=1)]
    messages = [without_media(turn) for turn in read]
    left_out = sum(map(media_count, read))
    if row.get("system") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": text_in(row, "system")})
    tools = tools_of(row.get("tools"))
    require_text(f"`{field}`", json.dumps([messages, tools], ensure_ascii=False))
    return Document(messages=messages, tools=tools, left_out=left_out)


def prompt_and_completion(row: Row) -> Document:
    """Two texts, of which one goes on where the other ends; or two lists of turns."""
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        joined = {**row, "messages": [*row["prompt"], *row["completion"]]}
        return conversation(joined, "messages", OPENAI)
    prompt, completion = text_in(row, "prompt"), text_in(row, "completion")
    return Document(text=prompt + completion, messages=question_and_answer(row, prompt, completion))


def instruction(row: Row) -> Document:
    parts = [text_in(row, "instruction")]
    if row.get("input") is not None:
        parts.append(text_in(row, "input"))
    question, answer = "\n\n".join(filter(None, parts)), text_in(row, "output")
    messages = question_and_answer(row, question, answer)
    return Document(text="\n\n".join(filter(None, (question, answer))), messages=messages)


def question_and_answer(row: Row, question: str, answer: str) -> list[Turn]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if row.get("system"):
        turns.insert(0, {"role": "system", "content": text_in(row, "system")})
    return turns


OPENAI = ("role", "content")
SHAREGPT = ("from", "value")
SHAPES = (
    RowShape(("text",), '{"text": "…"}', plain),
    RowShape(
        ("messages",),
        '{"messages": [{"role": "user", "content": "…"}, …]}',
        lambda row: conversation(row, "messages", OPENAI),
    ),
    RowShape(
        ("conversations",),
        '{"conversations": [{"from": "human", "value": "…"}, …]}',
        lambda row: conversation(row, "conversations", SHAREGPT),
    ),
    RowShape(("prompt", "completion"), '{"prompt": "…", "completion": "…"}', prompt_and_completion),
    RowShape(("instruction", "output"), '{"instruction": "…", "input": "…", "output": "…"}', instruction),
)
FIELDS = frozenset(field for shape in SHAPES for field in shape.fields)


def turn_of(number: int, turn: object, names: tuple[str, str]) -> Turn:
    """A turn with `role` and `content`, as OpenAI's clients write it."""
    if not isinstance(turn, dict):
        raise RowRefused(f"turn {number} is {kind_of(turn)} instead of an object")
    speaker, said = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    for name, value in zip(names, (speaker, said), strict=True):
        if value is None and (name == names[0] or not calls_of(turn)):
            raise RowRefused(f"turn {number} lacks `{name}`")
    if not isinstance(speaker, str):
        raise RowRefused(f"`{names[0]}` of turn {number} is {kind_of(speaker)} instead of text")
    others = {key: value for key, value in turn.items() if key not in ("from", "value", "function_call")}
    calls = calls_of(turn) or None
    if speaker == "function_call":
        calls, said = [called(number, said)], None
    elif not isinstance(said, str) and said is not None:
        check_parts(number, names[1], said)
    return {
        **others,
        "role": ROLES.get(speaker, speaker) if "role" not in turn else speaker,
        "content": said,
        **({"tool_calls": calls} if calls else {}),
    }


def calls_of(turn: Turn) -> list[Any]:
    """The tools that a turn calls; `function_call` is OpenAI's older name for one."""
    if isinstance(turn.get("function_call"), dict):
        return [{"type": "function", "function": turn["function_call"]}]
    calls = turn.get("tool_calls")
    return calls if isinstance(calls, list) else []


def called(number: int, value: object) -> dict[str, Any]:
    """The call in a turn of the role `function_call`, whose text is JSON."""
    try:
        function = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        function = None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowRefused(f"turn {number} is a function_call without JSON of a name and arguments")
    return {"type": "function", "function": function}


# Types of parts, in OpenAI's words and in transformers'.
MEDIA = frozenset(
    prefix + kind + suffix
    for kind in ("image", "audio", "video")
    for prefix, suffix in (("", ""), ("", "_url"), ("input_", ""))
)


def is_media(item: object) -> bool:
    """Whether a part of a turn's content is no text but one of MEDIA."""
    return isinstance(item, dict) and isinstance(item.get("type"), str) and item["type"] in MEDIA


def media_count(turn: Turn) -> int:
    content = turn["content"]
    return sum(map(is_media, content)) if isinstance(content, list) else 0


def without_media(turn: Turn) -> Turn:
    """The turn with its text alone, which may be none: the turns before and after stay where they are."""
    content = turn["content"]
    if not isinstance(content, list):
        return turn
    return {**turn, "content": [item for item in content if not is_media(item)]}


def check_parts(number: int, name: str, content: object) -> None:
    if not isinstance(content, list):
        raise RowRefused(f"`{name}` of turn {number} is {kind_of(content)} instead of text")
    for item in content:
        if not isinstance(item, dict):
            raise RowRefused(
                f"turn {number} has a part that is {kind_of(item)} instead of an object of `text`"
            )
        if not is_media(item) and not isinstance(item.get("text"), str):
            kind = item.get("type", "text")
            if kind != "text":
                raise RowRefused(
                    f"turn {number} has a part that is {kind!r}: text is read, images, audio and video are "
                    "left out"
                )
            raise RowRefused(f"turn {number} has a part whose `text` is {kind_of(item.get('text'))}")


def tools_of(tools: object) -> list[dict[str, Any]] | None:
    """A list of tools, or JSON of one."""
    try:
        parsed = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools or None
    except (ValueError, RecursionError) as fault:
        raise RowRefused(f"`tools` is a text that is not valid JSON: {json_fault(fault)}") from fault
    if parsed is None:
        return None
    if not isinstance(parsed, list) or not all(isinstance(tool, dict) for tool in parsed):
        raise RowRefused("`tools` is not a list of objects")
    return parsed or None


def text_in(row: Row, field: str) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise RowRefused(f"`{field}` is {kind_of(value)} instead of text")
    require_text(f"`{field}`", value)
    return value


def require_text(name: str, text: str) -> None:
    """JSON's escapes can name half of a character, which no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError as fault:
        raise RowRefused(f"{name} holds half of a character (a surrogate alone)") from fault


def kind_of(value: object) -> str:
    kinds: dict[type, str] = {
        dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number",
        float: "a number", type(None): "null",
    }  # fmt: skip
    return kinds.get(type(value), type(value).__name__)

"""What a request demands of its text: a JSON schema, a pattern, a choice or a grammar.

OpenAI and vLLM have several fields for it; whichever is used becomes one `Constraint`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from app.core.errors import InvalidRequest
from workers.serving.protocol import Body, ChatRequest, NamedTool, StructuredOutputs, Tool

ANY_OBJECT: dict[str, Any] = {"type": "object"}
MAX_CALLS = 16  # of an answer whose grammar demands calls: a weak model would go on for ever
GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
# Schemas below these describe alternatives or layers of one object, which have to admit each other's keys.
LAYERED = ("allOf", "not", "if", "then", "else", "dependentSchemas", "dependencies")
CLOSED = ("additionalProperties", "unevaluatedProperties", "patternProperties", *LAYERED)
NESTED = ("properties", "$defs", "definitions")


@dataclass(frozen=True)
class Constraint:
    """`param` is the field of the request that demands it."""

    kind: Literal["schema", "regex", "choice", "grammar"]
    value: Any
    param: str


def text_constraint(request: Body) -> Constraint | None:
    """What the text must keep to. Raises InvalidRequest for several demands at once."""
    demands = [*format_demands(request), *structured_demands(request), *guided_demands(request)]
    if len(demands) > 1:
        names = " and ".join(demand.param for demand in demands)
        raise InvalidRequest(f"{names} are given together", param=demands[1].param, remedy="give one of them")
    return next(iter(demands), None)


def format_demands(request: Body) -> Iterator[Constraint]:
    response_format = request.response_format
    if response_format is None or response_format.type == "text":
        return
    described = response_format.json_schema
    if described is None:
        yield Constraint("schema", ANY_OBJECT, "response_format")
        return
    schema = closed(described.json_schema) if described.strict else described.json_schema
    yield Constraint("schema", schema, "response_format")


def structured_demands(request: Body) -> Iterator[Constraint]:
    """vLLM's field, in the names of its version 0.32."""
    outputs: StructuredOutputs | None = request.structured_outputs
    if outputs is None:
        return
    param = "structured_outputs"
    if outputs.json_document is not None:
        yield Constraint("schema", schema_of(outputs.json_document, param), param)
    if outputs.json_object:
        yield Constraint("schema", ANY_OBJECT, param)
    if outputs.regex is not None:
        yield Constraint("regex", outputs.regex, param)
    if outputs.choice is not None:
        yield Constraint("choice", outputs.choice, param)
    if outputs.grammar is not None:
        yield Constraint("grammar", outputs.grammar, param)


def guided_demands(request: Body) -> Iterator[Constraint]:
    """The older names of vLLM's fields."""
    if request.guided_json is not None:
        yield Constraint("schema", schema_of(request.guided_json, "guided_json"), "guided_json")
    if request.guided_regex is not None:
        yield Constraint("regex", request.guided_regex, "guided_regex")
    if request.guided_choice is not None:
        yield Constraint("choice", request.guided_choice, "guided_choice")
    if request.guided_grammar is not None:
        yield Constraint("grammar", request.guided_grammar, "guided_grammar")


def schema_of(document: str | dict[str, Any], param: str) -> dict[str, Any]:
    """A schema as an object, or as text. Raises InvalidRequest."""
    try:
        schema = json.loads(document) if isinstance(document, str) else document
    except (ValueError, RecursionError) as fault:
        raise InvalidRequest(f"{param} is not JSON: {fault}", param=param, remedy="send a schema") from fault
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{param} is no JSON schema", param=param, remedy="send an object")
    return schema


def call_constraint(request: ChatRequest) -> Constraint | None:
    """The calls that tool_choice demands; None where it leaves the choice to the model."""
    if isinstance(request.tool_choice, NamedTool):
        name = request.tool_choice.function.name
        tool = next(tool for tool in request.offered if tool.function.name == name)
        return Constraint("schema", parameters_of(tool), "tools")
    if request.choice_of_calls != "required":
        return None
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "arguments": parameters_of(tool)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in request.offered
    ]
    most = 1 if request.parallel_tool_calls is False else MAX_CALLS
    schema = {"type": "array", "items": {"anyOf": calls}, "minItems": 1, "maxItems": most}
    return Constraint("schema", schema, "tools")


def parameters_of(tool: Tool) -> dict[str, Any]:
    """A tool's parameters. Keys that it does not declare are refused by its code, so none is written."""
    parameters = tool.function.parameters or ANY_OBJECT
    return parameters if tool.function.strict is False else closed(parameters)


def closed(schema: Any) -> Any:
    """The schema without undeclared keys: objects that declare some admit no others.

    Left as they are: objects that say themselves what else they admit, those without any declared key, and
    those that are made of layers (`allOf`), of which each would refuse the others' keys.
    """
    return closed_below(schema, layers_of(schema))


def closed_below(schema: Any, layers: frozenset[str]) -> Any:
    if not isinstance(schema, dict):
        return schema
    shut = dict(schema)
    for key, value in schema.items():
        if key in NESTED and isinstance(value, dict):
            shut[key] = {
                name: each if f"#/{key}/{name}" in layers else closed_below(each, layers)
                for name, each in value.items()
            }
        elif key in ("anyOf", "oneOf", "prefixItems") and isinstance(value, list):
            shut[key] = [closed_below(each, layers) for each in value]
        elif key == "items":
            shut[key] = closed_below(value, layers)
    if isinstance(schema.get("properties"), dict) and schema["properties"] and not set(CLOSED) & set(schema):
        alternatives = {"anyOf", "oneOf", "$ref"} & set(schema)
        if not alternatives:
            shut["additionalProperties"] = False
    return shut


def layers_of(schema: Any) -> frozenset[str]:
    """References to definitions that stand in layers, or beside declared keys."""
    layered_ones: set[str] = set()

    def look(value: Any, *, layered: bool) -> None:
        if isinstance(value, dict):
            if layered and isinstance(value.get("$ref"), str):
                layered_ones.add(value["$ref"])
            for key, each in value.items():
                several = isinstance(each, list) and len(each) > 1
                beside = key in ("anyOf", "oneOf") and "properties" in value
                look(each, layered=(key in LAYERED and (several or key != "allOf")) or beside)
            if "$ref" in value and "properties" in value:
                layered_ones.add(str(value["$ref"]))
        elif isinstance(value, list):
            for each in value:
                look(each, layered=layered)

    look(schema, layered=False)
    return frozenset(layered_ones)

from __future__ import annotations

from app.api.schema_forms import with_readable_schemas


def test_an_enum_of_several_types_is_alternatives_of_one_each() -> None:
    sizes = {"enum": ["auto", 16, -1], "default": "auto", "title": "Group Size"}
    one, off = {"enum": ["a", "b"], "type": "string"}, {"enum": ["x", True, None]}
    document = {"components": {"schemas": {"Recipe": {"properties": {"a": sizes, "b": one, "c": [off]}}}}}
    with_readable_schemas(document)
    alternatives = [{"type": "string", "enum": ["auto"]}, {"type": "integer", "enum": [16, -1]}]
    assert sizes == {"default": "auto", "title": "Group Size", "anyOf": alternatives}
    assert one == {"enum": ["a", "b"], "type": "string"}
    assert [each["type"] for each in off["anyOf"]] == ["string", "boolean", "null"]  # type: ignore[index, call-overload]


def test_a_tuple_says_what_its_elements_are() -> None:
    number, text = {"type": "number"}, {"type": "string"}
    pair, mixed = {"prefixItems": [number, number]}, {"prefixItems": [number, text, number]}
    with_readable_schemas({"components": {"schemas": {"A": pair, "B": mixed}}})
    assert pair["items"] == number
    assert mixed["items"] == {"anyOf": [number, text]}


def test_an_object_is_no_default_and_each_schema_has_a_title_of_its_own() -> None:
    either = {"anyOf": [{"$ref": "#/components/schemas/X"}, {"type": "null"}], "default": {"a": 1}}
    named = {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}
    schemas = {"X-Input": {"title": "X", "properties": {"e": either, "n": named}}, "X-Output": {"title": "X"}}
    with_readable_schemas({"components": {"schemas": schemas}})
    assert "default" not in either
    assert named["default"] is None
    assert [schema["title"] for schema in schemas.values()] == ["XInput", "XOutput"]

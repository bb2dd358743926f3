"""Tool calls and reasoning in the forms of families, cut out of streams that break anywhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from workers.serving.answer_forms import CALL_FORMS, AnswerForms
from workers.serving.answer_readers import (
    ArgumentsAdded,
    CallBegun,
    CallListReader,
    CallNumbers,
    Event,
    FormReader,
    NamedCallReader,
    joined,
    specials_pattern,
)

# Templates are cut down to what their families write before a call; the calls are two, one without arguments.
TOOLS: dict[str, Any] = {
    "weather": {"city": {"type": "string"}, "days": {"type": "integer"}, "code": {"type": "string"}},
    "time": {},
}
WEATHER, TIME = ('{"city": "Oslo", "days": 3}', "{}")
ASKED = [("weather", WEATHER), ("time", TIME)]
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}\n</tool_call>'
CASES = {
    "hermes": (
        "{{ '<tool_call>' }}",
        f'Let me see.\n{HERMES}\n<tool_call>\n{{"name": "time", "arguments": {{}}}}\n</tool_call>',
    ),
    "qwen3-coder": (
        "{{ '<tool_call><function=' + name + '><parameter=' + key + '>' }}",
        "Let me see.\n<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=time>\n</function>\n</tool_call>",
    ),
    "llama3": (
        '<|start_header_id|>{{ \'Respond as {"name": …, "parameters": …}\' }}',
        '{"name": "weather", "parameters": {"city": "Oslo", "days": 3}}; {"name": "time", "parameters": {}}',
    ),
    "llama3 tag": (
        "<|start_header_id|>{{ '\"parameters\"' }}",
        '<|python_tag|>{"type": "function", "name": "weather", "parameters": {"city": "Oslo", "days": 3}}\n'
        '{"name": "time", "parameters": {}}',
    ),
    "mistral": (
        "{{ '[TOOL_CALLS]' + name + '[ARGS]' }}",
        'Let me see.[TOOL_CALLS]weather[ARGS]{"city": "Oslo", "days": 3}[TOOL_CALLS]time[CALL_ID]a1[ARGS]{}',
    ),
    "mistral list": (
        "{{ '[TOOL_CALLS] [' }}",
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}, '
        '{"name": "time", "arguments": {}}]',
    ),
    "deepseek fenced": (
        "{{ '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' }}",
        "Let me see.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "Oslo", "days": 3}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function'
        "<｜tool▁sep｜>time\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    "deepseek": (
        "{{ '<｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>' }}",
        "Let me see.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
        '{"city": "Oslo", "days": 3}<｜tool▁call▁end｜><｜tool▁call▁begin｜>time<｜tool▁sep｜>{}'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    "glm": (
        "{{ '<tool_call>' + name + '<arg_key>' }}",
        "Let me see.\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>time\n</tool_call>",
    ),
    "kimi": (
        "{{ '<|tool_call_begin|>' + id + '<|tool_call_argument_begin|>' }}",
        "Let me see.<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
        '<|tool_call_argument_begin|>{"city": "Oslo", "days": 3}<|tool_call_end|><|tool_call_begin|>'
        "functions.time:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
    ),
    "gemma": (
        "{{ '<|tool_call>call:' + name + '<tool_call|>' }}",
        '<|tool_call>call:weather{city:<|"|>Oslo<|"|>,days:3}<tool_call|><|tool_call>call:time{}<tool_call|>',
    ),
    "functiongemma": (
        "{{ '<start_function_call>call:' }}",
        "<start_function_call>call:weather{city:<escape>Oslo<escape>,days:3}<end_function_call>"
        "<start_function_call>call:time{}<end_function_call>",
    ),
    "lfm2": (
        "{{ '<|tool_call_start|>' }}",
        'Let me see.<|tool_call_start|>[weather(city="Oslo", days=3), time()]<|tool_call_end|>',
    ),
    "olmo3": (
        "{{ '<function_calls>' }}",
        'Let me see.\n<function_calls>\nweather(city="Oslo", days=3)\ntime()\n</function_calls>',
    ),
    "pythonic": ("{{ '[func_name1(key=value), …]' }}", '[weather(city="Oslo", days=3), time()]'),
    "pythonic tags": (
        "{{ '[func_name1(key=value), …]' }}",
        '<|python_start|>[weather(city="Oslo", days=3), time()]<|python_end|>',
    ),
    "harmony": (
        "{{ '<|channel|>' + channel + '<|message|>' }}",
        "<|channel|>analysis<|message|>I must look.<|end|><|start|>assistant<|channel|>commentary<|message|>"
        "Let me see.<|end|><|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json"
        '<|message|>{"city": "Oslo", "days": 3}<|call|><|start|>assistant to=functions.time'
        "<|channel|>commentary json<|message|>{}",
    ),
}


def reader(forms: AnswerForms, **options: Any) -> FormReader:
    return FormReader(forms, TOOLS, CallNumbers(), **options)


def read(reader: Any, text: str, cuts: Iterable[int]) -> list[Event]:
    """What a stream that is cut at these places brings, with neighbouring texts joined."""
    events, start = [], 0
    for end in cuts:
        events += reader.read(text[start:end], last=False)
        start = end
    return joined([*events, *reader.read(text[start:], last=True)])


def summary(events: list[Event]) -> tuple[str, str, list[tuple[str, str]]]:
    """Content, reasoning, and calls with their arguments."""
    texts = {"content": "", "reasoning": ""}
    calls: list[list[str]] = []
    for event in events:
        if isinstance(event, CallBegun):
            assert event.index == len(calls)
            calls.append([event.name, ""])
        elif isinstance(event, ArgumentsAdded):
            calls[event.index][1] += event.text
        else:
            texts[event.kind] += event.text
    return texts["content"], texts["reasoning"], [(name, arguments) for name, arguments in calls]


@pytest.mark.parametrize("case", CASES)
def test_calls_of_each_form(case: str) -> None:
    """Whole, cut in two at every place, and one character at a time."""
    template, text = CASES[case]
    forms = AnswerForms.of_template(template)
    assert forms.calls is not None
    assert forms.calls.name == case.split()[0]
    whole = reader(forms)
    found = summary(read(whole, text, []))
    assert found[2] == ASKED
    assert found[0] in ("", "Let me see.")
    assert found[0] or "Let me see" not in text
    assert found[1] == ("I must look." if case == "harmony" else "")
    assert whole.called
    for cuts in [[cut] for cut in range(1, len(text))] + [list(range(1, len(text)))]:
        assert summary(read(reader(forms), text, cuts)) == found, cuts


def test_every_form_has_a_case() -> None:
    assert {case.split()[0] for case in CASES} == {form.name for form in CALL_FORMS}


THINKING = {
    "think": ("<think>", "<think>\nHm.\n\nYes.\n</think>\n\nIt is 4.", ""),
    "think, begun by the template": ("<think>", "Hm.\n\nYes.\n</think>\n\nIt is 4.", "<think>"),
    "magistral": ("[THINK]", "[THINK]Hm.\n\nYes.[/THINK]It is 4.", ""),
    "seed": ("<seed:think>", "<seed:think>Hm.\n\nYes.</seed:think>It is 4.", ""),
    "gemma": ("<|channel>thought", "<|channel>thought\nHm.\n\nYes.<channel|>It is 4.", ""),
    "harmony": (
        "<|channel|><|message|>",
        "<|channel|>analysis<|message|>Hm.\n\nYes.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>It is 4.",
        "",
    ),
}


@pytest.mark.parametrize("case", THINKING)
def test_reasoning_of_each_form(case: str) -> None:
    template, text, begun = THINKING[case]
    forms = AnswerForms.of_template(template)
    for cuts in [[], *([cut] for cut in range(1, len(text))), range(1, len(text))]:
        events = read(FormReader(forms, {}, CallNumbers(), begun=begun), text, cuts)
        assert summary(events) == ("It is 4.", "Hm.\n\nYes.", []), list(cuts)


def test_reasoning_that_does_not_end_stays_reasoning() -> None:
    forms = AnswerForms.of_template("<think>")
    assert summary(read(reader(forms), "<think>\nHm. Still", [])) == ("", "Hm. Still", [])


def test_a_thinking_model_calls_after_its_reasoning() -> None:
    forms = AnswerForms.of_template("<think><tool_call>")
    found = summary(read(reader(forms, begun="<think>"), f"I look.\n</think>\n\n{HERMES}", []))
    assert found == ("", "I look.", ASKED[:1])


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("<tool_call>", "<tool_call>\nnot JSON\n</tool_call>"),
        ("<tool_call>", '<tool_call>{"name": "no_such_tool", "arguments": {}}</tool_call>'),
        ("<tool_call>", '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>'),
        ('<|start_header_id|>"parameters"', '{"temperature": 3}'),
        ("func_name1(", "[1, 2, 3]"),
        ("[TOOL_CALLS]", "[TOOL_CALLS]nothing"),
        ("<tool_call>", '<tool_call>{"name": "weather", "argu'),
    ],
)
def test_what_is_no_call_stays_text(template: str, text: str) -> None:
    one = reader(AnswerForms.of_template(template))
    content, _, calls = summary(read(one, text, [len(text) // 2]))
    assert not calls
    assert not one.called
    assert content.strip() in text
    assert content


@pytest.mark.parametrize("text", ["Just text, [1] and {2}.", "\n  spaces stay  \n", "a < b <tool", ""])
def test_text_without_marks_is_as_it_was_written(text: str) -> None:
    for cuts in ([], range(1, len(text))):
        assert summary(read(reader(AnswerForms.of_template("<tool_call>")), text, cuts))[0] == text


def test_one_call_at_most_where_the_request_wants_no_more() -> None:
    template, text = CASES["hermes"]
    single = FormReader(AnswerForms.of_template(template), TOOLS, CallNumbers(single=True))
    assert summary(read(single, text, []))[2] == ASKED[:1]


def test_values_of_tags_get_the_declared_types() -> None:
    """A code that looks like a number stays text, and undeclared values are read as JSON where they are."""
    text = "<function=weather>" + "".join(
        f"<parameter={key}>{value}</parameter>"
        for key, value in [
            ("code", "007"),
            ("days", "3"),
            ("city", "true"),
            ("more", '{"a": [1]}'),
            ("say", "hi"),
        ]
    )
    arguments = summary(read(reader(AnswerForms.of_template("<function=<parameter=")), text, []))[2][0][1]
    assert arguments == '{"code": "007", "days": 3, "city": "true", "more": {"a": [1]}, "say": "hi"}'


def test_special_tokens_that_are_no_marks_are_no_text() -> None:
    forms = AnswerForms.of_template("<tool_call>")
    specials = specials_pattern(["<|im_start|>", "<tool_call>", "</tool_call>"], forms)
    text = f"<|im_start|>So: {HERMES}"
    assert summary(read(reader(forms, specials=specials), text, [])) == ("So:", "", ASKED[:1])


def test_ids_are_short_where_a_template_wants_it() -> None:
    template, text = CASES["mistral"]
    forms = AnswerForms.of_template(template)
    assert forms.calls is not None
    numbers = CallNumbers(short_ids=forms.calls.short_ids)
    ids = [
        each.id for each in read(FormReader(forms, TOOLS, numbers), text, []) if isinstance(each, CallBegun)
    ]
    assert [(len(id), id.isalnum()) for id in ids] == [(9, True)] * 2
    assert len(set(ids)) == 2


def test_demanded_calls_are_read_one_by_one() -> None:
    text = '[{"name": "weather", "arguments": {"city": "a } b"}}, {"name": "time", "arguments": {}}]'
    expected = [("weather", '{"city": "a } b"}'), ("time", "{}")]
    for cuts in ([], *([cut] for cut in range(1, len(text))), range(1, len(text))):
        one = CallListReader(CallNumbers())
        assert summary(read(one, text, cuts)) == ("", "", expected)
        assert one.called
    early = CallListReader(CallNumbers())
    assert early.read(text[:-20], last=False)  # the first call does not wait for the second
    broken = read(CallListReader(CallNumbers()), text[:20], [])
    assert summary(broken) == (text[:20], "", [])


def test_arguments_of_a_named_tool_are_streamed() -> None:
    events = read(NamedCallReader("weather", "call_1"), '{"city": 1}', [4, 5])
    assert events[0] == CallBegun(0, "call_1", "weather")
    assert summary(events)[2] == [("weather", '{"city": 1}')]


def test_a_template_without_marks_has_no_form() -> None:
    assert AnswerForms.of_template("{{ messages }}") == AnswerForms()

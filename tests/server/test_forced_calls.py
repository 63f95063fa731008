"""Tool calls that are forced, and forms that hold after reasoning: a real engine behind a real server.

The bundled model knows no format of calls: it is told which one it has by the markers of another's template.
"""

from __future__ import annotations

import dataclasses
import json

import httpx
import jsonschema
import openai
import pytest

from hybrid.async_llm import AsyncLLM
from hybrid.engine.guidance import Guidance
from hybrid.engine.sampler import Sampler
from hybrid.engine.sequence import SampledToken
from hybrid.server.tool_grammar import Grammar, tool_grammar
from hybrid.structured import StructuredOutputs

TEMPLATES = {
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + '<｜tool▁sep｜>' + '```json </think>",
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>'+ name + '<｜tool▁sep｜> </think>",
    "hermes": '<tool_call>\n{"name": <function-name>, "arguments": ...}\n</tool_call> </think>',
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>{{ id }}<|tool_call_argument_begin|></think>",
    "glm45": "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n</tool_call> <think></think>",
}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Oslo", "Lima <b>"], "type": "string"},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
        "note": {"type": "string", "maxLength": 8},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TIME = {"type": "object", "properties": {"zone": {"const": "UTC"}}, "required": ["zone"]}
TIME["additionalProperties"] = False
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "get-time", "parameters": TIME}},
]
SCHEMAS = {"get_weather": WEATHER, "get-time": TIME}
USER = [{"role": "user", "content": "How is the weather in Oslo?"}]


@pytest.fixture(scope="module")
def server(start_engine):
    return start_engine(AsyncLLM("demo", num_threads=1, max_num_seqs=4, max_model_len=1024))


@pytest.fixture
def client_of(server):
    """A client of the server when its model writes calls in a format."""

    def client(name):
        server.context.card = dataclasses.replace(server.context.card, chat_template_text=TEMPLATES[name])
        return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    return client


def chat(client, **options):
    options = {"temperature": 0, "max_tokens": 400, "tools": TOOLS, **options}
    return client.chat.completions.create(model="demo", messages=USER, **options)


def check(calls):
    """Every call names a tool and has arguments that its schema accepts."""
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])


def streamed(chunks):
    """Calls of a stream as (name, arguments), and the last finish reason."""
    calls, reason = {}, None
    for chunk in chunks:
        for choice in chunk.choices:
            reason = choice.finish_reason or reason
            assert not choice.delta.content
            for delta in choice.delta.tool_calls or ():
                call = calls.setdefault(delta.index, ["", ""])
                call[0] += delta.function.name or ""
                call[1] += delta.function.arguments or ""
    return [tuple(call) for call in calls.values()], reason


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_required_call_is_made(client_of, name):
    options = {"tool_choice": "required", "parallel_tool_calls": False}
    answer = chat(client_of(name), **options).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    assert len(answer.message.tool_calls) == 1
    check(answer.message.tool_calls)
    calls, reason = streamed(chat(client_of(name), stream=True, **options))
    assert reason == "tool_calls"
    assert calls == [(c.function.name, c.function.arguments) for c in answer.message.tool_calls]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_named_function_is_called_once(client_of, name):
    choice = {"type": "function", "function": {"name": "get-time"}}
    (call,) = chat(client_of(name), tool_choice=choice).choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get-time", {"zone": "UTC"})


@pytest.mark.parametrize("name", ["hermes", "glm45"])  # others would rather end their section
def test_several_calls(client_of, name):
    longer = {"min_tokens": 150}  # so that the answer does not end with its first call
    answer = chat(client_of(name), tool_choice="required", max_tokens=600, extra_body=longer).choices[0]
    assert len(answer.message.tool_calls) > 1
    check(answer.message.tool_calls[:-1] if answer.finish_reason == "length" else answer.message.tool_calls)


@pytest.mark.parametrize("name", TEMPLATES)
def test_at_most_one_call_beside_text(client_of, name):
    answer = chat(client_of(name), parallel_tool_calls=False, max_tokens=20).choices[0]
    assert answer.message.content
    assert not answer.message.tool_calls


def test_other_protocols(server, client_of):
    client = client_of("hermes")
    tool = {"type": "function", "name": "get-time", "parameters": TIME}
    answer = client.responses.create(model="demo", input="Hello", tools=[tool], tool_choice="required")
    assert {item.name for item in answer.output if item.type == "function_call"} == {"get-time"}
    body = {
        "model": "demo",
        "max_tokens": 200,
        "messages": USER,
        "tools": [{"name": "get-time", "input_schema": TIME}],
        "tool_choice": {"type": "tool", "name": "get-time"},
    }
    message = httpx.post(f"{server.url}/v1/messages", json=body).json()
    assert [block["type"] for block in message["content"]] == ["tool_use"]
    assert message["content"][0]["input"] == {"zone": "UTC"}
    assert message["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "get_weather, get-time"),
        ({"tool_choice": "sometimes"}, "sometimes"),
        ({"tool_choice": {"function": {"name": "get-time"}}}, "tool_choice"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "not both"),
        ({"tool_choice": "required", "tools": []}, "no tools"),
    ],
)
def test_choices_that_are_refused(client_of, options, message):
    with pytest.raises(openai.BadRequestError, match=message):
        chat(client_of("hermes"), **options)


def test_schemas_that_are_refused(client_of):
    wrong = [{"type": "function", "function": {"name": "f", "parameters": {"type": "strin"}}}]
    with pytest.raises(openai.BadRequestError):
        chat(client_of("hermes"), tools=wrong, tool_choice="required")
    none = [{"type": "function", "function": {"name": "f", "parameters": {"required": ["x"]}}}]
    with pytest.raises(openai.BadRequestError, match="properties"):
        chat(client_of("glm45"), tools=none, tool_choice="required")


def test_control_tokens_stand_as_tokens(server):
    tokenizer = server.engine.tokenizer
    end = min(tokenizer.stop_ids)
    text = tokenizer.token_text(end)
    assert Grammar(tokenizer).text("a", text) == f'"a" <[{end}]>'
    control = next(
        i for i in range(tokenizer.vocab_size) if tokenizer.is_control(i) and i not in tokenizer.stop_ids
    )
    lark = f"start: {Grammar(tokenizer).text(tokenizer.token_text(control), 'b')}\n"
    constraint = Guidance(tokenizer)(StructuredOutputs(grammar=lark))
    assert constraint.allowed_mask().nonzero().flatten().tolist() == [control]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("required", [False, True])
def test_every_grammar_compiles(server, name, required):
    text = tool_grammar(name, TOOLS, server.engine.tokenizer, required=required, several=False)
    assert not Guidance(server.engine.tokenizer)(StructuredOutputs(grammar=text)).finished


SECTIONS = {
    "deepseek_v3": (
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get-time\n```json\n{}\n```<｜tool▁call▁end｜>",
        "\n",
        "<｜tool▁calls▁end｜>",
    ),
    "deepseek_v31": (
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>get-time<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
        "",
        "<｜tool▁calls▁end｜>",
    ),
    "kimi_k2": (
        "<|tool_calls_section_begin|>",
        "<|tool_call_begin|>functions.get-time:0<|tool_call_argument_begin|>{}<|tool_call_end|>",
        "",
        "<|tool_calls_section_end|>",
    ),
}


def accepts(tokenizer, grammar, text):
    """Whether the grammar lets ``text`` be written, and end there."""
    constraint = Guidance(tokenizer)(StructuredOutputs(grammar=grammar))
    for token_id in tokenizer.encode(text, add_special=False):
        if not constraint.allowed_mask()[token_id]:
            return False
        constraint.accept(token_id)
    return constraint.finished or bool(constraint.allowed_mask()[min(tokenizer.stop_ids)])


@pytest.mark.parametrize("name", SECTIONS)
def test_calls_of_a_section(server, name):
    tokenizer = server.engine.tokenizer
    begin, call, between, end = (part.replace("{}", '{"zone": "UTC"}') for part in SECTIONS[name])
    one, two = f"{begin}{call}{end}", f"{begin}{call}{between}{call}{end}"
    several, single, optional = (
        tool_grammar(name, TOOLS, tokenizer, required=required, several=many)
        for required, many in ((True, True), (True, False), (False, False))
    )
    assert [accepts(tokenizer, grammar, one) for grammar in (several, single, optional)] == [True] * 3
    assert [accepts(tokenizer, grammar, two) for grammar in (several, single, optional)] == [
        True,
        False,
        False,
    ]
    texts = ["", "Hello", f"Hello {one}"]
    assert [accepts(tokenizer, optional, text) for text in texts] == [True] * 3
    assert not any(accepts(tokenizer, several, text) for text in texts)
    assert not accepts(tokenizer, several, one.replace("UTC", "CET"))


@pytest.fixture
def thinking(server, monkeypatch):
    """The prompt opens a block of reasoning as R1's does, and the model ends it after a few words."""
    tokenizer, template = server.engine.tokenizer, server.engine.chat_template
    encode, sample = template.encode, Sampler.sample
    thoughts = tokenizer.encode("a thought</think>", add_special=False)

    def opening(*args, **kwargs):
        return [*encode(*args, **kwargs), *tokenizer.encode("<think>\n", add_special=False)]

    def think(self, logits, sequences):
        chosen = sample(self, logits, sequences)
        counts = [sequence.num_output_tokens for sequence in sequences]
        return [
            SampledToken(thoughts[count]) if count < len(thoughts) else token
            for count, token in zip(counts, chosen, strict=True)
        ]

    monkeypatch.setattr(type(template), "encode", lambda self, *args, **kwargs: opening(*args, **kwargs))
    monkeypatch.setattr(Sampler, "sample", think)


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_holds_after_reasoning(client_of, thinking, stream):
    form = {"type": "json_schema", "json_schema": {"name": "w", "schema": WEATHER}}
    client = client_of("deepseek_v3")
    answer = chat(client, tools=openai.NOT_GIVEN, response_format=form, stream=stream)
    if stream:
        deltas = [choice.delta for chunk in answer for choice in chunk.choices]
        reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
        content = "".join(delta.content or "" for delta in deltas)
    else:
        reasoning = answer.choices[0].message.reasoning_content
        content = answer.choices[0].message.content
    assert reasoning == "a thought"
    jsonschema.validate(json.loads(content), WEATHER)


def test_a_forced_call_after_reasoning(client_of, thinking):
    answer = chat(client_of("deepseek_v3"), tool_choice="required", parallel_tool_calls=False).choices[0]
    assert answer.message.reasoning_content == "a thought"
    assert answer.finish_reason == "tool_calls"
    check(answer.message.tool_calls)

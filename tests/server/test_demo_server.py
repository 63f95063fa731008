"""The real `openai` client against `hybrid serve` with the demo model."""

from __future__ import annotations

import asyncio
import collections
import json

import httpx
import openai
import pytest

USER = [{"role": "user", "content": "Tell me a story about a fox."}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "parameters": {"type": "object"},
        },
    }
]


@pytest.fixture(scope="module")
def client(demo_server):
    with openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client, **options):
    return client.chat.completions.create(
        **{"model": "demo", "messages": USER, "temperature": 0, "max_tokens": 24, **options}
    )


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.meta["n_ctx"], model.meta["n_vocab"]) == ("demo", 2048, 4096)
    assert model.meta["architecture"] == "deepseek2"
    assert model.meta["n_params"] > 10_000_000


def test_a_stream_says_what_a_whole_answer_says(client):
    whole = chat(client)
    assert whole.choices[0].finish_reason == "length"
    assert whole.choices[0].message.role == "assistant"
    assert len(whole.choices[0].message.content) > 20
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 24
    assert whole.timings["predicted_n"] == 24
    assert whole.timings["predicted_per_second"] > 0
    assert whole.timings["prompt_n"] + whole.timings["cache_n"] == whole.usage.prompt_tokens


def test_a_second_turn_is_cached(client):
    long = [{"role": "user", "content": "Tell me about the sea and the ships. " * 30}]
    first = chat(client, messages=long, max_tokens=2)
    again = chat(client, messages=long, max_tokens=2)
    assert again.usage.prompt_tokens_details.cached_tokens > first.usage.prompt_tokens / 2
    assert again.timings["cache_n"] == again.usage.prompt_tokens_details.cached_tokens
    assert again.choices[0].message.content == first.choices[0].message.content


def test_log_probabilities(client):
    answer = chat(client, logprobs=True, top_logprobs=3, max_tokens=5)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == 5
    assert "".join(token.token for token in tokens) == answer.choices[0].message.content
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob  # greedy
        assert bytes(token.bytes).decode() == token.token


def test_stop_strings(client):
    whole = chat(client).choices[0].message.content
    stop = whole[10:14]
    stopped = chat(client, stop=[stop])
    assert stopped.choices[0].message.content == whole[: whole.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    streamed = "".join(c.choices[0].delta.content or "" for c in chat(client, stop=stop, stream=True))
    assert streamed == stopped.choices[0].message.content


def test_seeds(client):
    texts = [chat(client, temperature=1.0, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_several_choices(client):
    answer = chat(client, n=3, temperature=1.0, seed=5)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert answer.usage.completion_tokens == 72
    streamed = collections.defaultdict(str)
    for chunk in chat(client, n=3, temperature=1.0, seed=5, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert [streamed[index] for index in range(3)] == texts


def test_tools_are_passed_to_the_template(client):
    assert chat(client, tools=TOOLS, tool_choice="auto").choices[0].message.content
    assert chat(client, tools=TOOLS, tool_choice="none").choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        chat(client, tools=TOOLS, tool_choice="required")
    called = [
        *USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "a fox"},
    ]
    assert chat(client, messages=called).choices[0].message.content


def test_text_completions(client):
    prompts = ["Once upon a time", "The old"]
    answer = client.completions.create(
        model="demo", prompt=prompts, temperature=0, max_tokens=8, logprobs=2, echo=True
    )
    for choice, prompt in zip(answer.choices, prompts, strict=True):
        assert choice.text.startswith(prompt)
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens).endswith(answer.choices[0].text)
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])


def test_errors(client):
    with pytest.raises(openai.NotFoundError) as found:
        chat(client, model="gpt-5")
    assert found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as found:
        chat(client, top_p=2)
    assert found.value.param == "top_p"
    with pytest.raises(openai.BadRequestError) as found:
        chat(client, messages=[{"role": "user", "content": "sea " * 5000}])
    assert found.value.type == "exceed_context_size_error"
    assert found.value.body["n_ctx"] == 2048


def test_two_hundred_clients_and_a_queue_of_32(demo_server):
    """Each gets the greedy text of its own prompt, or a 429; nothing is lost or mixed up."""
    places = ("sea", "hill", "mill", "fair")
    prompts = [f"{name} went to the {place} and" for name in "ABCDEFGHIJ" for place in places]
    body = {"temperature": 0, "max_tokens": 16}

    async def ask(client, prompt):
        answer = await client.post("/v1/completions", json={**body, "prompt": prompt})
        return prompt, answer

    async def run():
        limits = httpx.Limits(max_connections=250)
        async with httpx.AsyncClient(base_url=demo_server.url, timeout=60, limits=limits) as client:
            alone = {prompt: (await ask(client, prompt))[1] for prompt in prompts}
            return alone, await asyncio.gather(*(ask(client, prompts[i % len(prompts)]) for i in range(200)))

    alone, answers = asyncio.run(run())
    statuses = collections.Counter(answer.status_code for _, answer in answers)
    assert set(statuses) == {200, 429}, statuses
    assert statuses[200] >= 40
    for prompt, answer in answers:
        if answer.status_code == 200:
            expected = alone[prompt].json()
            assert answer.json()["choices"] == expected["choices"]
        else:
            assert int(answer.headers["retry-after"]) >= 1
    metrics = httpx.get(f"{demo_server.url}/metrics").text
    assert "hybrid:num_requests_running 0.0" in metrics
    assert "hybrid:num_requests_waiting 0.0" in metrics


def test_structured_output(client):
    schema = {
        "type": "object",
        "properties": {
            "name": {"enum": ["fox", "hen"]},
            "legs": {"type": "integer", "minimum": 2, "maximum": 4},
        },
        "required": ["name", "legs"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": schema, "strict": True}}
    found = json.loads(chat(client, response_format=form, max_tokens=60).choices[0].message.content)
    assert found["name"] in ("fox", "hen")
    assert found["legs"] in (2, 3, 4)
    streamed = chat(client, response_format=form, max_tokens=60, stream=True)
    assert json.loads("".join(c.choices[0].delta.content or "" for c in streamed)) == found
    answer = chat(client, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert answer.choices[0].message.content in ("yes", "no")
    assert answer.choices[0].finish_reason == "stop"
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError):
        chat(client, response_format=wrong)
    with pytest.raises(openai.BadRequestError):
        chat(client, extra_body={"structured_outputs": {"regex": "("}}, stream=True)


def test_other_protocols_say_the_same(client, demo_server):
    text = chat(client).choices[0].message.content
    response = client.responses.create(
        model="demo", input=USER[0]["content"], temperature=0, max_output_tokens=24
    )
    assert response.output_text == text
    body = {"messages": USER, "max_tokens": 24, "temperature": 0}
    message = httpx.post(f"{demo_server.url}/v1/messages", json=body, timeout=20).json()
    assert message["content"] == [{"type": "text", "text": text}]

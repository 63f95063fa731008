"""A second turn computes what is new and nothing else, also where the template drops earlier reasoning."""

from __future__ import annotations

import time

import openai
import pytest

from hybrid.async_llm import AsyncLLM

WORDS = "The fox went to the sea and asked the old fisherman for a boat. "


@pytest.fixture(scope="module")
def server(start_engine):
    return start_engine(AsyncLLM("demo", num_threads=1, max_num_seqs=2))


def ask(server, messages, **options):
    """Text, usage and seconds to the first token."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        begun, first, text, usage = time.perf_counter(), None, "", None
        for chunk in client.chat.completions.create(
            model="demo", messages=messages, temperature=0, max_tokens=8, stream=True,
            stream_options={"include_usage": True}, **options,
        ):  # fmt: skip
            for choice in chunk.choices:
                if choice.delta.content or getattr(choice.delta, "reasoning_content", None):
                    first = first or time.perf_counter() - begun
                    text += choice.delta.content or ""
            usage = chunk.usage or usage
    return text, usage, first


@pytest.mark.parametrize("thinks", [False, True])
def test_the_second_turn_of_a_long_conversation(server, monkeypatch, thinks):
    if thinks:
        template = server.engine.chat_template
        encode = type(template).encode

        def dropping(self, messages, **kwargs):
            kept = [{**m, "content": m["content"].split("</think>")[-1]} for m in messages]
            opened = server.engine.tokenizer.encode("<think>\n", add_special=False)
            return [*encode(self, kept, **kwargs), *opened]

        monkeypatch.setattr(type(template), "encode", dropping)
    begin = "again" if thinks else "once"
    history = [{"role": "user", "content": f"{begin}: {WORDS * 110}"}]
    answer, first, first_s = ask(server, history)
    said = f"I think so.</think>{answer}" if thinks else answer
    turn = [*history, {"role": "assistant", "content": said}, {"role": "user", "content": "And then?"}]
    _, second, second_s = ask(server, turn)
    cached = second.prompt_tokens_details.cached_tokens
    print(
        f"{first.prompt_tokens} tokens, first token after {first_s:.3f} s; then {second.prompt_tokens}, "
        f"{cached} of them cached, after {second_s:.3f} s: {first_s / second_s:.1f} x shorter"
    )
    assert first.prompt_tokens > 1400
    # What differs from the first prompt's end on is computed, and no more than a block before it.
    assert second.prompt_tokens - cached < 100

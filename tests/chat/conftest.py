"""A byte-level vocabulary with the control tokens of several families, and templates of their shapes."""

from __future__ import annotations

import pytest

from hybrid.tokenizer import Tokenizer
from hybrid.tokenizer.byte_alphabet import BYTE_CHARS

CONTROL = {
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>",
                 "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"),
    "chatml": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
               "<|end_header_id|>", "<|eot_id|>"),
    "minimax": ("]~!b[", "[e~[", "]~b]"),
    "mistral": ("<s>", "</s>", "[INST]", "[/INST]", "<s>[INST]"),
    "odd": ("Human:", "字", " <|pad|>", "\n\nUser:"),
}  # fmt: skip

DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'tool' %}<｜tool▁outputs▁begin｜>{{ m.content }}<｜tool▁outputs▁end｜>"
    "{% elif m.role == 'assistant' %}<｜Assistant｜>"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}{% endfor %}{% else %}{% set text = m.content %}"
    "{% if '</think>' in text %}{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{{ text | trim }}{% endif %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
CHATML = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
TEMPLATES = {"deepseek": DEEPSEEK, "chatml": CHATML, "llama3": LLAMA3}


def make_tokenizer(family: str, extra: dict[str, int] | None = None) -> Tokenizer:
    control = CONTROL[family]
    extra = {"<think>": 4, "</think>": 4} if extra is None else extra
    texts = [text for text in control if text not in BYTE_CHARS]
    tokens = [*BYTE_CHARS, *texts, *extra]
    types = [3 if text in control else 1 for text in BYTE_CHARS] + [3] * len(texts) + list(extra.values())
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "deepseek-v3",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": tokens.index(control[0]),
        "tokenizer.ggml.eos_token_id": tokens.index(control[1]),
    }
    return Tokenizer.from_gguf(metadata)


@pytest.fixture(scope="session")
def tokenizer_of():
    return make_tokenizer


@pytest.fixture(scope="session")
def templates():
    return TEMPLATES


@pytest.fixture(scope="session")
def families():
    return CONTROL

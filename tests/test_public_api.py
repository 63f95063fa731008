"""What `import hybrid` offers, and what it does not load."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import metadata
from importlib.resources import files

import pytest

import hybrid

# Names and order are the interface: adding at the end is fine, changing is not. Of keywords, names alone.
SIGNATURES = {
    "LLM.__init__": [
        "self", "model", "rules", "max_model_len", "num_threads", "isa", "kv_format", "seed",
        "max_num_seqs", "max_num_batched_tokens", "ram_bytes", "fit", "experts_per_token",
        "expert_threshold", "kv_cache_tokens", "numa", "packed_cache", "cuda_graph", "trace", "vram_bytes",
        "progress",
    ],
    "AsyncLLM.__init__": [
        "self", "model", "rules", "max_model_len", "num_threads", "isa", "kv_format", "seed",
        "max_num_seqs", "max_num_batched_tokens", "ram_bytes", "fit", "experts_per_token",
        "expert_threshold", "kv_cache_tokens", "numa", "packed_cache", "cuda_graph", "trace", "vram_bytes",
        "progress", "max_queue", "max_queue_wait_s",
    ],
    "AsyncLLM.generate": ["self", "prompt", "sampling_params", "request_id", "on_prompt"],
    "AsyncLLM.abort": ["self", "request_id"],
    "AsyncLLM.close": ["self"],
    "LLM.generate": ["self", "prompts", "sampling_params", "use_tqdm"],
    "LLM.chat": ["self", "messages", "sampling_params", "use_tqdm", "template_options"],
    "LLM.stream": ["self", "prompt", "sampling_params"],
    "LLM.stream_chat": ["self", "messages", "sampling_params", "template_options"],
    "LLM.plan": ["self"],
    "LLM.close": ["self"],
    "SamplingParams": [
        "n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos",
        "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "presence_penalty", "frequency_penalty",
        "repetition_penalty", "logit_bias", "allowed_token_ids", "include_stop_str_in_output",
        "skip_special_tokens", "structured_outputs",
    ],
    "StructuredOutputs": ["json", "regex", "choice", "grammar", "json_object", "after"],
    "RequestOutput": [
        "request_id", "prompt", "prompt_token_ids", "prompt_logprobs", "outputs", "finished", "metrics",
        "num_cached_tokens",
    ],
    "CompletionOutput": [
        "index", "text", "token_ids", "cumulative_logprob", "logprobs", "finish_reason", "stop_reason",
    ],
}  # fmt: skip


def test_the_names():
    assert hybrid.__all__ == [
        "LLM",
        "AsyncLLM",
        "CompletionOutput",
        "HybridError",
        "RequestOutput",
        "SamplingParams",
        "StructuredOutputs",
        "__version__",
    ]
    assert dir(hybrid) == sorted(hybrid.__all__)
    for name in hybrid.__all__:
        assert getattr(hybrid, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = hybrid.nonsense


def test_the_version_is_the_distribution_s():
    assert hybrid.__version__ == metadata.version("hybrid-moe")


@pytest.mark.parametrize("path", SIGNATURES)
def test_signatures(path):
    thing = hybrid
    for name in path.split("."):
        thing = getattr(thing, name)
    assert list(inspect.signature(thing).parameters) == SIGNATURES[path]


def test_types_are_published():
    assert files("hybrid").joinpath("py.typed").is_file()


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import hybrid", {"torch", "numpy", "tokenizers", "jinja2", "tqdm"}),
        ("from hybrid import SamplingParams", {"torch", "numpy"}),
        ("from hybrid import StructuredOutputs", {"torch", "numpy", "llguidance"}),
        ("import hybrid.engine.guidance", {"llguidance"}),
        ("from hybrid import RequestOutput", {"torch"}),
        ("import hybrid.gguf", {"torch", "gguf", "tokenizers"}),
        ("import hybrid.placement.planner", {"torch"}),
        ("import hybrid.tokenizer, hybrid.chat", {"torch", "transformers"}),
        ("import hybrid.kernels.cpu", {"torch"}),
    ],
)
def test_imports_stay_light(statement, heavy):
    code = f"import sys; {statement}; sys.exit(str({heavy} & set(sys.modules) or ''))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == ""

"""Every environment variable of the runtime's own, in one table.

A variable is parsed when it is asked for; a bad value raises ``ConfigError`` that names the
variable, the value and what is accepted. Each command-line flag ``--some-flag`` has the variable
``HYBRID_SOME_FLAG`` here, and takes its parser and its help from it; a flag that is given wins.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hybrid.errors import ConfigError


def integer(minimum: int) -> Callable[[str], int]:
    """A parser of integers >= ``minimum``."""

    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise ValueError
        return value

    return parse


def integers(minimum: int) -> Callable[[str], tuple[int, ...]]:
    """A parser of comma-separated integers >= ``minimum``."""

    def parse(text: str) -> tuple[int, ...]:
        return tuple(integer(minimum)(item) for item in text.split(","))

    return parse


def one_of(*choices: str) -> Callable[[str], str]:
    """A parser that accepts exactly these words."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError
        return text

    return parse


def boolean(text: str) -> bool:
    """``1/true/yes/on`` or ``0/false/no/off``; the flag of such a variable takes no value."""
    word = text.lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("0", "false", "no", "off"):
        return False
    raise ValueError


_UNITS: dict[str, int] = {
    **{unit: 1 << (10 * power) for power, unit in enumerate(("B", "KiB", "MiB", "GiB", "TiB"))},
    **{unit: 1 << (10 * power) for power, unit in enumerate(("K", "M", "G", "T"), 1)},
    **{unit: 10 ** (3 * power) for power, unit in enumerate(("kB", "MB", "GB", "TB"), 1)},
}


def n_bytes(text: str) -> int:
    """``24GiB``, ``24G`` (the same) or ``24GB``: a positive number of bytes."""
    number = text.rstrip("BKMGTikb")
    unit = text[len(number) :].strip()
    if unit not in _UNITS:
        raise ValueError
    value = float(number) * _UNITS[unit]
    if not 1 <= value < 1 << 60:
        raise ValueError
    return round(value)


def by_device(parse: Callable[[str], float]) -> Callable[[str], tuple[tuple[str | None, float], ...]]:
    """A parser of comma-separated ``[DEVICE=]VALUE``."""

    def parse_all(text: str) -> tuple[tuple[str | None, float], ...]:
        pairs = []
        for item in text.split(","):
            device, equals, value = item.rpartition("=")
            if bool(equals) != bool(device):
                raise ValueError
            pairs.append((device or None, parse(value)))
        return tuple(pairs)

    return parse_all


def share(text: str) -> float:
    """A parser of numbers from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError
    return value


def positive(text: str) -> float:
    """A parser of numbers above 0."""
    value = float(text)
    if not 0 < value < 1e9:
        raise ValueError
    return value


def port(text: str) -> int:
    """A parser of TCP ports; 0 asks for a free one."""
    value = int(text)
    if not 0 <= value < 1 << 16:
        raise ValueError
    return value


def names(text: str) -> tuple[str, ...]:
    """A parser of comma-separated names without spaces."""
    found = tuple(item.strip() for item in text.split(","))
    if any(not name or len(name.split()) != 1 for name in found):
        raise ValueError
    return found


def numa_mode(text: str) -> str:
    """A parser of NUMA modes."""
    if text.startswith("node:") and text[5:].isdecimal() and len(text) < 9:
        return text
    if text not in ("auto", "none", "replicate", "shard", "interleave"):
        raise ValueError
    return text


@dataclass(frozen=True)
class EnvVar:
    """One variable: how to parse it, and what to tell people about it."""

    parse: Callable[[str], Any]
    accepts: str
    purpose: str


_SWITCH = "1 or 0"
_NUMBER = "a number"
_COUNT = "an integer >= 1"
_SECONDS = "a number of seconds > 0"
_LENGTHS = "N, LOW-HIGH or normal:MEAN,DEVIATION"

VARIABLES: dict[str, EnvVar] = {
    # Models and the machine.
    "HYBRID_MODEL": EnvVar(str, "a GGUF path, or demo", "model: a GGUF file, or demo"),
    "HYBRID_RULES": EnvVar(
        str,
        "a YAML file or a shipped name",
        "placement rules: auto, a YAML file or a name that `hybrid rules list` shows",
    ),
    "HYBRID_OVERRIDE_TENSOR": EnvVar(
        str, "REGEX=DEVICE", "place tensors whose name has this regex, as in exps=CPU; may be given again"
    ),
    "HYBRID_CPU_MOE": EnvVar(boolean, _SWITCH, "keep all routed experts on the CPU"),
    "HYBRID_N_CPU_MOE": EnvVar(integer(0), "an integer >= 0", "keep those of the first N layers on the CPU"),
    "HYBRID_N_GPU_LAYERS": EnvVar(
        integer(0), "an integer >= 0", "the output and the layers before it, N in all, on the GPU, others not"
    ),
    "HYBRID_CTX_SIZE": EnvVar(
        integer(0), "an integer >= 0", "context tokens; 0 = the model's own (default: that, at most 8192)"
    ),
    "HYBRID_KV_FORMAT": EnvVar(
        one_of("f32", "f16", "bf16", "q8_0"),
        "f32, f16, bf16 or q8_0",
        "format of the KV cache: f32, f16, bf16 or q8_0",
    ),
    "HYBRID_EXPERTS_PER_TOKEN": EnvVar(
        integer(1), _COUNT, "run so many of a token's experts, the best (default: the model's number)"
    ),
    "HYBRID_EXPERT_THRESHOLD": EnvVar(
        share,
        "a number from 0 to 1",
        "run no experts that weigh less than this share of a token's heaviest (default: 0)",
    ),
    "HYBRID_THREADS": EnvVar(integer(1), _COUNT, "CPU worker threads (default: one for each physical core)"),
    "HYBRID_NUMA": EnvVar(
        numa_mode,
        "auto, none, replicate, shard, interleave or node:N",
        "where weights go on several NUMA nodes: auto, none, replicate, shard, interleave or node:N",
    ),
    "HYBRID_PACKED_CACHE": EnvVar(
        str, "a folder", "keep packed weights in this folder, for faster starts; as large as the model"
    ),
    "HYBRID_NO_CUDA_GRAPH": EnvVar(
        boolean, _SWITCH, "queue every decode step of a GPU by Python, to look for faults; the same tokens"
    ),
    "HYBRID_TRACE": EnvVar(
        str, "a file", "write what ran when to this file, as a Chrome trace (ui.perfetto.dev opens it)"
    ),
    "HYBRID_ISA": EnvVar(
        str,
        "a name `hybrid doctor` lists",
        "CPU kernels: scalar, avx2, avxvnni, avx512vnni, avx512vbmi or amx (default: the best)",
    ),
    "HYBRID_DEVICE": EnvVar(str, "a device", "device whose kernels are measured"),
    # Generation.
    "HYBRID_N_PREDICT": EnvVar(integer(-1), "an integer >= 1, or -1", "tokens to write; -1 = no limit"),
    "HYBRID_TEMP": EnvVar(float, _NUMBER, "temperature; 0 = greedy"),
    "HYBRID_TOP_K": EnvVar(int, "an integer", "sample from the k likeliest tokens; 0 = all"),
    "HYBRID_TOP_P": EnvVar(float, _NUMBER, "sample from the likeliest tokens that hold this probability"),
    "HYBRID_MIN_P": EnvVar(float, _NUMBER, "drop tokens below this share of the likeliest one"),
    "HYBRID_REPEAT_PENALTY": EnvVar(float, _NUMBER, "divide the logits of tokens seen before; 1 = off"),
    "HYBRID_PRESENCE_PENALTY": EnvVar(float, _NUMBER, "subtract once from tokens written before; 0 = off"),
    "HYBRID_FREQUENCY_PENALTY": EnvVar(float, _NUMBER, "subtract for each time a token was written; 0 = off"),
    "HYBRID_SEED": EnvVar(integer(0), "an integer >= 0", "seed of the sampling (default: a fresh one)"),
    "HYBRID_STOP": EnvVar(str, "a text", "end the text before this string; may be given again"),
    "HYBRID_IGNORE_EOS": EnvVar(boolean, _SWITCH, "go on after an end-of-text token"),
    "HYBRID_ECHO": EnvVar(boolean, _SWITCH, "print the prompt in front of its continuation"),
    "HYBRID_SYSTEM": EnvVar(str, "a text", "system message"),
    # Commands for measuring and describing.
    "HYBRID_OUTPUT": EnvVar(
        one_of("md", "csv", "json", "jsonl", "yaml", "html"),
        "md, csv, json, jsonl, yaml or html",
        "output format",
    ),
    "HYBRID_TENSORS": EnvVar(boolean, _SWITCH, "list every tensor"),
    "HYBRID_N_PROMPT": EnvVar(
        integers(0), "integers >= 0, as in 512,2048", "prompt tokens of a test; 0 = no such test"
    ),
    "HYBRID_N_GEN": EnvVar(
        integers(0), "integers >= 0, as in 32,128", "generated tokens of a test; 0 = no such test"
    ),
    "HYBRID_N_DEPTH": EnvVar(
        integers(0), "integers >= 0, as in 0,4096", "tokens in the context before a test"
    ),
    "HYBRID_REPETITIONS": EnvVar(integer(1), _COUNT, "runs of each test, after a warm-up"),
    "HYBRID_BACKED": EnvVar(
        boolean,
        _SWITCH,
        "take memory and give it back before each step: a virtual machine's host backs it then",
    ),
    "HYBRID_UBATCH_SIZE": EnvVar(integer(1), _COUNT, "prompt tokens the model is given at once"),
    "HYBRID_PARALLEL": EnvVar(integer(1), _COUNT, "requests computed at once, each with a full context"),
    "HYBRID_FIT": EnvVar(boolean, _SWITCH, "shorten the context, then the steps, until the model fits"),
    "HYBRID_VRAM": EnvVar(
        by_device(n_bytes),
        "[DEVICE=]SIZE, as in 24GiB or cuda:1=16GiB",
        "memory to use of GPUs, as in 24GiB for cuda:0, or cuda:0=24GiB,cuda:1=16GiB",
    ),
    "HYBRID_CUDA_DEVICES": EnvVar(
        integers(0),
        "integers >= 0, as in 0,1 or 0,0",
        "the GPU that cuda:0, cuda:1 ... mean each; several may mean the same, to try a plan for more",
    ),
    "HYBRID_RAM": EnvVar(n_bytes, "a size, as in 512GiB", "RAM to use (default: what is free)"),
    "HYBRID_NODES": EnvVar(integer(1), _COUNT, "NUMA nodes"),
    "HYBRID_BANDWIDTH": EnvVar(
        by_device(positive),
        "[DEVICE=]GB/s, as in 200 or ram=200,pcie=25,cuda:0=936",
        "GB/s read from ram (of a node), pcie and cuda:N, as in 200, or ram=200,pcie=25,cuda:0=936",
    ),
    "HYBRID_EXPLAIN": EnvVar(str, "the name of a tensor", "show the rules tried for this tensor"),
    "HYBRID_EMIT": EnvVar(one_of("llama.cpp"), "llama.cpp", "print the plan as flags of: llama.cpp"),
    "HYBRID_CHUNKS": EnvVar(integer(1), _COUNT, "windows of the text to score (default: all)"),
    "HYBRID_KL_BASE": EnvVar(str, "a file", "compare with the log-probabilities in this file"),
    "HYBRID_SAVE_LOGPROBS": EnvVar(str, "a file", "keep this run's log-probabilities for --kl-base"),
    "HYBRID_PROFILE_TEXT": EnvVar(str, "a file, or -", "text to run, like those the model will be used for"),
    "HYBRID_PROFILE_OUT": EnvVar(str, "a file", "the usage profile to write"),
    # What `rules` and `synth` write, and where.
    "HYBRID_RULES_OUT": EnvVar(str, "a file", "the file to write"),
    "HYBRID_RULES_FORCE": EnvVar(boolean, _SWITCH, "overwrite the file"),
    "HYBRID_SYNTH_OUT": EnvVar(str, "a file", "the file to write"),
    "HYBRID_SYNTH_SEED": EnvVar(integer(0), "an integer >= 0", "seed of the random weights"),
    "HYBRID_SYNTH_EXPERTS": EnvVar(str, "a format", "format of the routed experts' gate and up"),
    "HYBRID_SYNTH_DOWN": EnvVar(str, "a format", "format of the routed experts' down"),
    "HYBRID_SYNTH_DENSE": EnvVar(str, "a format", "format of dense layers and shared experts"),
    "HYBRID_SYNTH_ATTENTION": EnvVar(str, "a format", "format of attention"),
    "HYBRID_SYNTH_EMBEDDING": EnvVar(str, "a format", "format of the token embedding"),
    "HYBRID_SYNTH_LM_HEAD": EnvVar(str, "a format", "format of the output matrix"),
    "HYBRID_SYNTH_LAYERS": EnvVar(integer(1), _COUNT, "number of layers (default: the preset's)"),
    "HYBRID_SYNTH_NUM_EXPERTS": EnvVar(
        integer(1), _COUNT, "routed experts of a layer (default: the preset's)"
    ),
    "HYBRID_SYNTH_EXPERT_WIDTH": EnvVar(integer(1), _COUNT, "width of an expert (default: the preset's)"),
    "HYBRID_SYNTH_KV_B": EnvVar(
        one_of("split", "joint"), "split or joint", "attn_k_b and attn_v_b, or one attn_kv_b"
    ),
    "HYBRID_SYNTH_HEADER_ONLY": EnvVar(boolean, _SWITCH, "write the header without data, for planning"),
    "HYBRID_SYNTH_FORCE": EnvVar(boolean, _SWITCH, "overwrite the file"),
    # Serving.
    "HYBRID_HOST": EnvVar(str, "an address", "address to listen on"),
    "HYBRID_PORT": EnvVar(port, "a port, 0 to 65535", "port to listen on; 0 = a free one"),
    "HYBRID_API_KEY": EnvVar(str, "a text", "key that requests must have; may be given again"),
    "HYBRID_ALIAS": EnvVar(
        names, "names, as in deepseek,default", "names of the model in requests (default: the file's)"
    ),
    "HYBRID_ALLOWED_HOSTS": EnvVar(
        names, "names, as in box.lan,box", "host names to answer to without a key, besides this machine's"
    ),
    "HYBRID_CORS_ORIGINS": EnvVar(
        names, "origins, as in https://chat.example", "web pages that may call this server"
    ),
    "HYBRID_KV_CACHE_TOKENS": EnvVar(
        integer(1), _COUNT, "tokens the cache holds for all requests (default: --parallel contexts)"
    ),
    "HYBRID_MAX_QUEUE": EnvVar(integer(0), "an integer >= 0", "requests that may wait; one more gets 429"),
    "HYBRID_QUEUE_TIMEOUT": EnvVar(
        positive, _SECONDS, "seconds a request may wait to be begun (default: no limit)"
    ),
    "HYBRID_MAX_BODY": EnvVar(n_bytes, "a size, as in 8MiB", "largest body of a request"),
    "HYBRID_HEADER_TIMEOUT": EnvVar(positive, _SECONDS, "seconds in which a request's headers must arrive"),
    "HYBRID_BODY_TIMEOUT": EnvVar(positive, _SECONDS, "seconds in which its body must arrive"),
    "HYBRID_SEND_TIMEOUT": EnvVar(positive, _SECONDS, "seconds a client may take nothing of its answer"),
    "HYBRID_SHUTDOWN_TIMEOUT": EnvVar(
        positive, _SECONDS, "seconds that requests may go on after the first SIGTERM or Ctrl-C"
    ),
    "HYBRID_LOG_PROMPTS": EnvVar(boolean, _SWITCH, "write prompts to the log"),
    # Loading a server.
    "HYBRID_URL": EnvVar(str, "an address, as in http://127.0.0.1:8000", "the server to measure"),
    "HYBRID_CLIENTS": EnvVar(integer(1), _COUNT, "requests under way at once"),
    "HYBRID_REQUESTS": EnvVar(integer(1), _COUNT, "requests in all"),
    "HYBRID_DURATION": EnvVar(positive, _SECONDS, "seconds to begin requests, instead of a number of them"),
    "HYBRID_WATCH": EnvVar(
        integer(1), "a process id", "the server's process: print its memory, descriptors, threads and slope"
    ),
    "HYBRID_WATCH_INTERVAL": EnvVar(positive, _SECONDS, "seconds between two looks at that process"),
    "HYBRID_LONG_PROMPT": EnvVar(
        integer(2), "an integer >= 2", "instead: tokens of a prompt that arrives while --clients streams run"
    ),
    "HYBRID_RATE": EnvVar(positive, _NUMBER, "requests begun a second, at random times (default: no pause)"),
    "HYBRID_PROMPT_TOKENS": EnvVar(str, _LENGTHS, "prompt lengths: N, LOW-HIGH, or normal:MEAN,DEVIATION"),
    "HYBRID_OUTPUT_TOKENS": EnvVar(str, _LENGTHS, "answer lengths: N, LOW-HIGH, or normal:MEAN,DEVIATION"),
    "HYBRID_SHARED_PREFIX": EnvVar(integer(0), "an integer >= 0", "tokens that all prompts begin with"),
    "HYBRID_REQUEST_TIMEOUT": EnvVar(positive, _SECONDS, "seconds for one request"),
    "HYBRID_ALLOW_REMOTE": EnvVar(boolean, _SWITCH, "load a server on another machine"),
    "HYBRID_PULL_OUT": EnvVar(str, "a folder", "the folder to download to (default: the current one)"),
    "HF_ENDPOINT": EnvVar(str, "a URL", "the server `hybrid pull user/repo:QUANT` asks"),
    # Every command.
    "HYBRID_LOG_LEVEL": EnvVar(
        one_of("debug", "info", "warning", "error"),
        "debug, info, warning or error",
        "what to log on stderr: debug, info, warning or error",
    ),
    "HYBRID_DEBUG": EnvVar(boolean, _SWITCH, "show the traceback of a failure"),
}


def get(name: str, entry: EnvVar | None = None) -> Any:
    """Parsed value of ``name``, or ``None`` when it is unset or empty. ``entry`` replaces the table's.

    Raises:
        ConfigError: the value does not parse.
    """
    variable = VARIABLES[name] if entry is None else entry
    text = os.environ.get(name, "")
    if not text:
        return None
    try:
        return variable.parse(text)
    except ValueError:
        raise ConfigError(
            f"environment variable {name}={text!r} is invalid: expected {variable.accepts}"
        ) from None


def unknown() -> dict[str, str | None]:
    """Set ``HYBRID_*`` variables that nothing reads, each with the known name that is nearest."""
    names = [name for name in os.environ if name.startswith("HYBRID_") and name not in VARIABLES]
    return {
        name: next(iter(difflib.get_close_matches(name, VARIABLES, n=1, cutoff=0.8)), None) for name in names
    }

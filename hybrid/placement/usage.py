"""Usage profiles: which experts of each layer a model's tokens used, as a file that rules can name.

A profile is JSON; version 1 has exactly these keys::

    {"format": "hybrid-usage-profile", "version": 1,
     "model": {"file": "model.gguf", "architecture": "deepseek2", "hidden_size": 7168, "vocab_size": 129280,
               "router_sha256": "9f…"},
     "num_experts": 256, "num_experts_per_tok": 8,
     "tokens": {"prompt": 4096, "decode": 512},
     "layers": [{"layer": 3, "prompt": [17, …], "decode": [2, …]}, …]}

``tokens`` passed through every layer of the list, in steps of prompts and in steps that write. A layer's
counts, one for each expert, say how many of them used it. ``router_sha256`` is of the first listed layer's
router as the file stores it, so that files of one model in several formats, which all keep their routers as
they are, share a profile, and another model of the same shape does not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hybrid.errors import ConfigError
from hybrid.gguf import GGUFFile
from hybrid.placement.dimensions import Dimensions, read_dimensions
from hybrid.placement.roles import layer_of, role_of

FORMAT, VERSION = "hybrid-usage-profile", 1
PHASES = ("prompt", "decode")
MAX_BYTES = 64 << 20
_MAX_COUNT = 1 << 53
_KEYS = ("format", "version", "model", "num_experts", "num_experts_per_tok", "tokens", "layers")
_MODEL_KEYS = ("file", "architecture", "hidden_size", "vocab_size", "router_sha256")


@dataclass(frozen=True)
class ModelIdentity:
    """What a profile says of its model; ``file`` is for people alone."""

    file: str
    architecture: str
    hidden_size: int
    vocab_size: int
    router_sha256: str


@dataclass(frozen=True)
class Usage:
    """Tokens seen in each phase, and by layer and phase how many of them used each expert."""

    tokens: Mapping[str, int]
    layers: Mapping[int, Mapping[str, tuple[int, ...]]]


@dataclass(frozen=True)
class UsageProfile:
    """Usage of one model; ``source`` is the file it was read from, for messages."""

    model: ModelIdentity
    num_experts: int
    num_experts_per_tok: int
    usage: Usage
    source: str = ""

    def rates(self, layer: int) -> tuple[float, ...]:
        """Uses of each expert by a token that is written; where none was, by one of a prompt."""
        phase = "decode" if self.usage.tokens["decode"] else "prompt"
        return tuple(count / self.usage.tokens[phase] for count in self.usage.layers[layer][phase])


def identify(file: GGUFFile, dims: Dimensions | None = None) -> ModelIdentity:
    """The identity of a model file that has its weights.

    Raises:
        ConfigError: it has no routed experts.
        GGUFError: it cannot be read.
    """
    dims = dims or read_dimensions(file)
    router = _first_router(file)
    digest = hashlib.sha256()
    size, step = file.tensors[router].n_bytes, 1 << 20
    buffer = bytearray(min(size, step))
    for start in range(0, size, step):
        count = min(step, size - start)
        file.read_into(router, buffer, start, count)
        digest.update(memoryview(buffer)[:count])
    return ModelIdentity(
        file.path.name, file.architecture, dims.hidden_size, dims.vocab_size, digest.hexdigest()
    )


def _first_router(file: GGUFFile) -> str:
    routers = [name for name in file.tensors if role_of(name) == "router" and name.endswith(".weight")]
    if not routers:
        raise ConfigError(
            f"{file.path}: the model has no routed experts, so there is no use of them to profile"
        )
    return min(routers, key=lambda name: layer_of(name) or 0)


def write_profile(profile: UsageProfile, path: str | Path) -> None:
    """Writes a profile; what was there before stays until the new one is whole.

    Raises:
        OSError: the file cannot be written.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": vars(profile.model),
        "num_experts": profile.num_experts,
        "num_experts_per_tok": profile.num_experts_per_tok,
        "tokens": {phase: profile.usage.tokens[phase] for phase in PHASES},
        "layers": [
            {"layer": layer, **{phase: list(counts[phase]) for phase in PHASES}}
            for layer, counts in sorted(profile.usage.layers.items())
        ],
    }
    target = Path(path)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(content) + "\n", encoding="utf-8")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def read_profile(path: str | Path, fail: Callable[[str], NoReturn] | None = None) -> UsageProfile:
    """Reads a profile and checks it by itself; `check_model` compares it with a model.

    Args:
        fail: raises about a problem, which names the file; ``None``: a `ConfigError`.

    Raises:
        ConfigError: unreadable, not a profile, of another version, or its numbers contradict each other.
    """
    reading = _Reading(str(path), fail or _refuse)
    return reading.profile(reading.load())


def check_model(
    profile: UsageProfile,
    file: GGUFFile,
    dims: Dimensions,
    *,
    weights: bool,
    fail: Callable[[str], NoReturn] | None = None,
) -> None:
    """Proves that a profile is of this model; without its ``weights``, as far as the header tells.

    Raises:
        ConfigError: it is of another model.
    """
    fail = fail or _refuse
    expected = {
        "architecture": file.architecture,
        "hidden_size": dims.hidden_size,
        "vocab_size": dims.vocab_size,
    }
    found = {key: getattr(profile.model, key) for key in expected}
    expected["num_experts"], found["num_experts"] = dims.num_experts, profile.num_experts
    hint = f"profile this model with `hybrid profile {file.path.name} -o FILE`"
    made_of = f"{profile.source}: this usage profile is of another model, {profile.model.file}"
    for key, value in expected.items():
        if found[key] != value:
            fail(f"{made_of}: {key}: expected {value}, as in {file.path.name}, found {found[key]}; {hint}")
    names = (name for name in file.tensors if role_of(name) == "routed_experts")
    routed = {layer for name in names if (layer := layer_of(name)) in dims.layers}
    listed = set(profile.usage.layers)
    if listed != routed:
        missing, extra = sorted(routed - listed), sorted(listed - routed)
        what = f"layer {missing[0]} is missing" if missing else f"layer {extra[0]} has no routed experts"
        fail(f"{made_of}: layers: {what} of {len(routed)} with experts in {file.path.name}; {hint}")
    if weights and identify(file, dims).router_sha256 != profile.model.router_sha256:
        fail(f"{made_of}, of the same shape: the routers' weights differ from {file.path.name}; {hint}")


def _refuse(problem: str) -> NoReturn:
    raise ConfigError(problem)


class _Reading:
    """From a file to a profile; every refusal names the file and the key."""

    def __init__(self, source: str, fail: Callable[[str], NoReturn]) -> None:
        self.source, self._fail = source, fail

    def fail(self, problem: str) -> NoReturn:
        self._fail(f"{self.source}: {problem}")

    def load(self) -> dict[str, Any]:
        try:
            with Path(self.source).open("rb") as stream:
                data = stream.read(MAX_BYTES + 1)
        except OSError as error:
            self.fail(f"cannot read the usage profile: {error.strerror}")
        if len(data) > MAX_BYTES:
            self.fail(f"larger than {MAX_BYTES >> 20} MiB, which no usage profile is; is this another file?")
        try:
            found = json.loads(data, object_pairs_hook=self._object, parse_constant=self._constant)
        except (ValueError, RecursionError) as error:
            self.fail(f"not a usage profile, or cut short: {error}")
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            self.fail(f'not a usage profile: expected "format": "{FORMAT}"; `hybrid profile` writes one')
        if found.get("version") != VERSION or isinstance(found["version"], bool):
            self.fail(f"version: expected {VERSION}, found {found.get('version')!r}; profile the model again")
        return found

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands twice")
        return found

    def _constant(self, name: str) -> NoReturn:
        raise ValueError(f"{name} is no number")

    def profile(self, found: dict[str, Any]) -> UsageProfile:
        self.keys("", found, _KEYS)
        num_experts = self.integer("num_experts", found["num_experts"], 1, 1 << 16)
        per_token = self.integer("num_experts_per_tok", found["num_experts_per_tok"], 1, num_experts)
        tokens = self.keys("tokens", found["tokens"], PHASES)
        for phase in PHASES:
            self.integer(f"tokens.{phase}", tokens[phase], 0, _MAX_COUNT)
        if not any(tokens.values()):
            self.fail("tokens: expected at least one, found none; profile a longer text")
        layers = found["layers"]
        if not isinstance(layers, list) or not layers:
            self.fail("layers: expected a list of at least one layer")
        counts: dict[int, Mapping[str, tuple[int, ...]]] = {}
        for index, entry in enumerate(layers):
            where = f"layers[{index}]"
            self.keys(where, entry, ("layer", *PHASES))
            layer = self.integer(f"{where}.layer", entry["layer"], 0, 1 << 16)
            if layer in counts:
                self.fail(f"{where}: layer {layer} stands twice")
            counts[layer] = {
                phase: self.counts(f"{where}.{phase}", entry[phase], num_experts, tokens[phase], per_token)
                for phase in PHASES
            }
        usage = Usage(tokens, counts)
        return UsageProfile(self.model(found["model"]), num_experts, per_token, usage, self.source)

    def model(self, value: Any) -> ModelIdentity:
        found = self.keys("model", value, _MODEL_KEYS)
        for key in ("file", "architecture", "router_sha256"):
            if not isinstance(found[key], str) or not 1 <= len(found[key]) <= 1000:
                self.fail(f"model.{key}: expected a text, found {_shown(found[key])}")
        for key in ("hidden_size", "vocab_size"):
            self.integer(f"model.{key}", found[key], 0, 1 << 40)
        return ModelIdentity(**found)

    def counts(
        self, where: str, value: Any, num_experts: int, tokens: int, per_token: int
    ) -> tuple[int, ...]:
        if not isinstance(value, list) or len(value) != num_experts:
            found = f"{len(value)}" if isinstance(value, list) else _shown(value)
            self.fail(f"{where}: expected {num_experts} counts, one for each expert, found {found}")
        for expert, count in enumerate(value):
            self.integer(f"{where}[{expert}]", count, 0, tokens)
        if sum(value) > tokens * per_token:
            self.fail(
                f"{where}: expected at most {tokens * per_token} uses by {tokens} tokens with {per_token} "
                f"experts each, found {sum(value)}"
            )
        return tuple(value)

    def keys(self, where: str, value: Any, known: tuple[str, ...]) -> dict[str, Any]:
        """A mapping that has exactly these keys."""
        what = where or "the profile"
        if not isinstance(value, dict):
            self.fail(f"{what}: expected a mapping, found {_shown(value)}")
        wrong = sorted(value.keys() - set(known)), [key for key in known if key not in value]
        if wrong[0] or wrong[1]:
            problem = f"unknown key {_shown(wrong[0][0])}" if wrong[0] else f"{wrong[1][0]!r} is missing"
            self.fail(f"{what}: {problem}; expected {', '.join(known)}")
        return value

    def integer(self, where: str, value: Any, low: int, high: int) -> int:
        if type(value) is not int or not low <= value <= high:
            self.fail(f"{where}: expected a whole number from {low} to {high}, found {_shown(value)}")
        return value


def _shown(value: Any) -> str:
    """Of a value from a file, no more than a line takes."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

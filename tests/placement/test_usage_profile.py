"""Usage profiles: what is written is read, and nothing else is."""

from __future__ import annotations

import copy
import json

import pytest

from hybrid.errors import ConfigError
from hybrid.gguf import GGUFFile
from hybrid.placement.dimensions import read_dimensions
from hybrid.placement.usage import (
    MAX_BYTES,
    Usage,
    UsageProfile,
    check_model,
    identify,
    read_profile,
    write_profile,
)
from hybrid.synth import resolve_shape, synthesise

CONTENT = {
    "format": "hybrid-usage-profile",
    "version": 1,
    "model": {
        "file": "m.gguf", "architecture": "deepseek2", "hidden_size": 256, "vocab_size": 1024,
        "router_sha256": "00",
    },
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "tokens": {"prompt": 4, "decode": 2},
    "layers": [{"layer": 1, "prompt": [4, 3, 1], "decode": [0, 2, 2]}],
}  # fmt: skip


def saved(tmp_path, content):
    path = tmp_path / "usage.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def changed(*steps):
    """The content with values replaced: a path of keys, then the value."""
    found = copy.deepcopy(CONTENT)
    for *path, key, value in steps:
        at = found
        for part in path:
            at = at[part]
        if value is KeyError:
            del at[key]
        else:
            at[key] = value
    return found


def test_reading_gives_what_was_written(tmp_path):
    profile = read_profile(saved(tmp_path, CONTENT))
    assert profile.rates(1) == (0.0, 1.0, 1.0)
    write_profile(profile, tmp_path / "again.json")
    again = read_profile(tmp_path / "again.json")
    assert (again.model, again.usage) == (profile.model, profile.usage)
    assert json.loads((tmp_path / "again.json").read_text()) == CONTENT
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []


def test_without_written_tokens_those_of_prompts_count(tmp_path):
    steps = ("tokens", "decode", 0), ("layers", 0, "decode", [0, 0, 0])
    assert read_profile(saved(tmp_path, changed(*steps))).rates(1) == (1.0, 0.75, 0.25)


WRONG = {
    "not json": ("{", "not a usage profile, or cut short"),
    "deep": ("[" * 100_000, "not a usage profile, or cut short"),
    "nan": (json.dumps(CONTENT).replace("[4, 3, 1]", "[NaN, 3, 1]"), "NaN is no number"),
    "twice": (json.dumps(CONTENT).replace('"version": 1,', '"version": 1, "version": 1,'), "stands twice"),
    "huge number": (json.dumps(CONTENT).replace("[4,", f"[{'9' * 5000},"), "cut short"),
    "a list": ("[]", 'expected "format": "hybrid-usage-profile"'),
    "format": (changed(("format", "x")), 'expected "format"'),
    "version": (changed(("version", 2)), "version: expected 1, found 2; profile the model again"),
    "true": (changed(("version", True)), "version: expected 1, found True"),
    "unknown key": (changed(("extra", 1)), "the profile: unknown key 'extra'"),
    "missing key": (changed(("model", "file", KeyError)), "model: 'file' is missing"),
    "model": (changed(("model", [])), "model: expected a mapping, found a list"),
    "name": (changed(("model", "file", 7)), "model.file: expected a text, found 7"),
    "experts": (changed(("num_experts", 4)), r"layers\[0\].prompt: expected 4 counts, .* found 3"),
    "negative": (changed(("layers", 0, "prompt", [4, -1, 1])), r"prompt\[1\]: .* from 0 to 4, found -1"),
    "fraction": (changed(("layers", 0, "prompt", [4, 0.5, 1])), r"prompt\[1\]: .* found 0.5"),
    "too often": (changed(("layers", 0, "decode", [0, 3, 1])), r"decode\[1\]: .* from 0 to 2, found 3"),
    "too many": (changed(("layers", 0, "prompt", [4, 4, 1])), "at most 8 uses by 4 tokens .* found 9"),
    "no tokens": (changed(("tokens", {"prompt": 0, "decode": 0})), "tokens: expected at least one"),
    "no layers": (changed(("layers", [])), "layers: expected a list of at least one layer"),
    "same layer": (changed(("layers", CONTENT["layers"] * 2)), r"layers\[1\]: layer 1 stands twice"),
    "per token": (changed(("num_experts_per_tok", 9)), "num_experts_per_tok: .* from 1 to 3, found 9"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_refused_by_name(tmp_path, case):
    content, message = WRONG[case]
    path = saved(tmp_path, content)
    with pytest.raises(ConfigError, match=message) as error:
        read_profile(path)
    assert str(error.value).startswith(f"{path}: ") and len(str(error.value)) < 400


def test_a_file_that_ends_early_or_is_too_large_is_refused(tmp_path):
    whole = json.dumps(CONTENT)
    for length in range(len(whole)):
        with pytest.raises(ConfigError):
            read_profile(saved(tmp_path, whole[:length]))
    with pytest.raises(ConfigError, match="larger than 64 MiB"):
        read_profile(saved(tmp_path, " " * (MAX_BYTES + 1)))
    with pytest.raises(ConfigError, match="cannot read the usage profile: No such file"):
        read_profile(tmp_path / "absent.json")
    with pytest.raises(ConfigError, match="cannot read the usage profile: Is a directory"):
        read_profile(tmp_path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, seed, changes in (
        ("a", 0, {}),
        ("b", 1, {}),
        ("more", 0, {"num_experts": 8}),
        ("deep", 0, {"num_layers": 4}),
    ):
        synthesise(folder / f"{name}.gguf", resolve_shape("tiny", **changes), seed=seed)
    return folder


def profile_of(file):
    dims = read_dimensions(file)
    layers = {n: dict.fromkeys(("prompt", "decode"), (1,) * dims.num_experts) for n in dims.layers[1:]}
    usage = Usage({"prompt": dims.num_experts, "decode": dims.num_experts}, layers)
    return UsageProfile(identify(file), dims.num_experts, dims.num_experts_per_tok, usage, "u.json")


def test_a_profile_is_of_one_model(models):
    with GGUFFile.open(models / "a.gguf") as file:
        profile = profile_of(file)
        check_model(profile, file, read_dimensions(file), weights=True)
    for name, message in {
        "b": "of another model, a.gguf, of the same shape: the routers' weights differ from b.gguf",
        "more": "of another model, a.gguf: num_experts: expected 8, as in more.gguf, found 16",
        "deep": "layers: layer 3 is missing of 3 with experts in deep.gguf",
    }.items():
        with GGUFFile.open(models / f"{name}.gguf") as file, pytest.raises(ConfigError, match=message):
            check_model(profile, file, read_dimensions(file), weights=True)


def test_a_header_alone_tells_the_shape(models):
    with GGUFFile.open(models / "a.gguf") as file:
        profile = profile_of(file)
    with GGUFFile.open(models / "b.gguf", header_only=True) as file:
        check_model(profile, file, read_dimensions(file), weights=False)

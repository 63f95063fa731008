"""What `StructuredOutputs` accepts and refuses, without llguidance."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from hybrid import SamplingParams, StructuredOutputs
from hybrid.errors import RequestError
from hybrid.structured import MAX_CHOICES, MAX_REGEX_BYTES, MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH

SCHEMA = {"type": "object", "properties": {"ä": {"type": "integer"}}}


def nested(levels: int) -> dict:
    schema: dict = {}
    for _ in range(levels - 1):
        schema = {"not": schema}
    return schema


def doubled(times: int) -> dict:
    """Small in memory, 2 to the power of ``times`` when written."""
    schema: dict = {"type": "integer"}
    for _ in range(times):
        schema = {"anyOf": [schema, schema]}
    return schema


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"json": SCHEMA}, "json"),
        ({"json": json.dumps(SCHEMA)}, "json"),
        ({"json": {}}, "json"),
        ({"json": nested(MAX_SCHEMA_DEPTH)}, "json"),
        ({"regex": "a+"}, "regex"),
        ({"choice": ["a", "b"]}, "choice"),
        ({"grammar": 'start: "a"'}, "grammar"),
        ({"json_object": True}, "json_object"),
        ({"json_object": True, "after": "</think>"}, "json_object"),
    ],
)
def test_what_is_right(given, kind):
    wanted = StructuredOutputs(**given)
    assert wanted.kind == kind
    assert wanted == StructuredOutputs(**given) and hash(wanted) == hash(StructuredOutputs(**given))
    assert SamplingParams(structured_outputs=wanted).structured_outputs is wanted


def test_a_schema_is_kept_as_it_was():
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    wanted = StructuredOutputs(json=schema)
    schema.clear()
    assert list(json.loads(wanted.json)["properties"]) == ["b", "a"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of"),
        ({"json": SCHEMA, "regex": "a"}, "exactly one of"),
        ({"json_object": True, "choice": ["a"]}, "exactly one of"),
        ({"json_object": 1}, "json_object.*True or False"),
        ({"after": "x"}, "exactly one of"),
        ({"json_object": True, "after": ""}, "after.*not empty"),
        ({"json_object": True, "after": "x" * 65}, "after.*bytes"),
        ({"json": "{"}, "json.*not JSON"),
        ({"json": ""}, "json.*not empty"),
        ({"json": "[1]"}, "json.*an object"),
        ({"json": 5}, "json.*an object"),
        ({"json": {"const": float("nan")}}, "json.*written as JSON"),
        ({"json": {"const": {1, 2}}}, "json.*written as JSON"),
        ({"json": {"const": "\ud800"}}, "json.*surrogates"),
        ({"json": nested(MAX_SCHEMA_DEPTH + 1)}, "json.*levels"),
        ({"json": json.dumps(nested(MAX_SCHEMA_DEPTH + 1))}, "json.*levels"),
        ({"json": '{"not":' * 100_000}, "json"),
        ({"json": {"const": "x" * MAX_SCHEMA_BYTES}}, "json.*bytes"),
        ({"json": doubled(60)}, "json.*"),
        ({"regex": ""}, "regex.*not empty"),
        ({"regex": 3}, "regex.*string"),
        ({"regex": "a" * (MAX_REGEX_BYTES + 1)}, "regex.*bytes"),
        ({"regex": "\udc00"}, "regex.*surrogates"),
        ({"grammar": ""}, "grammar.*not empty"),
        ({"choice": []}, "choice.*1 to"),
        ({"choice": "ab"}, "choice.*sequence"),
        ({"choice": ["a", 5]}, "choice.*string"),
        ({"choice": ["a", ""]}, "choice.*not empty"),
        ({"choice": ["a"] * (MAX_CHOICES + 1)}, "choice.*1 to"),
        ({"choice": ["a" * 40_000, "b" * 40_000]}, "choice.*in all"),
    ],
)
def test_what_is_wrong(given, message):
    with pytest.raises(RequestError, match=message):
        StructuredOutputs(**given)


def test_a_schema_that_holds_itself():
    schema: dict = {"type": "object"}
    schema["not"] = schema
    with pytest.raises(RequestError, match="levels"):
        StructuredOutputs(json=schema)


def test_sampling_params_take_no_other_type():
    with pytest.raises(RequestError, match=r"structured_outputs.*StructuredOutputs"):
        SamplingParams(structured_outputs={"json": {}})


def test_the_package_works_without_llguidance_and_names_the_extra():
    code = """
import sys
sys.modules["llguidance"] = None
from hybrid import LLM, SamplingParams, StructuredOutputs
with LLM("demo", max_model_len=64) as llm:
    print(len(llm.generate("Once", SamplingParams(max_tokens=2), use_tqdm=False)[0].outputs[0].token_ids))
    try:
        llm.generate("Once", SamplingParams(structured_outputs=StructuredOutputs(json_object=True)))
    except Exception as error:
        print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    count, error = done.stdout.splitlines()
    assert count == "2"
    assert error.startswith("RequestError structured_outputs") and "pip install 'hybrid-moe[server]'" in error

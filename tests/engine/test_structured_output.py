"""Texts of the demo model under a schema, an expression, a choice and a grammar."""

from __future__ import annotations

import json
import re
import threading
import time
from functools import partial

import jsonschema
import pytest
import torch

from hybrid import LLM, SamplingParams, StructuredOutputs
from hybrid.engine.guidance import MAX_COMPILES, Guidance
from hybrid.errors import RequestError

llguidance = pytest.importorskip("llguidance", reason="structured output needs the extra 'server'")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", 'a "b" \\ é', None]}, "maxItems": 3},
        "score": {"type": "number", "minimum": -1, "exclusiveMaximum": 1},
        "pet": {"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/pet"}]},
    },
    "required": ["name", "age", "tags", "pet"],
    "additionalProperties": False,
    "$defs": {
        "pet": {
            "type": "object",
            "properties": {"kind": {"type": "string", "pattern": "^(cat|dog)[0-9]{2}$"}},
            "required": ["kind"],
            "additionalProperties": False,
        }
    },
}
PROMPTS = ["Once upon a time", "The old fox said", "{", "Tell me a number:"]


@pytest.fixture(scope="module")
def llm():
    with LLM("demo", max_model_len=512, max_num_seqs=4, num_threads=1) as llm:
        yield llm


def texts(llm, num_seeds=8, **given):
    """Texts for several prompts and seeds; each must have ended by itself."""
    wanted = StructuredOutputs(**given)
    params = [
        SamplingParams(structured_outputs=wanted, seed=seed, max_tokens=300, temperature=1.5)
        for _ in PROMPTS
        for seed in range(num_seeds)
    ]
    prompts = [prompt for prompt in PROMPTS for _ in range(num_seeds)]
    outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    assert [output.finish_reason for output in outputs] == ["stop"] * len(prompts)
    return [output.text for output in outputs]


def test_a_schema_over_many_seeds(llm):
    found = [json.loads(text) for text in texts(llm, 16, json=PERSON)]
    for value in found:
        jsonschema.validate(value, PERSON)
    assert len({json.dumps(value) for value in found}) > 50


def test_greedy_text_follows_the_schema_too(llm):
    params = SamplingParams(temperature=0, structured_outputs=StructuredOutputs(json=json.dumps(PERSON)))
    for output in llm.generate(PROMPTS, params, use_tqdm=False):
        jsonschema.validate(json.loads(output.outputs[0].text), PERSON)


def test_a_regular_expression(llm):
    pattern = r"[A-Z][a-zé]{2,5}-\d{3}(, (yes|no)){0,2}!"
    found = texts(llm, regex=pattern)
    assert all(re.fullmatch(pattern, text) for text in found) and len(set(found)) > 20


def test_a_choice(llm):
    choices = ["red", "green", 'a "quoted" \\ one', "two\nlines", "é中", "re"]
    found = texts(llm, choice=choices)
    assert set(found) <= set(choices) and len(set(found)) > 3


@pytest.mark.parametrize(
    "grammar",
    [
        'start: expr\nexpr: term ((" + " | " - ") term){0,3}\nterm: /[0-9]{1,3}/ | "(" expr ")"',
        'root ::= term ((" + " | " - ") term)?\nterm ::= [0-9]+ | "(" term " + " term ")"',
    ],
    ids=["lark", "gbnf"],
)
def test_a_grammar(llm, grammar):
    wanted = StructuredOutputs(grammar=grammar)
    params = SamplingParams(structured_outputs=wanted, max_tokens=200, temperature=1.0, seed=1)
    outputs = [output.outputs[0] for output in llm.generate(PROMPTS, params, use_tqdm=False)]
    for output in outputs:
        assert re.fullmatch(r"[0-9+\-() ]+", output.text)
        if output.finish_reason == "stop":
            assert isinstance(eval(re.sub(r"\b0+(?=\d)", "", output.text)), int)
    assert any(output.finish_reason == "stop" for output in outputs)


def test_any_json_object(llm):
    wanted = StructuredOutputs(json_object=True)
    closing = [i for text in ('"', "}") for i in llm.tokenizer.encode(text, add_special=False)]
    bias = dict.fromkeys(closing, 8.0)  # stories close neither
    params = [
        SamplingParams(structured_outputs=wanted, max_tokens=60, seed=seed, temperature=2.5, logit_bias=bias)
        for seed in range(40)
    ]
    outputs = [o.outputs[0] for o in llm.generate([PROMPTS[0]] * 40, params, use_tqdm=False)]
    ended = [output.text for output in outputs if output.finish_reason == "stop"]
    assert all(output.text.startswith("{") for output in outputs)
    assert all(isinstance(json.loads(text), dict) for text in ended) and len(ended) >= 5


def test_logprobs_are_the_model_s(llm):
    plain = SamplingParams(max_tokens=1, logprobs=5, temperature=0)
    bound = SamplingParams(
        logprobs=5, temperature=0, structured_outputs=StructuredOutputs(choice=["yes", "no"])
    )
    free, output = (
        llm.generate(PROMPTS[0], params, use_tqdm=False)[0].outputs[0] for params in (plain, bound)
    )
    assert output.text in ("yes", "no") and len(output.logprobs) == len(output.token_ids)
    chosen = [entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)]
    assert output.cumulative_logprob == pytest.approx(sum(chosen))
    best = {token: entry.logprob for token, entry in free.logprobs[0].items()}
    assert best.items() <= {token: entry.logprob for token, entry in output.logprobs[0].items()}.items()


def test_batch_mates_are_not_touched(llm):
    free = [SamplingParams(seed=seed, max_tokens=40, logprobs=1, ignore_eos=True) for seed in range(3)]
    bound = SamplingParams(structured_outputs=StructuredOutputs(json=PERSON), seed=9, max_tokens=40)

    def key(output):
        return output.outputs[0].token_ids, output.outputs[0].cumulative_logprob

    alone = [key(llm.generate(PROMPTS[0], params, use_tqdm=False)[0]) for params in (*free, bound)]
    together = llm.generate([PROMPTS[0]] * 4, [*free, bound], use_tqdm=False)
    assert [key(output) for output in together] == alone


def test_several_texts_of_one_prompt_each_have_their_own_state(llm):
    params = SamplingParams(n=4, structured_outputs=StructuredOutputs(json=PERSON), seed=5, temperature=1.5)
    (output,) = llm.generate(PROMPTS[0], params, use_tqdm=False)
    for each in output.outputs:
        jsonschema.validate(json.loads(each.text), PERSON)
    assert len({each.text for each in output.outputs}) > 1


def test_end_tokens_only_where_the_grammar_ends(llm):
    constraint = Guidance(llm.tokenizer)(StructuredOutputs(regex="ab?"))
    ends = sorted(llm.tokenizer.stop_ids)
    assert constraint.allowed_mask().dtype == torch.bool
    assert constraint.allowed_mask().shape == (llm.tokenizer.vocab_size,)
    assert not constraint.allowed_mask()[ends].any()
    constraint.accept(llm.tokenizer.token_id("a"))
    assert constraint.allowed_mask()[ends].all() and not constraint.finished
    assert constraint.allowed_mask().sum() == len(ends) + 1
    constraint.accept(llm.tokenizer.token_id("b"))
    assert constraint.finished


def test_free_text_before_a_marker(llm):
    wanted = StructuredOutputs(choice=["yes", "no"], after="\n\n")
    params = [SamplingParams(structured_outputs=wanted, seed=seed, max_tokens=400) for seed in range(8)]
    for output in llm.generate([PROMPTS[0]] * 8, params, use_tqdm=False):
        reasoning, marker, answer = output.outputs[0].text.partition("\n\n")
        assert reasoning and marker and answer in ("yes", "no")
        assert output.outputs[0].finish_reason == "stop"


def test_the_marker_may_be_spread_over_tokens(llm):
    encode = partial(llm.tokenizer.encode, add_special=False)
    constraint = Guidance(llm.tokenizer)(StructuredOutputs(choice=["a"], after="</think>"))
    ends = sorted(llm.tokenizer.stop_ids)
    for text in ("It is < and </think ", "<", "/think", ">", "\n"):
        for token_id in encode(text):
            assert not constraint.finished
            mask = constraint.allowed_mask()
            if text == "\n":
                assert mask.nonzero().flatten().tolist() == encode("a")
                continue
            assert mask[token_id] and not mask[ends].any()
            constraint.accept(token_id)
    constraint.accept(encode("a")[0])
    assert constraint.finished


def test_control_tokens_are_no_text(llm):
    constraint = Guidance(llm.tokenizer)(StructuredOutputs(regex=r"(?s:.*)"))
    control = [i for i in range(llm.tokenizer.vocab_size) if llm.tokenizer.is_control(i)]
    allowed = constraint.allowed_mask()
    assert set(allowed.nonzero().flatten().tolist()).isdisjoint(set(control) - llm.tokenizer.stop_ids)
    assert allowed.sum() > 3000


def test_a_dead_end_ends_the_text(llm):
    class Deaf:
        """The vocabulary without any token that begins with b."""

        def __getattr__(self, name):
            return getattr(llm.tokenizer, name)

        def token_bytes(self, token_id):
            piece = llm.tokenizer.token_bytes(token_id)
            return b"a" + piece[1:] if piece.startswith(b"b") else piece

        def encode(self, text, **options):
            return llm.tokenizer.encode(text.replace("b", ""), **options)

    constraint = Guidance(Deaf())(StructuredOutputs(choice=["a\x01b", "c"]))
    for text in ("a", "\x01"):
        assert not constraint.finished
        constraint.accept(llm.tokenizer.encode(text, add_special=False)[0])
    assert constraint.finished, "b would have to follow"


def test_a_token_that_is_not_allowed_is_an_error(llm):
    constraint = Guidance(llm.tokenizer)(StructuredOutputs(choice=["a"]))
    with pytest.raises(RequestError, match="structured_outputs: the grammar cannot go on"):
        constraint.accept(llm.tokenizer.token_id("b"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"json": {"type": "objec"}}, r"structured_outputs\.json: Invalid type: objec"),
        ({"json": {"uniqueItems": True}}, "uniqueItems"),
        ({"json": {"type": "string", "format": "nonsense"}}, "Unknown format"),
        ({"json": {"$ref": "http://127.0.0.1/schema"}}, "127.0.0.1"),
        ({"json": {"type": "string", "pattern": "("}}, "unclosed group"),
        ({"json": {"allOf": [{"type": "string"}, {"type": "integer"}]}}, "Unsatisfiable"),
        ({"regex": "(a"}, r"structured_outputs\.regex: .*"),
        ({"regex": "(?<=x)a"}, "look-around"),
        ({"regex": "[^\\x00-\\x{10FFFF}]"}, r"structured_outputs\.regex: no text"),
        ({"grammar": 'start: "a'}, r"structured_outputs\.grammar"),
        ({"grammar": "start: nothing"}, "nothing"),
        ({"grammar": "root ::= ("}, r"structured_outputs\.grammar"),
        ({"grammar": "nonsense"}, r"structured_outputs\.grammar"),
    ],
)
def test_what_is_wrong_is_refused_before_any_work(llm, given, message):
    params = SamplingParams(structured_outputs=StructuredOutputs(**given))
    with pytest.raises(RequestError, match=message):
        llm.generate("Once", params, use_tqdm=False)


def test_a_compilation_that_takes_too_long(llm, monkeypatch):
    release = threading.Event()
    guidance = Guidance(llm.tokenizer, timeout_s=0.1)
    monkeypatch.setattr(guidance, "_compile", lambda wanted: release.wait(30))
    started = time.monotonic()
    for _ in range(MAX_COMPILES):
        with pytest.raises(RequestError, match=r"more than 0\.1 s to compile"):
            guidance(StructuredOutputs(regex="a"))
    with pytest.raises(RequestError, match="other grammars are being compiled"):
        guidance(StructuredOutputs(regex="a"))
    assert time.monotonic() - started < 5
    release.set()


def test_a_grammar_is_compiled_once(llm, monkeypatch):
    guidance = Guidance(llm.tokenizer)
    compiled = []
    original = guidance._compile
    monkeypatch.setattr(guidance, "_compile", lambda wanted: compiled.append(wanted) or original(wanted))
    first, second = (guidance(StructuredOutputs(choice=["ab"])) for _ in range(2))
    first.accept(llm.tokenizer.token_id("a"))
    assert len(compiled) == 1
    assert second.allowed_mask()[llm.tokenizer.token_id("a")], "each has a state of its own"


def test_the_library_prints_nothing(llm, capfd):
    guidance = Guidance(llm.tokenizer)
    with pytest.raises(RequestError):
        guidance(StructuredOutputs(regex="("))
    with pytest.raises(RequestError):
        guidance(StructuredOutputs(choice=["a"])).accept(llm.tokenizer.token_id("b"))
    assert capfd.readouterr() == ("", "")

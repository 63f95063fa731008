"""The generation API on the mock model, with letters as tokens."""

from __future__ import annotations

import gc
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import hybrid.llm
from hybrid.chat import ChatTemplate
from hybrid.config import ExpertUse
from hybrid.engine.load import LoadedModel
from hybrid.errors import ContextLengthError, EngineError, ModelError, RequestError, TokenizerError
from hybrid.llm import LLM
from hybrid.sampling_params import SamplingParams

LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUV."
EOS = 49  # "." is left out of the text when it ends it
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


class LetterTokenizer:
    stop_ids = frozenset({EOS})

    def encode(self, text):
        return [LETTERS.index(letter) for letter in text]

    def decode(self, ids):
        return "".join(LETTERS[i] for i in ids)

    def detokenizer(self, *, skip_special=False, prompt_ids=()):
        return self

    def push(self, token_id):
        return LETTERS[token_id]

    def flush(self):
        return ""


class NameTemplate:
    """Renders a conversation as its contents, joined."""

    def encode(self, messages, *, add_generation_prompt=True, shout=False):
        text = " ".join(message["content"] for message in messages)
        return LetterTokenizer().encode(text.upper() if shout else text)


@pytest.fixture
def make_llm(monkeypatch, make_engine):
    def make(template=None, **options) -> LLM:
        engine = make_engine(end_token_ids={EOS}, **options)
        loaded = LoadedModel(
            Path("mock.gguf"),
            engine,
            LetterTokenizer(),
            template or NameTemplate(),
            None,
            None,
            "scalar",
            1,
            ExpertUse(),
        )
        monkeypatch.setattr(hybrid.llm, "load", lambda *args: loaded)
        made.append(LLM("mock.gguf"))
        return made[-1]

    made = make.made = []
    yield make
    for llm in made:
        llm.close()


def engine_of(llm):
    return llm._loaded.engine


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def text_of(outputs):
    return [output.outputs[0].text for output in outputs]


def test_generate_takes_every_kind_of_prompt(make_llm):
    llm = make_llm()
    ids = LetterTokenizer().encode("hello")
    expected = text_of(llm.generate("hello", GREEDY))
    assert len(expected[0]) == 12
    for prompt in (
        ["hello"],
        {"prompt": "hello"},
        {"prompt_token_ids": ids},
        [{"prompt_token_ids": np.array(ids)}],
        ({"prompt_token_ids": tuple(ids)},),
    ):
        assert text_of(llm.generate(prompt, GREEDY)) == expected
    outputs = llm.generate(["hello", {"prompt_token_ids": ids}], GREEDY)
    assert [(output.prompt, output.prompt_token_ids) for output in outputs] == [("hello", ids), (None, ids)]
    assert llm.generate([], GREEDY) == []


def test_unknown_keys_of_prompts_are_refused(make_llm):
    llm = make_llm()
    with pytest.raises(RequestError, match="'prompt_token_ids'"):
        llm.generate({"prompt_tokens_ids": [1]}, GREEDY)
    with pytest.raises(RequestError, match="multi_modal_data"):
        llm.generate({"prompt": "a", "multi_modal_data": {}}, GREEDY)
    with pytest.raises(RequestError, match="one of its keys"):
        llm.generate({"prompt": "a", "prompt_token_ids": [1]}, GREEDY)


@pytest.mark.parametrize(
    "prompt",
    ["", [""], None, 5, [1, 2], [None], {}, {"prompt": None}, {"prompt_token_ids": []},
     {"prompt_token_ids": "abc"}, {"prompt_token_ids": 5}, {"prompt_token_ids": [50]}, {"text": "a"}],
)  # fmt: skip
def test_bad_prompts_are_refused(make_llm, prompt):
    llm = make_llm()
    with pytest.raises(RequestError):
        llm.generate(prompt, GREEDY)
    assert engine_of(llm).model.batches == []


def test_one_bad_prompt_of_several_leaves_nothing_behind(make_llm):
    llm = make_llm(max_model_len=10)
    with pytest.raises(ContextLengthError):
        llm.generate(["a", "b" * 10, "c"], GREEDY)
    assert not engine_of(llm).has_unfinished_requests()
    assert engine_of(llm).model.batches == []


def test_params_for_each_prompt(make_llm):
    llm = make_llm()
    outputs = llm.generate(["a", "b"], [SamplingParams(max_tokens=2), SamplingParams(max_tokens=3)])
    assert [len(output.outputs[0].token_ids) for output in outputs] == [2, 3]
    for wrong in ([GREEDY], [GREEDY] * 3, {"temperature": 0}, [GREEDY, None, 3][1:]):
        with pytest.raises(RequestError, match="sampling_params"):
            llm.generate(["a", "b"], wrong)
    assert not engine_of(llm).has_unfinished_requests()


def test_a_stream_adds_up_to_the_result(make_llm):
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    llm = make_llm()
    (whole,) = llm.generate("hello", params)
    deltas = list(llm.stream("hello", params))
    completion = whole.outputs[0]
    assert "".join(text_of(deltas)) == completion.text
    assert [i for delta in deltas for i in delta.outputs[0].token_ids] == completion.token_ids
    assert [e for delta in deltas for e in delta.outputs[0].logprobs] == completion.logprobs
    assert deltas[0].prompt_logprobs == whole.prompt_logprobs
    assert [delta.finished for delta in deltas] == [False] * 11 + [True]
    assert deltas[-1].outputs[0].finish_reason == completion.finish_reason == "length"
    chosen = [
        entries[token_id] for token_id, entries in zip(completion.token_ids, completion.logprobs, strict=True)
    ]
    assert completion.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in chosen))
    assert "".join(entry.decoded_token for entry in chosen) == completion.text


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_request(make_llm, include):
    llm = make_llm()
    free = text_of(llm.generate("hello", GREEDY))[0]
    stop = free[4:6]
    params = SamplingParams(temperature=0, stop=stop, include_stop_str_in_output=include)
    (output,) = llm.generate("hello", params)
    completion = output.outputs[0]
    assert completion.text == free[: free.index(stop)] + (stop if include else "")
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert len(completion.token_ids) == free.index(stop) + 2
    assert not engine_of(llm).has_unfinished_requests()


def test_an_end_token_is_not_in_the_text(make_llm):
    llm = make_llm()
    params = SamplingParams(temperature=0, logit_bias={EOS: 100}, min_tokens=3)
    (output,) = llm.generate("hello", params)
    assert output.outputs[0].token_ids[-1] == EOS
    assert len(output.outputs[0].text) == 3
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", None)


def test_whole_vocabulary_logprobs_decode_when_read(make_llm):
    params = SamplingParams(temperature=0, max_tokens=2, logprobs=-1, prompt_logprobs=-1)
    (output,) = make_llm().generate("hello", params)
    prompt = output.prompt_logprobs
    assert len(prompt) == 5
    assert prompt[0] is None
    assert prompt.array.shape == (4, 50)
    assert prompt[-1] == prompt[4]
    assert [entry is None for entry in prompt[:2]] == [True, False]
    with pytest.raises(IndexError):
        prompt[5]
    best = int(prompt.array[0].argmax())
    assert (prompt[1][best].rank, prompt[1][best].decoded_token) == (1, LETTERS[best])
    assert 50 not in prompt[1]
    token_id = output.outputs[0].token_ids[1]
    assert output.outputs[0].logprobs[1][token_id].rank == 1
    assert np.exp(prompt.array).sum(axis=1) == pytest.approx(1, abs=1e-5)


def test_streams_share_the_engine(make_llm):
    llm = make_llm()
    alone = [text_of(llm.generate(prompt, GREEDY))[0] for prompt in ("one", "two", "three")]
    first, second = llm.stream("one", GREEDY), llm.stream("two", GREEDY)
    texts = [next(first).outputs[0].text, next(second).outputs[0].text]
    third = text_of(llm.generate("three", GREEDY))[0]
    texts[0] += "".join(text_of(first))
    texts[1] += "".join(text_of(second))
    assert [*texts, third] == alone


def test_leaving_a_stream_ends_its_request(make_llm):
    llm = make_llm()
    engine_of(llm).model.seconds = 0.01
    with llm.stream("one", SamplingParams()) as stream:
        next(stream)
    assert not engine_of(llm).has_unfinished_requests()
    assert list(stream) == []
    assert stream.result().outputs[0].finish_reason == "abort"
    llm.stream("one", SamplingParams())  # never started
    gc.collect()
    wait_until(lambda: llm.stats().num_requests_running + llm.stats().num_requests_waiting == 0)
    assert not engine_of(llm).has_unfinished_requests()
    assert len(text_of(llm.generate("hello", GREEDY))[0]) == 12


@pytest.fixture
def ctrl_c():
    """Sends the main thread a Ctrl-C. In background jobs of a shell it is ignored unless a handler is set."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    signal.signal(signal.SIGINT, previous)


def test_ctrl_c_leaves_the_engine_usable(make_llm, ctrl_c):
    llm = make_llm()
    expected = text_of(llm.generate(["hello", "you"], GREEDY))
    engine_of(llm).model.on_forward(3, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["hello", "you"], SamplingParams(temperature=0, ignore_eos=True))
    wait_until(lambda: llm.stats().num_requests_running + llm.stats().num_requests_waiting == 0)
    assert not engine_of(llm).has_unfinished_requests()
    assert text_of(llm.generate(["hello", "you"], GREEDY)) == expected


def test_an_interrupted_stream_goes_on(make_llm, ctrl_c):
    llm = make_llm()
    expected = text_of(llm.generate("hello", GREEDY))[0]
    engine_of(llm).model.on_forward(2, ctrl_c)
    engine_of(llm).model.seconds = 0.02
    stream, texts = llm.stream("hello", GREEDY), []
    with pytest.raises(KeyboardInterrupt):
        texts += (delta.outputs[0].text for delta in stream)
    assert len(texts) < 12
    # Ctrl-C can fall between taking an output and handing it over, so the rest is in the result alone.
    stream.on_prompt = None
    for _ in stream:
        pass
    assert text_of([stream.result()]) == [expected]


def test_a_failing_engine_ends_everything_and_says_so(make_llm):
    llm = make_llm()
    waiting = llm.stream("you", GREEDY)
    engine_of(llm).model.poison = True
    with pytest.raises(ModelError, match="nan") as failure:
        llm.generate("hello", GREEDY)
    assert llm.errored is failure.value
    with pytest.raises(ModelError, match="nan"):
        list(waiting)
    with pytest.raises(EngineError, match="nan"):
        llm.generate("hello", GREEDY)
    assert not engine_of(llm).model.closed
    llm.close()
    assert engine_of(llm).model.closed


def test_dropping_it_frees_everything(make_llm):
    llm = make_llm()
    engine, stream = engine_of(llm), llm.stream("hello", GREEDY)
    make_llm.made.clear()
    del llm
    gc.collect()
    assert not engine.model.closed  # the stream needs it
    assert len(list(stream)) == 12
    del stream
    gc.collect()
    wait_until(lambda: engine.model.closed)
    wait_until(lambda: "hybrid-engine" not in [thread.name for thread in threading.enumerate()])


def test_threads_share_it(make_llm):
    llm = make_llm(max_num_seqs=4)
    alone = {letter: text_of(llm.generate(letter * 5, GREEDY)) for letter in LETTERS[:8]}
    with ThreadPoolExecutor(8) as pool:
        together = dict(
            zip(alone, pool.map(lambda letter: text_of(llm.generate(letter * 5, GREEDY)), alone), strict=True)
        )
    assert together == alone
    assert max(len(batch) for batch in engine_of(llm).model.batches) > 1


def test_chat_renders_the_conversation(make_llm):
    llm = make_llm()
    conversation = [{"role": "user", "content": "hello"}]
    expected = text_of(llm.generate("hello", GREEDY))
    assert text_of(llm.chat(conversation, GREEDY)) == expected
    assert text_of(llm.chat([conversation, conversation], GREEDY)) == expected * 2
    assert "".join(text_of(llm.stream_chat(conversation, GREEDY))) == expected[0]
    assert text_of(llm.chat(conversation, GREEDY, shout=True)) == text_of(llm.generate("HELLO", GREEDY))


def test_a_model_without_a_template_generates_and_chat_says_why(make_llm):
    llm = make_llm(template=ChatTemplate({}, None))
    assert len(llm.generate("hello", GREEDY)) == 1
    with pytest.raises(TokenizerError, match="chat_template"):
        llm.chat([{"role": "user", "content": "hello"}], GREEDY)


def test_a_closed_llm_says_so(make_llm):
    with make_llm() as llm:
        engine_of(llm).model.seconds = 0.01
        stream = llm.stream("hello", SamplingParams(ignore_eos=True))
        next(stream)
    assert engine_of(llm).model.closed
    llm.close()
    for use in (
        lambda: llm.generate("a"),
        lambda: llm.chat([{"role": "user", "content": "a"}]),
        lambda: llm.stream("a"),
        lambda: list(stream),
    ):
        with pytest.raises(RequestError, match="closed"):
            use()


def test_nothing_is_printed(make_llm, capfd):
    make_llm().generate("hello", GREEDY)
    assert capfd.readouterr() == ("", "")


def test_a_stream_tells_of_the_prompt_between_steps():
    """A prompt of 300 tokens in steps of 64; the last step brings the first token."""
    with LLM(max_num_batched_tokens=64, max_model_len=512, num_threads=1) as llm:
        steps = []
        prompt = {"prompt_token_ids": list(range(5, 305))}
        with llm.stream(prompt, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)) as stream:
            stream.on_prompt = lambda done, total: steps.append((done, total))
            assert len(list(stream)) == 3
    assert steps == [(64, 300), (128, 300), (192, 300), (256, 300)]

"""Structured output through llguidance: from a schema or grammar to the tokens that may come next."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import replace
from json import dumps
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from hybrid.engine.constraint import Constraint
from hybrid.errors import RequestError
from hybrid.structured import StructuredOutputs
from hybrid.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

COMPILE_TIMEOUT_S = 10.0
MAX_COMPILES = 4  # at once; one that timed out counts until it ends
CACHED_GRAMMARS = 32

# Between the tokens of JSON: enough to indent, not enough for a model to write blanks for ever.
JSON_SPACE = r"\x20|\x0A[\x20\x09]{0,32}"


class Guidance:
    """Makes a constraint for each completion: an `engine.constraint.ConstraintFactory`.

    Any thread may call it. Grammars are compiled on threads of their own within ``timeout_s``, and the last
    ones are kept. llguidance bounds by itself what a grammar may cost while it compiles and at each token.
    """

    def __init__(self, tokenizer: Tokenizer, *, timeout_s: float = COMPILE_TIMEOUT_S) -> None:
        self._tokenizer, self._timeout_s = tokenizer, timeout_s
        self._lock = threading.Lock()
        self._ll_tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[StructuredOutputs, LLMatcher] = OrderedDict()
        self._compiles = threading.BoundedSemaphore(MAX_COMPILES)

    def __call__(self, wanted: StructuredOutputs) -> Constraint:
        """A constraint at the beginning of a text.

        Raises:
            RequestError: the schema, expression or grammar is wrong, not supported, matches nothing, or takes
                too long to compile; or llguidance is not installed.
        """
        marker, wanted = wanted.after, replace(wanted, after=None)
        with self._lock:
            matcher = self._compiled.get(wanted)
            if matcher is not None:
                self._compiled.move_to_end(wanted)
        if matcher is None:
            self._tokens()  # takes seconds the first time, whatever is asked for
            matcher = self._compile_in_time(wanted)
            with self._lock:
                self._compiled[wanted] = matcher
                while len(self._compiled) > CACHED_GRAMMARS:
                    self._compiled.popitem(last=False)
        with self._lock:
            own = matcher.deep_copy()
        constraint = GrammarConstraint(own, self._tokenizer.vocab_size)
        if constraint.finished:
            raise _refusal(wanted, "no text of this model's tokens matches it")
        return constraint if marker is None else AfterMarker(constraint, marker.encode(), self._tokenizer)

    def _compile_in_time(self, wanted: StructuredOutputs) -> LLMatcher:
        if not self._compiles.acquire(timeout=self._timeout_s):
            raise _refusal(wanted, f"{MAX_COMPILES} other grammars are being compiled; try again later")
        result: list[LLMatcher | BaseException] = []

        def work() -> None:
            try:
                result.append(self._compile(wanted))
            except BaseException as error:
                result.append(error)
            finally:
                self._compiles.release()

        thread = threading.Thread(target=work, name="hybrid-grammar", daemon=True)
        thread.start()
        thread.join(self._timeout_s)
        if not result:
            raise _refusal(wanted, f"it takes more than {self._timeout_s:g} s to compile; simplify it")
        if isinstance(result[0], BaseException):
            raise result[0]
        return result[0]

    def _compile(self, wanted: StructuredOutputs) -> LLMatcher:
        tokenizer = self._tokens()
        import llguidance

        try:
            grammar = _grammar(wanted)
        except Exception as error:  # the library converts GBNF with whatever errors Python has
            raise _refusal(wanted, str(error)) from error
        limits = llguidance.LLParserLimits(verbose_errors=False)
        matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise _refusal(wanted, matcher.get_error())
        return matcher

    def _tokens(self) -> LLTokenizer:
        """llguidance's view of the vocabulary, made when it is first needed."""
        with self._lock:
            if self._ll_tokenizer is None:
                self._ll_tokenizer = _ll_tokenizer(self._tokenizer)
            return self._ll_tokenizer


class GrammarConstraint:
    """The state of one completion: an `engine.constraint.Constraint`.

    The next mask is computed as soon as a token is accepted, so that `finished` can tell a dead end, where
    the grammar goes on and no token of the vocabulary does: the text ends there.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self._mask = self._next_mask()
        self._stopped = False

    def allowed_mask(self) -> torch.BoolTensor:
        """bool ``[vocab]``; end tokens are allowed where the grammar accepts the text so far."""
        return self._mask

    def accept(self, token_id: int) -> None:
        """Take in the chosen token.

        Raises:
            RequestError: it is not allowed, or the grammar became too complex at this place.
        """
        if not self._matcher.consume_token(token_id):
            raise self._failure()
        self._stopped = self._matcher.is_stopped()
        self._mask = self._next_mask()

    @property
    def finished(self) -> bool:
        return self._stopped or not bool(self._mask.any())

    def _next_mask(self) -> torch.BoolTensor:
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            if self._matcher.get_error().startswith("NoExtension"):  # no token goes on
                return cast("torch.BoolTensor", torch.zeros(self._vocab_size, dtype=torch.bool))
            raise self._failure()
        bits = np.unpackbits(packed, count=self._vocab_size, bitorder="little")
        return cast("torch.BoolTensor", torch.from_numpy(bits.view(np.bool_)))

    def _failure(self) -> RequestError:
        problem = self._matcher.get_error().splitlines()[0]
        return RequestError(f"the grammar cannot go on: {problem}", field="structured_outputs")


class AfterMarker:
    """Free text up to a marker, then what ``constraint`` says. The text does not end before the marker."""

    def __init__(self, constraint: Constraint, marker: bytes, tokenizer: Tokenizer) -> None:
        self._constraint, self._marker, self._tokenizer = constraint, marker, tokenizer
        mask = torch.ones(tokenizer.vocab_size, dtype=torch.bool)
        mask[list(tokenizer.stop_ids)] = False
        self._free_mask = cast("torch.BoolTensor", mask)
        self._tail = b""  # the last bytes of the free text
        self._found = False

    def allowed_mask(self) -> torch.BoolTensor | None:
        return self._constraint.allowed_mask() if self._found else self._free_mask

    def accept(self, token_id: int) -> None:
        """Take in the chosen token.

        Raises:
            RequestError: one token ends the marker and begins what follows; or as `constraint` does.
        """
        if self._found:
            self._constraint.accept(token_id)
            return
        text = self._tail + self._tokenizer.token_bytes(token_id)
        before, found, rest = text.partition(self._marker)
        if found and rest.strip():
            problem = f"a token holds {self._marker!r} and what follows it"
            raise RequestError(problem, field="structured_outputs.after")
        self._found = bool(found)
        self._tail = before[-len(self._marker) :]

    @property
    def finished(self) -> bool:
        return self._found and self._constraint.finished


def _grammar(wanted: StructuredOutputs) -> str:
    import llguidance

    matcher = llguidance.LLMatcher
    if wanted.json is not None or wanted.json_object:
        schema: Any = wanted.json or '{"type": "object"}'
        return matcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": JSON_SPACE})
    if wanted.regex is not None:
        return matcher.grammar_from_lark(f"start: /{llguidance.regex_to_lark(wanted.regex, 'd')}/")
    if wanted.choice is not None:
        return matcher.grammar_from_lark("start: " + " | ".join(dumps(text) for text in wanted.choice))
    return llguidance.grammar_from("grammar", wanted.grammar or "")


class _Vocabulary:
    """What `llguidance.TokenizerWrapper` asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        ids = range(tokenizer.vocab_size)
        self.eos_token_id = min(tokenizer.stop_ids)
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in ids]
        self.special_token_ids = [token_id for token_id in ids if tokenizer.is_control(token_id)]
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        decoded = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return self._tokenizer.encode(decoded, add_special=False)


def _ll_tokenizer(tokenizer: Tokenizer) -> LLTokenizer:
    try:
        import llguidance
    except ModuleNotFoundError as error:
        raise RequestError(
            "structured output needs the package llguidance: pip install 'hybrid-moe[server]'",
            field="structured_outputs",
        ) from error
    if not tokenizer.stop_ids:
        raise RequestError("the model's vocabulary names no end token", field="structured_outputs")
    wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer))
    ends = sorted(tokenizer.stop_ids)
    return llguidance.LLTokenizer(wrapper, n_vocab=tokenizer.vocab_size, eos_token=ends)


def _refusal(wanted: StructuredOutputs, problem: str) -> RequestError:
    return RequestError(problem.strip() or "it is not valid", field=f"structured_outputs.{wanted.kind}")

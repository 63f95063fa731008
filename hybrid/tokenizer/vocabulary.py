"""The vocabulary of a GGUF file: tokens, their types, special ids, all checked.

Keys, defaults and the names of end-of-turn tokens are those of the GGUF specification and of
llama.cpp (src/llama-vocab.cpp).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, cast

import numpy as np

from hybrid.errors import TokenizerError
from hybrid.log import get_logger
from hybrid.tokenizer.metadata import Metadata, read_flag, read_id, read_numbers, read_strings, read_text
from hybrid.tokenizer.pretokenizers import PreTokenizer, pre_tokenizer

logger = get_logger(__name__)

MODELS = ("gpt2", "llama")


class TokenType(IntEnum):
    """``tokenizer.ggml.token_type``. CONTROL and UNKNOWN never come out of plain text."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Types that plain text never turns into.
UNREACHABLE = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.UNUSED, TokenType.BYTE)

# Tokens that end a generation wherever they appear, found by their text since many files name only one.
_END_NAMES = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "</s>",
    "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>",
    "<REPO>", "<reponame>", "<|file_sep|>",
)  # fmt: skip
_END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")


@dataclass(frozen=True)
class Vocabulary:
    """Checked tokeniser metadata.

    Attributes:
        model: ``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece BPE by scores).
        tokens: text of each id; several may be empty, all others differ.
        types: int64 [len(tokens)], `TokenType` of each id; tokens known to end a turn are CONTROL
            whatever the file says.
        ids: id of each non-empty text.
        merges: pairs in rank order, each naming two tokens whose concatenation is a token (``gpt2``);
            none makes or uses an `UNREACHABLE` token.
        scores: float32 [len(tokens)], higher merges first (``llama``).
        stop_ids: eos, eot, eom and the well-known end-of-turn tokens.
    """

    model: str
    pre: PreTokenizer
    tokens: list[str]
    types: Any
    ids: dict[str, int]
    merges: list[tuple[str, str]]
    scores: Any
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    stop_ids: frozenset[int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool

    def of_types(self, *kinds: TokenType) -> list[int]:
        """Ids of the tokens of some types, ascending."""
        return [int(index) for index in np.flatnonzero(np.isin(self.types, kinds))]


def read_vocabulary(metadata: Metadata) -> Vocabulary:
    """The vocabulary that ``tokenizer.ggml.*`` describes.

    Raises:
        TokenizerError: a key is missing, of a wrong type or length, or contradicts another.
    """
    model = _model(metadata)
    is_spm = model == "llama"
    tokens, ids = _tokens(metadata)
    types = _types(metadata, tokens)
    pre = PreTokenizer((), add_bos=True) if is_spm else _pre(metadata)
    stop_ids = _stop_ids(metadata, tokens, ids, types)
    scores = read_numbers(metadata, "tokenizer.ggml.scores", len(tokens), np.float32)
    if is_spm and scores is None:
        raise TokenizerError("tokenizer.ggml.scores: missing; a `llama` vocabulary merges by its scores")
    special = {
        name: read_id(metadata, f"tokenizer.ggml.{name}_token_id", len(tokens))
        for name in ("bos", "eos", "unknown", "padding", "seperator", "mask")  # GGUF's own spelling
    }
    if is_spm:  # SentencePiece's own defaults
        for name, default in (("unknown", 0), ("bos", 1), ("eos", 2)):
            if special[name] is None and default < len(tokens):
                special[name] = default
    return Vocabulary(
        model=model,
        pre=pre,
        tokens=tokens,
        types=types,
        ids=ids,
        merges=[] if is_spm else _merges(metadata, tokens, ids, types),
        scores=scores,
        bos_id=special["bos"],
        eos_id=special["eos"],
        unknown_id=special["unknown"],
        stop_ids=stop_ids | ({special["eos"]} if special["eos"] is not None else set()),
        add_bos=_adds(metadata, "bos", pre.add_bos, special["bos"]),
        add_eos=_adds(metadata, "eos", False, special["eos"]),
        add_space_prefix=read_flag(metadata, "tokenizer.ggml.add_space_prefix", is_spm),
    )


def _model(metadata: Metadata) -> str:
    model = read_text(metadata, "tokenizer.ggml.model")
    if model is None:
        raise TokenizerError("tokenizer.ggml.model: missing; the file holds no vocabulary")
    if model not in MODELS:
        raise TokenizerError(
            f"tokenizer.ggml.model: unknown tokenizer model {model!r}. Known models: {', '.join(MODELS)}"
        )
    return model


def _pre(metadata: Metadata) -> PreTokenizer:
    name = read_text(metadata, "tokenizer.ggml.pre")
    if name is None:
        logger.warning(
            "tokenizer.ggml.pre is missing: text is cut by the 'default' rules, perhaps not this model's; "
            "convert the model again if its answers are poor"
        )
        name = "default"
    return pre_tokenizer(name)


def _tokens(metadata: Metadata) -> tuple[list[str], dict[str, int]]:
    tokens = read_strings(metadata, "tokenizer.ggml.tokens")
    if not tokens:
        raise TokenizerError("tokenizer.ggml.tokens: missing or empty; the file holds no vocabulary")
    ids = {text: index for index, text in enumerate(tokens)}
    ids.pop("", None)
    if len(ids) + tokens.count("") != len(tokens):
        first: dict[str, int] = {}
        for index, text in enumerate(tokens):
            if text and first.setdefault(text, index) != index:
                raise TokenizerError(
                    f"tokenizer.ggml.tokens: token {text!r} appears twice, as id {first[text]} and id {index}"
                )
    return tokens, ids


def _types(metadata: Metadata, tokens: list[str]) -> Any:
    key = "tokenizer.ggml.token_type"
    types = read_numbers(metadata, key, len(tokens), np.int64)
    if types is None:
        return np.full(len(tokens), TokenType.NORMAL, dtype=np.int64)
    outside = np.flatnonzero((types < 0) | (types > TokenType.BYTE))
    if outside.size:
        index = int(outside[0])
        raise TokenizerError(
            f"{key}: expected 0 to {TokenType.BYTE:d}, found {types[index]} at index {index}"
        )
    for index in np.flatnonzero(types == TokenType.BYTE).tolist():
        if not re.fullmatch("<0x[0-9A-Fa-f]{2}>", tokens[index]):
            raise TokenizerError(
                f"{key}: token {index} is of type BYTE: expected a text from <0x00> to <0xFF>, "
                f"found {tokens[index]!r}"
            )
    return types


def _merges(metadata: Metadata, tokens: list[str], ids: dict[str, int], types: Any) -> list[tuple[str, str]]:
    key = "tokenizer.ggml.merges"
    lines = read_strings(metadata, key)
    if lines is None:
        raise TokenizerError(f"{key}: missing; a `gpt2` vocabulary needs its merges")
    # Whole-list operations: a quarter of a million merges pass through here at every start.
    pairs = [tuple(line.split(" ", 1)) for line in lines]
    named = {text for pair in pairs for text in pair} | {line.replace(" ", "", 1) for line in lines}
    if not named <= ids.keys() or any(len(pair) != 2 for pair in pairs):
        for index, line in enumerate(lines):
            left, _, right = line.partition(" ")
            if left not in ids or right not in ids or left + right not in ids:
                raise TokenizerError(_merge_fault(f"{key}: merge {index} ({line!r})", left, right, ids))
    unreachable = named & {tokens[index] for index in np.flatnonzero(np.isin(types, UNREACHABLE))}
    if unreachable:
        logger.warning(
            "%s: merges that involve %d control, byte or unused tokens (such as %r) are left out: "
            "plain text never becomes one", key, len(unreachable), min(unreachable),
        )  # fmt: skip
        pairs = [pair for pair in pairs if unreachable.isdisjoint((*pair, "".join(pair)))]
    return list(dict.fromkeys(cast("list[tuple[str, str]]", pairs)))


def _merge_fault(where: str, left: str, right: str, ids: dict[str, int]) -> str:
    if not left or not right or " " in right:
        return f"{where} is malformed: expected two tokens separated by one space"
    missing = [text for text in (left, right, left + right) if text not in ids]
    return f"{where} names {missing[0]!r}, which is not in tokenizer.ggml.tokens"


def _stop_ids(metadata: Metadata, tokens: list[str], ids: dict[str, int], types: Any) -> frozenset[int]:
    """Ids that end a generation; marks those found by their text CONTROL in ``types``."""
    named = {ids[text] for text in _END_NAMES if text in ids}
    # These spellings end a turn in some vocabularies and are ordinary in those that hold the other token.
    if {"<|call|>", "<|return|>"} <= ids.keys() or {"<|calls|>", "<|flush|>"} <= ids.keys():
        named.discard(ids.get("<|end|>", -1))
    if "<|tool_response>" in ids:
        named.discard(ids.get("</s>", -1))
    normal = {index for index in named if types[index] == TokenType.NORMAL}
    if normal and "tokenizer.ggml.merges" in metadata:
        # A token that merges build is text that happens to look like one (Qwen's "</s>").
        built = {line.replace(" ", "", 1) for line in read_strings(metadata, "tokenizer.ggml.merges") or ()}
        named -= {index for index in normal if tokens[index] in built}
    for index in named:
        if types[index] != TokenType.CONTROL:
            logger.info("token %d (%r) ends a turn and is treated as a control token", index, tokens[index])
            types[index] = TokenType.CONTROL
    keyed = (read_id(metadata, f"tokenizer.ggml.{name}_token_id", len(tokens)) for name in _END_KEYS)
    return frozenset(named) | {index for index in keyed if index is not None}


def _adds(metadata: Metadata, name: str, default: bool, token_id: int | None) -> bool:
    key = f"tokenizer.ggml.add_{name}_token"
    wanted = read_flag(metadata, key, default)
    if wanted and token_id is None:
        if key in metadata:
            raise TokenizerError(f"{key}: true, but tokenizer.ggml.{name}_token_id is missing")
        return False
    return wanted

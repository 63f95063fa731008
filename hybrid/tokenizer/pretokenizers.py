"""How text is cut into words before byte-level BPE: one entry per kind, one name table.

A kind is a list of regular expressions. Each is applied to every piece the one before left over;
its matches and the gaps between them become pieces ("isolated" splitting). Expressions are those of
the models' own tokenizer.json files (Oniguruma syntax); names, flags and kinds that have no such file
are those of llama.cpp (src/llama-vocab.cpp). Where llama.cpp approximates an expression in ASCII,
the original stands here.
"""

from __future__ import annotations

from dataclasses import dataclass

from hybrid.errors import TokenizerError


@dataclass(frozen=True)
class PreTokenizer:
    """One way to cut text.

    Attributes:
        patterns: expressions, applied in order.
        ignore_merges: a word that is a token as a whole becomes it, whatever the merges say.
        add_bos: prepend the bos token when the file does not say (``tokenizer.ggml.add_bos_token``).
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)


def _cased_words(contraction: str, digits: str, exclude: str = "", tail: str = "[\r\n/]*") -> str:
    """Words cut where lower case turns to upper: o200k (GPT-4o) and its relatives."""
    upper = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{exclude}]"
    lower = rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{exclude}]"
    lead = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{lead}{upper}*{lower}+{contraction}|{lead}{upper}+{lower}*{contraction}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+{tail}|{_SPACES}"
    )


_GPT4O = _cased_words(_CONTRACTION + "?", r"\p{N}{1,3}")
_TEKKEN = _cased_words("", r"\p{N}")
# Han runs are words of their own, so the word classes leave Han out (moonshot's tokenization_kimi.py).
_KIMI = r"\p{Han}+|" + _cased_words(
    _CONTRACTION + "?", r"\p{N}{1,3}", exclude=r"&&[^\p{Han}]", tail="[\r\n]*"
)

_CJK_DEEPSEEK = "[一-龥ࠀ-一가-퟿]+"
_DEEPSEEK_V3_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Cased letters as DeepSeek-LLM's tokenizer.json lists them (an older Unicode than \p{L&} means today).
_CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚ"
    "Ḁ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳ"
    "Ꙁ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)

_DEFAULT = PreTokenizer(
    (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
)
_KINDS: dict[PreTokenizer, str] = {
    _DEFAULT: "default",
    PreTokenizer((_GPT2,)): "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum "
    "modern-bert mpt olmo jais trillion granite-docling exaone4",
    PreTokenizer((r"\p{N}", _GPT2)): "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2",
    PreTokenizer(
        (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"),
    ): "falcon",
    PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True): "llama-bpe llama3 llama-v3 falcon3 "
    "falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
    PreTokenizer((_LLAMA3,)): "dbrx smaug-bpe chatglm-bpe",
    PreTokenizer((_LLAMA3,), ignore_merges=True): "glm4 glm5",
    PreTokenizer((_QWEN2,)): "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open "
    "grok-2",
    PreTokenizer((_QWEN35,)): "qwen35",
    PreTokenizer(
        (
            "[\r\n]",
            rf"\s?[{_CASED_LETTERS}]+",
            r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
            r"\s+$",
            _CJK_DEEPSEEK,
            r"\p{N}+",
        )
    ): "deepseek-llm",
    PreTokenizer(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_DEEPSEEK, r"\p{N}")): "deepseek-coder",
    PreTokenizer((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK_V3_WORDS)): "deepseek-v3 hunyuan-dense "
    "joyai-llm hy_v4",
    PreTokenizer((_KIMI,)): "kimi-k2",
    PreTokenizer((_GPT4O,)): "gpt-4o llama4 kanana2 talkie minimax-m2",
    PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True): "tekken",
    PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O)): "tiny_aya cohere2moe",
    PreTokenizer(
        (r"\p{N}{1,3}", rf"{_CONTRACTION}|{_WORD}|\p{{N}}+|{_SYMBOLS}|{_SPACES}"), ignore_merges=True
    ): "minicpm5",
    PreTokenizer(
        (
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ): "bailingmoe bailingmoe2 llada-moe",
    PreTokenizer((rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)): "seed-coder",
    PreTokenizer(
        (
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ): "exaone-moe",
    PreTokenizer((r" ?[^(\s|.,!?…。，、।۔،)]+",)): "poro-chat bloom gpt3-finnish",
    PreTokenizer((r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}")): "viking",
}

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    name: kind for kind, names in _KINDS.items() for name in names.split()
}


def pre_tokenizer(name: str) -> PreTokenizer:
    """The entry of a ``tokenizer.ggml.pre`` name.

    Raises:
        TokenizerError: the name is not in the table; the message lists what is.
    """
    try:
        return PRE_TOKENIZERS[name]
    except KeyError:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise TokenizerError(
            f"tokenizer.ggml.pre: unknown pre-tokenizer {name!r}. Known names: {known}. "
            "A guess would cut words wrongly without any error, so the vocabulary is refused"
        ) from None

"""The corpus generator: same seed, same text; rich; grammatical as far as rules can tell."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def corpus(part: Callable[[str], ModuleType]) -> ModuleType:
    return part("corpus")


@pytest.fixture(scope="module")
def stories(corpus: ModuleType) -> list[str]:
    return [document.text for document in itertools.islice(corpus.documents(seed=7), 3000)]


def test_same_seed_same_text(corpus: ModuleType, stories: list[str]) -> None:
    again = [document.text for document in itertools.islice(corpus.documents(seed=7), 20)]
    assert again == stories[:20]
    other = [document.text for document in itertools.islice(corpus.documents(seed=8), 20)]
    assert other != again


def test_more_than_5000_distinct_words(stories: list[str]) -> None:
    words = {word.lower() for text in stories for word in re.findall(r"[A-Za-z][a-z'-]*", text)}
    assert len(words) >= 5000


def test_no_slot_is_left_open(stories: list[str]) -> None:
    for text in stories:
        assert not re.search(r"[\[\]{}<>|]|\(n\)|  ", text), text


def test_articles_fit_the_word_after_them(stories: list[str]) -> None:
    text = "\n".join(stories)
    assert not re.findall(r"\b[Aa] (?:apple|eagle|otter|ant|old|honest|hourglass)\b", text)
    assert not re.findall(r"\b[Aa]n (?:fox|useful|unicorn|bear|ukulele)\b", text)


def test_sentences_begin_in_upper_case(stories: list[str]) -> None:
    for text in stories:
        assert not re.search(r'(^|[.!?] )"?[a-z]', text.replace('?" ', "?'").replace('!" ', "!'")), text


def test_stories_do_not_repeat(stories: list[str]) -> None:
    assert len(set(stories)) == len(stories)

"""The demo model's training text: little stories told by a grammar.

A story keeps its hero, friend, object and places from the first sentence to the last and follows
one of eight plots; every sentence is filled from `lexicon.txt` through the templates of `plots.txt`. The
same seed gives the same text. Run it to see some: ``python -m demo_model.corpus 3``.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).parent
VOWEL_SOUND = re.compile(r"^(?:[aeio]|u(?!s|ni|k)|hour|honest|honou?r|heir)", re.IGNORECASE)


def read_lexicon(path: Path) -> dict[str, list[str]]:
    """Sections of words: ``[name]`` and then the words, separated by spaces."""
    sections: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            words = sections.setdefault(line.strip("[]"), [])
        else:
            words.extend(line.split())
    return sections


def read_templates(path: Path) -> dict[str, list[list[str]]]:
    """Sections of steps of templates: ``[name]``, then a template a line, ``--`` between steps."""
    sections: dict[str, list[list[str]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if header := re.fullmatch(r"\[([a-z ]+)\]", line):
            steps = sections.setdefault(header[1], [[]])
        elif line == "--":
            steps.append([])
        elif line and not line.startswith("#"):
            steps[-1].append(line)
    return sections


LEXICON = read_lexicon(FOLDER / "lexicon.txt")
TEMPLATES = read_templates(FOLDER / "plots.txt")
PLOTS = [steps for name, steps in TEMPLATES.items() if name.startswith("plot ")]
# Adjectives that may stand before a drawn noun that has none.
ADJECTIVES = {"animals": "characters", "roles": "characters", "plants": "colours"} | dict.fromkeys(
    ("places", "objects"), "looks"
)
SYNONYMS = {phrase: line for line in TEMPLATES["synonyms"][0] for phrase in line.split("|")}
PHRASE = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, sorted(SYNONYMS, key=len, reverse=True)))})(?!\w)")
BARE_NOUN = re.compile(rf"(?<![>}}] )<({'|'.join(ADJECTIVES)})(?=[:>])")
IRREGULAR_PLURALS = dict(pair.split(":") for pair in LEXICON["irregular"])
UNCOUNTED = frozenset(LEXICON["uncounted"])  # foods that have no plural
FEMALE = {"He": "She", "he": "she", "him": "her", "his": "her", "His": "Her", "himself": "herself"}
MALE = {word: word for word in FEMALE}


def plural(word: str) -> str:
    if word in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[word]
    for man in ("man", "woman"):
        if word.endswith(man):
            return word[: -len("an")] + "en"
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if re.search(r"(s|x|z|ch|sh)$", word) else "s")


def present_participle(base: str) -> str:
    if base.endswith("ie"):
        return base[:-2] + "ying"
    if base.endswith("e") and not base.endswith("ee"):
        return base[:-1] + "ing"
    doubles = re.search(r"(?:^|[^aeiou])[aeiou][bdgklmnprt]$", base)
    if doubles and not re.search(r"(er|en|ow|isit|iver|emember)$", base):
        return base + base[-1] + "ing"
    return base + "ing"


def choose_alternatives(template: str, rng: random.Random) -> str:
    """Resolves ``[a|b]``, innermost first."""
    innermost = re.compile(r"\[([^\[\]]*)\]")
    while match := innermost.search(template):
        chosen = rng.choice(match[1].split("|"))
        template = template[: match.start()] + chosen + template[match.end() :]
    return template


@dataclass
class Story:
    """What stays the same throughout one story."""

    rng: random.Random
    slots: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng, lexicon = self.rng, LEXICON
        names: dict[str, str] = {}
        for person in ("hero", "friend", "other"):
            female = rng.random() < 0.5
            pool = [name for name in lexicon["girls" if female else "boys"] if name not in names.values()]
            names[person] = rng.choice(pool)
            for word, form in (FEMALE if female else MALE).items():
                if person == "hero":
                    self.slots[word] = form
                elif person == "friend":
                    self.slots["friend" + word] = form
        self.slots.update(names)
        kinds = rng.sample(lexicon["animals"] + lexicon["roles"], 2)
        self.slots["kind"], self.slots["friendkind"] = kinds
        self.slots["place"], self.slots["object"] = (
            rng.choice(lexicon["places"]),
            rng.choice(lexicon["objects"]),
        )
        towns = [rng.choice(lexicon["townheads"]) + rng.choice(lexicon["towntails"]) for _ in range(2)]
        self.slots["town"], self.slots["town2"] = towns

    def fill(self, template: str) -> str:
        """A sentence from a template."""
        if template.startswith("{He}") and self.rng.random() < 0.4:
            template = template.replace("{He}", "{hero}", 1)
        text = PHRASE.sub(lambda m: f"[{SYNONYMS[m[1]]}]", choose_alternatives(template, self.rng))
        text = BARE_NOUN.sub(self._describe, choose_alternatives(text, self.rng))
        text = re.sub(r"<(\w+)(?::(\w+))?>", self._draw, text)
        text = re.sub(r"\{(\w+)\}", lambda match: self.slots[match[1]], text)
        text = re.sub(r"\ba\(n\) (\S+)", lambda m: ("an " if VOWEL_SOUND.match(m[1]) else "a ") + m[1], text)
        text = re.sub(r"\bA\(n\) (\S+)", lambda m: ("An " if VOWEL_SOUND.match(m[1]) else "A ") + m[1], text)
        return capitalised(text)

    def _describe(self, match: re.Match[str]) -> str:
        return f"<{ADJECTIVES[match[1]]}> {match[0]}" if self.rng.random() < 0.4 else match[0]

    def _draw(self, match: re.Match[str]) -> str:
        section, form = match[1], match[2]
        words = LEXICON[section]
        if form == "s":
            words = [word for word in words if word not in UNCOUNTED]
        word = self.rng.choice(words)
        base, _, past = word.partition(":")
        if section == "goals":
            return past if form == "s" else base
        if form == "ing":
            return present_participle(base)
        return plural(base) if form == "s" else (past or base)

    def sentences(self) -> list[str]:
        rng = self.rng
        (openings,), (habits,), (endings,) = (TEMPLATES[name] for name in ("opening", "habit", "ending"))
        templates = [rng.choice(openings), *rng.sample(habits, rng.choice((1, 1, 2)))]
        templates += [rng.choice(step) for step in rng.choice(PLOTS)]
        templates += rng.sample(endings, rng.choice((1, 2)))
        return [self.fill(template) for template in templates]

    def text(self) -> str:
        """The story, in two to four paragraphs."""
        paragraphs: list[list[str]] = [[]]
        for sentence in self.sentences():
            if len(paragraphs[-1]) >= 3 and self.rng.random() < 0.4:
                paragraphs.append([])
            paragraphs[-1].append(sentence)
        return "\n\n".join(" ".join(paragraph) for paragraph in paragraphs)


def capitalised(text: str) -> str:
    """The first letter of each sentence in upper case."""
    text = re.sub(r'^("?)([a-z])', lambda m: m[1] + m[2].upper(), text)
    return re.sub(r'([.!?] "?)([a-z])', lambda m: m[1] + m[2].upper() if m[1][-1] != '"' else m[0], text)


@dataclass(frozen=True)
class Document:
    """One training text; with a ``request`` it is a chat of one turn."""

    text: str
    request: str | None = None


def documents(seed: int, chat_share: float = 0.3) -> Iterator[Document]:
    """Endless stories of a seed."""
    rng = random.Random(seed)
    while True:
        story = Story(rng)
        if rng.random() < chat_share:
            request, reply = (story.fill(rng.choice(TEMPLATES[name][0])) for name in ("request", "reply"))
            yield Document(reply + (" " if reply else "") + story.text(), request)
        else:
            yield Document(story.text())


if __name__ == "__main__":
    for _, document in zip(range(int(sys.argv[1])), documents(seed=0), strict=False):
        print(f"{document.request or '-'}\n\n{document.text}\n\n")

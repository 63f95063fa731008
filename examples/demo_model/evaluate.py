"""Figures of the model card: perplexity against n-gram models, and how much the samples recite.

python -m demo_model.evaluate build/demo        (from examples/)
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from . import corpus, vocabulary
from .model import DemoConfig, DemoModel
from .train import load_model

HELD_OUT_SEED = 1_000_003
DISCOUNT = 0.75


class KneserNey:
    """Interpolated Kneser-Ney with one absolute discount (Chen and Goodman 1999, section 2.7)."""

    def __init__(self, ids: np.ndarray, order: int) -> None:
        self.order = order
        self.counts: list[Counter[tuple[int, ...]]] = []
        stream = ids.tolist()
        highest = Counter(zip(*(stream[i:] for i in range(order)), strict=False))
        self.counts = [highest]
        for _ in range(order - 1):
            # Lower orders count in how many contexts an n-gram ends, not how often it occurs.
            self.counts.insert(0, Counter(gram[1:] for gram in self.counts[0]))
        self.totals = [Counter[tuple[int, ...]]() for _ in self.counts]
        self.kinds = [Counter[tuple[int, ...]]() for _ in self.counts]
        for n, grams in enumerate(self.counts):
            for gram, count in grams.items():
                self.totals[n][gram[:-1]] += count
                self.kinds[n][gram[:-1]] += 1

    def probability(self, context: tuple[int, ...], token: int, vocab_size: int) -> float:
        value = 1.0 / vocab_size
        for n in range(self.order):
            history = context[len(context) - n :]
            total = self.totals[n][history]
            if total:
                kept = max(self.counts[n][(*history, token)] - DISCOUNT, 0.0)
                value = (kept + DISCOUNT * self.kinds[n][history] * value) / total
        return value

    def perplexity(self, ids: np.ndarray, vocab_size: int) -> float:
        stream = ids.tolist()
        total = 0.0
        for i in range(self.order - 1, len(stream)):
            total -= math.log(self.probability(tuple(stream[i - self.order + 1 : i]), stream[i], vocab_size))
        return math.exp(total / (len(stream) - self.order + 1))


@torch.inference_mode()
def model_perplexity(model: DemoModel, rows: list[list[int]]) -> float:
    """Per token, each document from its own beginning."""
    loss, count = 0.0, 0
    for row in rows:
        ids = torch.tensor(row[: model.c.max_position_embeddings])[None]
        loss += F.cross_entropy(model(ids[:, :-1])[0].float(), ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return math.exp(loss / count)


@torch.inference_mode()
def sample(
    model: DemoModel, prompt: list[int], eos: int, generator: torch.Generator, limit: int = 300
) -> list[int]:
    """A continuation at temperature 0.8, top-p 0.95."""
    ids = list(prompt)
    while len(ids) < limit and (len(ids) == len(prompt) or ids[-1] != eos):
        probabilities, order = torch.softmax(model(torch.tensor([ids]))[0, -1].float() / 0.8, 0).sort(
            descending=True
        )
        probabilities[probabilities.cumsum(0) - probabilities > 0.95] = 0
        ids.append(int(order[torch.multinomial(probabilities, 1, generator=generator)]))
    return ids


def word_runs(text: str, length: int = 8) -> set[tuple[str, ...]]:
    words = re.findall(r"[\w'-]+", text.lower())
    return set(zip(*(words[i:] for i in range(length)), strict=False))


def main(work: Path, training_tokens: int = 3_000_000) -> None:
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    model = load_model(DemoConfig(), work / "checkpoint.pt")
    train_ids = np.load(work / "train.npy")
    held_out = list(itertools.islice(corpus.documents(HELD_OUT_SEED), 200))
    rows = [vocabulary.encode(tokenizer, document) for document in held_out]
    flat = np.array(list(itertools.chain.from_iterable(rows)))
    print(f"held-out: {len(rows)} documents, {len(flat)} tokens")
    print(f"perplexity a token: model {model_perplexity(model, rows):.2f}")
    for order, name in ((2, "bigram"), (3, "trigram")):
        value = KneserNey(train_ids[:training_tokens], order).perplexity(flat, model.c.vocab_size)
        print(f"perplexity a token: {name} {value:.2f}")
    training_text = tokenizer.decode(train_ids.tolist(), skip_special_tokens=True)
    words = Counter(re.findall(r"[A-Za-z][a-z'-]*", training_text))
    print(f"distinct words in the training text: {len({word.lower() for word in words})}")
    generator = torch.Generator().manual_seed(0)
    bos, eos = tokenizer.token_to_id(vocabulary.BOS), tokenizer.token_to_id(vocabulary.EOS)
    samples = [tokenizer.decode(sample(model, [bos], eos, generator)) for _ in range(20)]
    runs = set().union(*(word_runs(text) for text in samples))
    known = runs & word_runs(training_text)
    share = 100 * len(known) / len(runs)
    print(f"8-word runs of {len(samples)} samples: {len(runs)}, in the training text {share:.1f} %")
    print("\n\n---\n\n".join(samples[:5]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Trains the bundled demo model from nothing: corpus, vocabulary, weights, GGUF.

    python examples/train_demo_model.py --work build/demo --out demo.gguf

About an hour on two cores; interrupt and run it again to resume.
"""

import argparse
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parent))
from demo_model import corpus, train, vocabulary
from demo_model.model import DemoConfig, DemoModel

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument(
    "--work", type=Path, default=Path("build/demo"), help="checkpoints and intermediate files"
)
parser.add_argument("--out", type=Path, help="write a GGUF when training is done")
parser.add_argument("--minutes", type=float, default=50.0, help="wall clock of the training")
parser.add_argument("--tokens", type=int, default=8_000_000, help="size of the training text")
parser.add_argument("--steps", type=int, help="stop after so many steps")
args = parser.parse_args()

args.work.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)
words, stream = args.work / "tokenizer.json", args.work / "train.npy"
if not stream.exists():
    print("writing the training text and learning its vocabulary", flush=True)
    sample = islice(corpus.documents(seed=1), 20_000)
    tokenizer = vocabulary.train_vocabulary((d.text for d in sample), DemoConfig.vocab_size)
    tokenizer.save(str(words))
    ids = np.fromiter(
        vocabulary.token_stream(tokenizer, corpus.documents(seed=1), args.tokens), dtype=np.uint16
    )
    np.save(stream, ids)
model = DemoModel(DemoConfig())
train.train(model, np.load(stream), train.TrainConfig(args.minutes, args.steps), args.work / "checkpoint.pt")
if args.out:
    from demo_model.export import export_gguf

    export_gguf(model, Tokenizer.from_file(str(words)), args.out)

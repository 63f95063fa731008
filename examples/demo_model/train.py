"""Training: AdamW with warm-up and cosine decay under a wall-clock budget, checkpoints, resume."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .model import DemoConfig, DemoModel


@dataclass(frozen=True)
class TrainConfig:
    """``minutes`` of wall clock decide how far the schedule goes; everything else is fixed."""

    minutes: float = 50.0
    max_steps: int | None = None
    batch: int = 6
    length: int = 320
    learning_rate: float = 2.5e-3
    warmup_steps: int = 50
    weight_decay: float = 0.05
    balance_rate: float = 2e-3
    checkpoint_every: int = 200


def learning_rate(t: TrainConfig, step: int, progress: float) -> float:
    """Warm-up by steps, then cosine to a twentieth by the share of the budget that is used up."""
    warm = min(1.0, (step + 1) / t.warmup_steps)
    return t.learning_rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(model: DemoModel, ids: np.ndarray, t: TrainConfig, checkpoint: Path) -> None:
    """Trains in place on a stream of ids (uint16), resuming from ``checkpoint`` where it exists.

    Each row begins where a document does: a name is learned by copying it from the story's first sentence.
    """
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": t.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=t.learning_rate, betas=(0.9, 0.95), fused=True)
    step, used = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, used = state["step"], state["used"]
    start, window = time.monotonic() - used, t.length + 1
    starts = np.flatnonzero(ids[: len(ids) - window] == ids[0])
    per_epoch = len(starts) // t.batch
    average = 0.0
    while (progress := (time.monotonic() - start) / (60 * t.minutes)) < 1 and step != t.max_steps:
        order = np.random.default_rng(step // per_epoch).permutation(starts)
        chosen = order[step % per_epoch * t.batch :][: t.batch]
        rows = torch.from_numpy(np.stack([ids[i : i + window] for i in chosen]).astype(np.int64))
        rate = learning_rate(t, step, progress)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(rows[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.balance(t.balance_rate * (1 - progress))
        step += 1
        average = loss.item() if step == 1 else 0.97 * average + 0.03 * loss.item()
        if step % 20 == 0:
            elapsed = time.monotonic() - start
            speed = step * t.batch * t.length / elapsed
            where = f"{elapsed / 60:.1f} of {t.minutes:.0f} min"
            print(f"step {step} loss {average:.4f} lr {rate:.5f} {speed:.0f} tokens/s {where}", flush=True)
        if step % t.checkpoint_every == 0:
            save(model, optimizer, step, time.monotonic() - start, checkpoint)
    save(model, optimizer, step, time.monotonic() - start, checkpoint)


def save(model: DemoModel, optimizer: torch.optim.Optimizer, step: int, used: float, path: Path) -> None:
    """Writes a checkpoint whole or not at all."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "used": used}
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def load_model(config: DemoConfig, checkpoint: Path) -> DemoModel:
    """The model of a checkpoint."""
    model = DemoModel(config)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    return model.eval()

"""Running fewer experts than the router chose."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch

from hybrid.backends.base import RouterConfig


class ExpertCount(NamedTuple):
    """Pairs of a token and one of its experts, over all layers: chosen by the routers, and run."""

    num_chosen: int = 0
    num_run: int = 0


@dataclass
class ExpertCounter:
    """Counts on the router's device, so that counting waits for nothing."""

    num_chosen: int = 0
    num_run: int | torch.Tensor = 0

    def add(self, topk_ids: torch.Tensor) -> None:
        self.num_chosen += topk_ids.numel()
        self.num_run = self.num_run + (topk_ids >= 0).sum()

    def read(self) -> ExpertCount:
        return ExpertCount(self.num_chosen, int(self.num_run))


def drop_minor_experts(
    topk_ids: torch.Tensor, topk_weights: torch.Tensor, config: RouterConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights ``[T, k]`` of `Backend.route` without the experts that weigh less than the threshold's
    share of their token's heaviest: those get id -1 and weight 0.

    The rest is normalised as the family does its top-k: to a sum of ``routed_scaling_factor``, or not at all.
    New tensors; what a token gets does not depend on the others.
    """
    kept = topk_weights >= config.expert_threshold * topk_weights.amax(-1, keepdim=True)
    ids, weights = topk_ids.where(kept, -1), topk_weights.where(kept, 0.0)
    if config.norm_topk_prob:
        total = reduce(torch.add, weights.unbind(-1))  # term by term: `sum` may group them by shape
        weights = weights * (config.routed_scaling_factor / (total + 1e-20))[:, None]
    return ids, weights

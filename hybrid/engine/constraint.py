"""What the sampler asks of structured output: which tokens may come next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Constraint(Protocol):
    """The state of one completion's grammar. Used by the engine's thread alone once it is made.

    What a method raises ends this completion's request with that error, and no other.
    """

    def allowed_mask(self) -> torch.BoolTensor | None:
        """Tokens that may come next, ``[vocab]``; ``None``: all. End tokens count, where the text may end."""

    def accept(self, token_id: int) -> None:
        """Take in the chosen token. Not called for one that ends the text."""

    @property
    def finished(self) -> bool:
        """Whether nothing can follow: the text ends after the token accepted last."""


# From `SamplingParams.structured_outputs` to a new constraint for each completion; raises `RequestError`.
# Called on whichever thread prepares the request, never on the engine's.
ConstraintFactory = Callable[[Any], Constraint]

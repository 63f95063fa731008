"""What one step computes."""

from __future__ import annotations

from dataclasses import dataclass, field

from hybrid.engine.sequence import Sequence
from hybrid.models.layer_steps import LayerSteps


@dataclass(frozen=True)
class ScheduledSequence:
    """The next ``num_new_tokens`` uncomputed tokens of ``sequence``."""

    sequence: Sequence
    num_new_tokens: int

    @property
    def samples(self) -> bool:
        """Whether a token is chosen after them: no uncomputed one is left."""
        return self.num_new_tokens == self.sequence.num_uncomputed_tokens

    @property
    def samplers(self) -> list[Sequence]:
        """Sequences that choose a token after them: with the prompt's last, all texts of the request."""
        return [self.sequence, *self.sequence.siblings] if self.samples else []


@dataclass(eq=False)
class Batch:
    """Parts of prompts, or one token for each of several running texts.

    Attributes:
        held_blocks: blocks a prompt's batch writes. It has a reference of its own to each, so that a sequence
            that ends meanwhile does not leave them to others.
        steps: the pass of a prompt's batch that has begun; see `ModelRunner`.
    """

    items: list[ScheduledSequence]
    decodes: bool
    held_blocks: list[int] = field(default_factory=list)
    steps: LayerSteps | None = None

    @property
    def num_tokens(self) -> int:
        return sum(item.num_new_tokens for item in self.items)

    @property
    def samplers(self) -> list[Sequence]:
        """Sequences that get a token, in the order of the batch."""
        return [sequence for item in self.items for sequence in item.samplers]

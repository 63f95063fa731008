"""A dynamic expert cache's decisions: which copies to replace, from how often experts were used. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybrid.placement.hot_experts import Expert

_NOWHERE = -1


@dataclass(frozen=True)
class PolicyOptions:
    """How a dynamic cache decides.

    Attributes:
        half_life: tokens after which a use counts half.
        hysteresis: a newcomer must be worth so many times what it replaces.
        min_uses: and by so many decayed uses more, so that single uses move nothing.
        max_copies: copies under way at once.
        interval: steps between two looks at the counts.
    """

    half_life: float = 512.0
    hysteresis: float = 1.25
    min_uses: float = 2.0
    max_copies: int = 2
    interval: int = 8


@dataclass(frozen=True)
class Replacement:
    """Copy ``expert`` to ``slot``, whose expert until now was ``victim``; ``None``: it was free."""

    expert: Expert
    slot: int
    victim: Expert | None


class Slots:
    """Which expert's copy is in which slot.

    Slots are numbered through; those of a kind take experts of layers of that kind only. A slot is empty, or
    its copy is under way, or ready; only ready ones have a place in ``table``.

    Attributes:
        table: int32 ``[layers, num_experts + 1]``: id -> slot within its kind, -1: no copy; id -1, the last
            column, has none.
    """

    def __init__(self, kinds: list[int], num_experts: int, capacity: list[int]) -> None:
        self.kinds, self.capacity = kinds, capacity
        self.table = np.full((len(kinds), num_experts + 1), _NOWHERE, np.int32)
        self._free = [list(range(count))[::-1] for count in capacity]
        self._loading: dict[Expert, int] = {}

    def slot_of(self, expert: Expert) -> int | None:
        """Of a ready copy."""
        slot = int(self.table[expert])
        return None if slot == _NOWHERE else slot

    @property
    def loading(self) -> tuple[Expert, ...]:
        """Experts whose copies are under way."""
        return tuple(self._loading)

    @property
    def ready(self) -> npt.NDArray[np.bool_]:
        """``[layers, num_experts]``: whether there is a copy that can be used."""
        found: npt.NDArray[np.bool_] = self.table[:, :-1] != _NOWHERE
        return found

    def has_free(self, kind: int) -> bool:
        return bool(self._free[kind])

    def begin(self, expert: Expert, victim: Expert | None = None) -> Replacement:
        """Takes a free slot, or that of ``victim``, which has no copy from now on."""
        kind = self.kinds[expert[0]]
        if victim is None:
            slot = self._free[kind].pop()
        else:
            found = self.slot_of(victim)
            assert found is not None and self.kinds[victim[0]] == kind
            slot = found
            self.table[victim] = _NOWHERE
        self._loading[expert] = slot
        return Replacement(expert, slot, victim)

    def finish(self, expert: Expert) -> None:
        """The copy is there."""
        self.table[expert] = self._loading.pop(expert)

    def abandon(self, expert: Expert) -> None:
        """The copy failed; its slot is free."""
        self._free[self.kinds[expert[0]]].append(self._loading.pop(expert))


class DynamicPolicy:
    """Least-benefit replacement by decayed counts, with hysteresis.

    Args:
        saved_s: ``[layers]`` seconds that a use saves with a copy; where none saves any, uses alone count.
        usable: bool ``[layers, num_experts]``: which experts may have copies.
    """

    def __init__(
        self, saved_s: npt.NDArray[np.float64], usable: npt.NDArray[np.bool_], options: PolicyOptions
    ) -> None:
        self.options, self._usable = options, usable
        weight = np.maximum(saved_s, 0.0)
        self._weight = (weight if weight.any() else np.ones_like(saved_s))[:, None]
        self.scores = np.zeros(usable.shape)

    def start(self, rates: npt.NDArray[np.float64]) -> None:
        """Scores as if experts had always been used so many times by a token."""
        self.scores = rates * (self.options.half_life / np.log(2))

    def observe(self, counts: npt.NDArray[np.int64], num_tokens: int) -> None:
        """Uses ``[layers, num_experts]`` by the ``num_tokens`` tokens since the last call."""
        self.scores *= 0.5 ** (num_tokens / self.options.half_life)
        self.scores += counts

    def decide(self, slots: Slots) -> list[Replacement]:
        """Begins the replacements that are worth most, as many as may be under way."""
        found: list[Replacement] = []
        values = self.scores * self._weight
        # Copies that are under way are neither candidates nor victims.
        taken = slots.ready
        for expert in slots.loading:
            taken[expert] = True
        room = self.options.max_copies - len(slots.loading)
        order = np.argsort(-np.where(taken | ~self._usable, -np.inf, values), axis=None, kind="stable")
        for index in order[: max(room, 0) * 4]:
            if len(found) >= room:
                break
            layer, number = divmod(int(index), values.shape[1])
            expert = layer, number
            if taken[expert] or not self._usable[expert] or self.scores[expert] < self.options.min_uses:
                continue
            replacement = self._place(expert, slots, values)
            if replacement is not None:
                taken[expert] = True
                found.append(replacement)
        return found

    def _place(self, expert: Expert, slots: Slots, values: npt.NDArray[np.float64]) -> Replacement | None:
        kind = slots.kinds[expert[0]]
        if slots.has_free(kind):
            return slots.begin(expert)
        alike = np.array(slots.kinds) == kind
        ready = np.where(slots.ready & alike[:, None], values, np.inf)
        index = int(ready.argmin())
        victim = divmod(index, values.shape[1])
        worst = ready[victim]
        margin = self.options.min_uses * float(self._weight[expert[0], 0])
        if values[expert] < max(worst * self.options.hysteresis, worst + margin):
            return None
        return slots.begin(expert, victim)

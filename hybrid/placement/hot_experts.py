"""Which experts are worth a copy on a device, and what that should do for decoding. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# An expert of a layer.
Expert = tuple[int, int]


@dataclass(frozen=True)
class LayerExperts:
    """Experts of one layer that could have copies.

    Attributes:
        kind: layers of one kind hold experts of the same shapes and formats, so that copies of them can take
            each other's place.
        n_bytes: of one expert there.
        rates: expert -> uses by one written token.
        saved_s: seconds that a use takes less with a copy.
    """

    layer: int
    kind: str
    n_bytes: int
    rates: Mapping[int, float]
    saved_s: float


@dataclass(frozen=True)
class Chosen:
    """Experts with copies, by layer, in ascending order.

    Attributes:
        hit_rate: share of the uses of routed experts that find a copy.
        saved_s: seconds a written token takes less, or more if negative; what a layer with copies costs is
            taken off.
    """

    experts: dict[int, tuple[int, ...]]
    n_bytes: int
    hit_rate: float
    saved_s: float

    @property
    def num_experts(self) -> int:
        return sum(map(len, self.experts.values()))


def choose(layers: Sequence[LayerExperts], capacity_bytes: int, layer_s: float = 0.0) -> Chosen:
    """The experts that save most in so many bytes: the best by seconds saved per byte, which no choice beats
    by more than one expert saves, and where all take as many bytes none beats at all.

    A layer with copies costs ``layer_s`` a token; those whose copies save less get none, as long as any saves
    something. Where a copy saves nothing anywhere, the most used are taken.
    """
    saves = any(layer.saved_s > 0 for layer in layers)
    left = list(layers)
    while True:
        found = _fill(left, capacity_bytes, saves)
        gains = {layer.layer: _gain(layer, found.get(layer.layer, ())) for layer in left}
        poor = [n for n, gain in gains.items() if saves and n in found and gain < layer_s]
        if not poor:
            return _chosen(layers, found, sum(gains.values()) - layer_s * len(found))
        worst = min(poor, key=lambda number: gains[number])
        left = [layer for layer in left if layer.layer != worst]


def _gain(layer: LayerExperts, experts: Sequence[int]) -> float:
    return sum(layer.rates[expert] for expert in experts) * layer.saved_s


def _fill(layers: Sequence[LayerExperts], capacity_bytes: int, saves: bool) -> dict[int, tuple[int, ...]]:
    # Of equals the first experts of all layers come before the second: copies spread over layers.
    order = sorted(
        (-rate * (layer.saved_s if saves else 1.0) / layer.n_bytes, expert, layer.layer, layer.n_bytes)
        for layer in layers
        if layer.saved_s > 0 or not saves
        for expert, rate in layer.rates.items()
    )
    found: dict[int, list[int]] = {}
    for _, expert, number, n_bytes in order:
        if n_bytes <= capacity_bytes:
            capacity_bytes -= n_bytes
            found.setdefault(number, []).append(expert)
    return {number: tuple(sorted(experts)) for number, experts in sorted(found.items())}


def _chosen(layers: Sequence[LayerExperts], found: dict[int, tuple[int, ...]], saved_s: float) -> Chosen:
    uses = sum(sum(layer.rates.values()) for layer in layers)
    hits = sum(layer.rates[expert] for layer in layers for expert in found.get(layer.layer, ()))
    n_bytes = sum(layer.n_bytes * len(found.get(layer.layer, ())) for layer in layers)
    return Chosen(found, n_bytes, hits / uses if uses else 0.0, saved_s)


def choose_slots(layers: Sequence[LayerExperts], capacity_bytes: int) -> Chosen:
    """Copies where nothing is known of use: each kind gets its share of the bytes, spread over its layers."""
    total = sum(layer.n_bytes * len(layer.rates) for layer in layers)
    found: dict[int, tuple[int, ...]] = {}
    for kind in dict.fromkeys(layer.kind for layer in layers):
        alike = [layer for layer in layers if layer.kind == kind]
        size = sum(layer.n_bytes * len(layer.rates) for layer in alike)
        found |= _fill(alike, capacity_bytes * size // total, saves=False)
    saved_s = sum(_gain(layer, found.get(layer.layer, ())) for layer in layers)
    return _chosen(layers, found, saved_s)


@dataclass(frozen=True)
class ExpertCachePlan:
    """An expert cache as it is planned.

    Attributes:
        profile: file the uses are from; ``None``: all experts are taken to be used alike.
        chosen: the copies it starts with; a dynamic policy replaces them.
        layers: those with experts on the CPU that could have copies, in order.
        decode_tps, without_tps: predicted tokens per second with the cache and without; ``None``: unknown.
    """

    device: str
    policy: str
    profile: str | None
    chosen: Chosen
    layers: tuple[LayerExperts, ...]
    decode_tps: float | None
    without_tps: float | None

    @property
    def num_experts(self) -> int:
        """Experts that could have copies."""
        return sum(len(layer.rates) for layer in self.layers)

    @property
    def pays(self) -> bool | None:
        """Whether decoding should get faster; ``None`` where speed cannot be predicted."""
        if self.decode_tps is None or self.without_tps is None:
            return None
        return self.decode_tps > self.without_tps

    def __str__(self) -> str:
        chosen = self.chosen
        basis = "taking all experts as used alike" if self.profile is None else f"by {self.profile}"
        text = (
            f"expert cache on {self.device}: {chosen.n_bytes / 2**30:.2f} GiB for copies of "
            f"{chosen.num_experts} of {self.num_experts} experts, {self.policy}, {chosen.hit_rate:.1%} of "
            f"uses expected to find one, {basis}"
        )
        if self.decode_tps is None or self.without_tps is None:
            return text
        change = f"{self.without_tps:.4g} -> {self.decode_tps:.4g} tokens/s"
        verdict = "it pays" if self.pays else "it does not pay here: leave experts.cache out"
        return f"{text}: predicted {change}, {verdict}"

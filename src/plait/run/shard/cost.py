"""What a way of sharding costs, in fractions of the unsharded model: to choose between ways, not to predict times.

    cost = FEWER * collectives + FLOPS * (matmul FLOPs per rank / all) + STORAGE * (parameter bytes per rank / all)
         + ACTIVATIONS * (elements written per rank / all) + TRAFFIC * (elements through collectives / elements that matmuls write)

Every term is a ratio of the model to itself, so a small copy of a model is sharded as the large one is. Whoever asks for
tensor parallelism has decided that its traffic is worth it in general; here it only has to be spent well. Seconds
on a given cluster are `plait.cost`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Tally"]

FLOPS = 1.0
STORAGE = 0.5  # memory is why most people shard: half as dear as time
ACTIVATIONS = 0.2
TRAFFIC = 0.3  # a Megatron layer sends about a third of what its matmuls write: 0.1 against 0.5 + 0.25 saved at tp=2
CALL = (
    0.1  # a collective's latency as a share of the mean matmul's output: about 15 us beside the 160 us that 32 MB take
)
FEWER = 0.001  # between ways that cost the same, the one with fewer collectives


@dataclass
class Tally:
    """Sums over a graph under one set of placements."""

    flops: float = 0.0
    all_flops: float = 0.0
    storage: float = 0.0
    all_storage: float = 0.0
    activations: float = 0.0
    all_activations: float = 0.0
    matmul_output: float = 0.0
    matmuls: int = 0
    traffic: float = 0.0
    calls: int = 0
    log: list[tuple[str, str, float, bool]] = field(default_factory=list)
    """(kind, node, elements, whether in the backward) of every collective."""

    def send(self, kind: str, node: str, elements: float, backward: bool = False) -> None:
        """Count one collective over a whole value of so many elements."""
        self.traffic += elements * (2.0 if kind == "all_reduce" else 1.0) / 2
        self.calls += 1
        self.log.append((kind, node, elements, backward))

    @property
    def call(self) -> float:
        """A collective's latency in elements."""
        return CALL * self.matmul_output / max(self.matmuls, 1)

    @property
    def cost(self) -> float:
        """The one number that is compared."""
        return (
            FEWER * self.calls
            + FLOPS * self.flops / max(self.all_flops, 1.0)
            + STORAGE * self.storage / max(self.all_storage, 1.0)
            + ACTIVATIONS * self.activations / max(self.all_activations, 1.0)
            + TRAFFIC * (self.traffic + self.call * self.calls) / max(self.matmul_output, 1.0)
        )

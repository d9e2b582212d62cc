"""What a search looks at, what of it is legal, and what plait's own runtime can execute."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from plait.errors import PlanError
from plait.schema.cluster import Cluster
from plait.schema.graph import Graph
from plait.schema.plan import Plan

__all__ = [
    "Degrees",
    "Facts",
    "Space",
    "degrees",
    "facts_of",
    "illegal",
    "microbatch_counts",
    "refuse_unsupported",
    "unsupported",
]


LEAST_TOKENS = 512
"""Below so many tokens a device, context parallelism only adds messages: attention is then a few per cent of the work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """The choices a search combines. Empty tuples mean: every divisor that is legal."""

    tp: tuple[int, ...] = ()
    pp: tuple[int, ...] = ()
    cp: tuple[int, ...] = ()
    ep: tuple[int, ...] = ()
    zero: tuple[int, ...] = (1, 2, 3)
    schedules: tuple[str, ...] = ("1f1b", "interleaved", "zerobubble")
    interleave: tuple[int, ...] = (2, 4)
    recompute: tuple[str, ...] = ("none", "selective", "full")
    mixed: bool = True
    """Recompute choices that differ from segment to segment, where a uniform one does not fit."""
    sequence_parallel: tuple[str, ...] = ("no", "yes")
    shard_within: bool = True
    """Also sharding within a node and replication across (dp x fsdp both above 1)."""
    all_cuts: int = 0
    """Up to so many ways to cut the pipeline are all tried; above, the cuts that balance the stages."""
    all_shares: int = 0
    """On a mixed cluster, up to so many ways to divide a microbatch over the kinds of device are all tried; above, the
    division by speed and those one sample beside it."""
    idle: float | None = None
    """Fraction of the devices a plan may leave idle; None: none up to 64 devices, a tenth above."""
    executable: bool = False
    """Only what plait's own runtime can run."""
    microbatch_sizes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Facts:
    """What of a model restricts plans."""

    segments: int
    heads: frozenset[int]
    """Numbers of query and key-value heads of its attention."""
    experts: int
    tokens: int
    has_attention: bool


@dataclass(frozen=True, slots=True)
class Degrees:
    """The degrees that decide what one device computes."""

    tp: int
    cp: int
    pp: int
    ep: int
    replicas: int
    """dp x fsdp."""

    @property
    def devices(self) -> int:
        """Devices in use."""
        return self.tp * self.cp * self.pp * self.replicas


def facts_of(graph: Graph) -> Facts:
    """The facts of a graph."""
    heads: set[int] = set()
    experts = 0
    has_attention = False
    shapes = {spec.name: spec.shape for spec in graph.parameters}
    for segment in graph.segments:
        if segment.equals != segment.index:
            continue
        for op in segment.operators:
            if op.kind == "attention":
                has_attention = True
                heads |= {x.shape[1] for x in op.inputs[:3] if len(x.shape) == 4}
            if op.kind == "matmul" and "grouped_mm" in op.target:
                experts = max([experts, *(shapes[n][0] for n in op.parameters if len(shapes.get(n, ())) == 3)])
    return Facts(len(graph.segments), frozenset(heads), experts, graph.tokens_per_sample, has_attention)


def divisors(number: int) -> list[int]:
    """All divisors, smallest first."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def illegal(facts: Facts, cluster: Cluster, d: Degrees) -> str:
    """Why these degrees cannot be; '' where they can."""
    if d.tp > 1:
        bad = next((h for h in sorted(facts.heads) if h % d.tp), None)
        if bad is not None:
            return f"tp={d.tp}: {bad} attention heads do not divide by {d.tp}"
        fast = max((link.size for link in cluster.links if link.level in ("device", "node", "rack")), default=0)
        if fast and d.tp > fast and d.tp > 1:
            return f"tp={d.tp} would leave the fast network, which joins {fast} devices"
    if d.cp > 1:
        if not facts.has_attention:
            return f"cp={d.cp}: the model has no attention whose sequence could be split"
        if facts.tokens % (2 * d.cp):
            return f"cp={d.cp}: {facts.tokens} tokens do not divide into {2 * d.cp} equal parts"
        if facts.tokens // d.cp < LEAST_TOKENS:
            return f"cp={d.cp} leaves {facts.tokens // d.cp} tokens a device, fewer than {LEAST_TOKENS}"
    if d.pp > facts.segments:
        return f"pp={d.pp}: the model has {facts.segments} segments"
    if d.ep > 1:
        if facts.experts % d.ep:
            return f"ep={d.ep}: {facts.experts} experts do not divide by {d.ep}"
        if d.replicas % d.ep:
            return f"ep={d.ep} does not divide dp x fsdp = {d.replicas}"
    return ""


def degrees(facts: Facts, cluster: Cluster, batch: int, space: Space) -> Iterator[tuple[Degrees, str]]:
    """Every combination of degrees with the reason why it is illegal ('' where it is legal).

    For each tp, cp and pp the replicas are the largest number that the cluster has room for and that divides the batch,
    so that a cluster of an awkward size is used but for a few devices. On a mixed cluster, where shares may differ, also
    as many as there is room for.
    """
    count = cluster.devices
    idle = space.idle if space.idle is not None else (0.0 if count <= 64 else 0.1)
    exact = [b for b in divisors(batch) if b <= count]
    tps = space.tp or tuple(2**i for i in range(count.bit_length()) if 2**i <= count)
    more = {h for head in facts.heads for h in divisors(head)} if not space.tp and facts.heads else set()
    tps = tuple(sorted({*tps, *(h for h in more if h <= min(count, 16))}))
    cps = space.cp or (tuple(2**i for i in range(10) if 2**i <= count) if facts.has_attention else (1,))
    pps = space.pp or tuple(p for p in range(1, min(facts.segments, count) + 1) if _useful(p, facts.segments, count))
    eps = space.ep or tuple(divisors(facts.experts) if facts.experts else (1,))
    for tp in tps:
        for cp in cps:
            for pp in pps:
                room = count // (tp * cp * pp)
                if room < 1:
                    continue
                options = {max((b for b in exact if b <= room), default=0)}
                if not cluster.is_uniform:
                    options.add(min(room, batch))
                enough = [r for r in sorted(options) if r and r * tp * cp * pp >= (1 - idle) * count]
                if not enough:
                    base = Degrees(tp, cp, pp, 1, max(options))
                    other = illegal(facts, cluster, replace(base, replicas=max(1, base.replicas)))
                    yield base, other or f"a batch of {batch} does not divide over enough replicas of {count} devices"
                for replicas, ep in itertools.product(enough, eps):
                    found = Degrees(tp, cp, pp, ep, replicas)
                    yield found, illegal(facts, cluster, found)


def _useful(pp: int, segments: int, count: int) -> bool:
    """Whether a pipeline length is looked at: all small ones, then those that divide the devices or the layers."""
    return pp <= 8 or count % pp == 0 or (segments - 2) % pp == 0


def microbatch_counts(batch: int, replicas: int, cluster: Cluster, space: Space) -> list[int]:
    """Numbers of microbatches, most first.

    A replica's samples in one are a power of two or all it has, and divide these. On a mixed cluster, where replicas may
    take unequal shares, any number that divides the batch and leaves every replica a sample; from eight samples a
    replica on, powers of two again.
    """
    if not cluster.is_uniform:
        means = {m: batch // m // replicas for m in reversed(divisors(batch)) if batch // m >= replicas}
        if space.microbatch_sizes:
            return [m for m, mean in means.items() if mean in space.microbatch_sizes]
        return [m for m, mean in means.items() if mean < 8 or mean & (mean - 1) == 0 or m == 1]
    samples = batch // replicas
    wanted = space.microbatch_sizes
    sizes = [s for s in divisors(samples) if (s in wanted if wanted else s & (s - 1) == 0 or s == samples)]
    return [samples // size for size in sizes]


def unsupported(plan: Plan) -> tuple[str, ...]:
    """What plait's runtime cannot execute yet in `plan`; `train` refuses it with these reasons."""
    reasons = []
    if plan.cp > 1:
        reasons.append(f"cp={plan.cp}: context parallelism is planned, not run")
    if plan.ep > 1:
        reasons.append(f"ep={plan.ep}: expert parallelism is planned, not run")
    if plan.sequence_parallel == "yes":
        reasons.append("sequence_parallel=yes is planned, not run")
    if plan.precision not in ("fp32", "bf16"):
        reasons.append(f"precision={plan.precision} is planned, not run")
    return tuple(reasons)


def refuse_unsupported(plan: Plan) -> None:
    """Refuse what can be planned but not run yet.

    Raises:
        PlanError: with each reason.
    """
    reasons = unsupported(plan)
    if reasons:
        raise PlanError(f"plan: {plan.spec()} can be planned but not run yet: {'; '.join(reasons)}")

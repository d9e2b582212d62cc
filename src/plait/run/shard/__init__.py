"""Tensor parallelism by dataflow: decide a placement for every value of a captured graph, then lower it to local operators."""

from plait.run.shard.decide import Decisions, decide
from plait.run.shard.lower import lower

__all__ = ["Decisions", "decide", "lower"]

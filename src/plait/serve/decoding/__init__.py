"""Decoders with a key-value cache, derived from the forward's graph."""

"""Graph x Cluster x Plan -> Estimate: plain arithmetic, one file a term, no torch."""

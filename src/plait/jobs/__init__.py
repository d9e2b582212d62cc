"""Plan -> job for an engine: one file per engine, `launch` writes what it says."""

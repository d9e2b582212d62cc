"""One file a runtime: what it writes, and how it is run."""

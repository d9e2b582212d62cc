"""How long a plan takes to find: two very large clusters, and a 70-billion-parameter model from a cold start.

    python benchmarks/search.py [-o benchmarks/results/search_cpu_DATE.md]

Each case is a process of its own on one core: the searches report the CPU time of the search alone, the command line its
wall time and peak memory from start to end, once with an empty cache of captures and once with the capture kept.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TARGET = (
    "hf:llama?num_hidden_layers=80&hidden_size=8192&intermediate_size=28672&num_attention_heads=64&num_key_value_heads=8"
    "&vocab_size=128256&seq_len=4096"
)
CLUSTER = "64xH100-SXM"
SEARCHES = {
    "4096xA100-SXM-80GB": (1536, 10.0),
    "100000xH100-SXM": (12000, 60.0),
    "64xH100-SXM+64xA100-SXM-80GB": (512, None),
}
COLD, MEMORY = 25.0, 4.0  # s and GiB that a cold start may take


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_search(options.one)))
        return
    lines = [
        f"# Time to a plan, {datetime.datetime.now(tz=datetime.UTC).date()}",
        "",
        f"{_processor()}, one core, Python {platform.python_version()}; `python benchmarks/search.py`",
        "",
        "| GPT of 175 billion parameters (2,048 tokens) on | batch | plans estimated of groups | CPU s | limit s | best plan |",
        "|---|---|---|---|---|---|",
    ]
    for cluster, (batch, limit) in SEARCHES.items():
        found = json.loads(_run([sys.executable, __file__, "--one", cluster])[0])
        lines.append(
            f"| {cluster} | {batch} | {found['tried']} of {found['groups']} | {found['seconds']:.1f} | {limit or ''} | `{found['spec']}` |"
        )
        print(lines[-1], flush=True)
    lines += [
        "",
        f'`plait plan "{TARGET}" --cluster {CLUSTER}`',
        "",
        "| | wall s | limit s | peak GiB | limit GiB |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "capture kept"):
            _, seconds, peak = _run([sys.executable, "-m", "plait", "plan", TARGET, "--cluster", CLUSTER], cache)
            lines.append(f"| {name} | {seconds:.1f} | {COLD:g} | {peak:.2f} | {MEMORY:g} |")
            print(lines[-1], flush=True)
    if options.output:
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _processor() -> str:
    """The processor's name as the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _search(name: str) -> dict[str, Any]:
    from plait.cost.architecture import Architecture, build_graph
    from plait.hardware.clusters import named_cluster
    from plait.plan.search import search

    gpt = build_graph(Architecture(name="gpt-175b", layers=96, hidden=12288, ffn_hidden=49152, heads=96, kv_heads=96,
                                   head_dim=128, vocab=50304, seq_len=2048, gated=False, learned_positions=True))  # fmt: skip
    cluster = named_cluster(name)
    began = time.process_time()
    found = search(gpt, cluster, batch=SEARCHES[name][0])
    seconds = time.process_time() - began
    return {"seconds": seconds, "groups": found.groups, "tried": found.tried, "spec": found.best.spec()}


def _run(command: list[str], cache: str | None = None) -> tuple[str, float, float]:
    """(output, wall seconds, largest peak memory in GiB of any child so far)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"PLAIT_CACHE": cache} if cache else {})}
    cores = sorted(os.sched_getaffinity(0))[:1]
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True,
                          preexec_fn=lambda: os.sched_setaffinity(0, cores))  # fmt: skip
    seconds = time.perf_counter() - began
    return done.stdout, seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


if __name__ == "__main__":
    main()

"""Times `plait advise` on seven models and three tasks, cold and with the capture cached; writes docs/advise-table.md.

    python benchmarks/advise.py                  # all 21, twice each; about half an hour
    python benchmarks/advise.py --only vit,small # some models; rows of others are kept from the JSON
    python benchmarks/advise.py --table          # writes the table from the JSON again

Each run is a process of its own, as a user starts it. Cold means an empty cache of captures. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "advise.json"
TABLE = HERE.parent / "docs" / "advise-table.md"
LLAMA = "hf:llama?seq_len=2048&vocab_size=128256&num_key_value_heads=8"
MODELS = {
    "llama 8B": f"{LLAMA}&intermediate_size=14336",
    "llama 70B": f"{LLAMA}&hidden_size=8192&num_hidden_layers=80&num_attention_heads=64&intermediate_size=28672",
    "llama 405B": f"{LLAMA}&hidden_size=16384&num_hidden_layers=126&num_attention_heads=128&intermediate_size=53248",
    "mixtral 8x7B": "hf:mixtral?seq_len=2048",
    "vit": "hf:vit",
    "recommender": "benchmarks/advise_targets.py:recommender",
    "small": "benchmarks/advise_targets.py:small",
}
TASKS = {"train": [], "finetune": ["--trainable", "lora:rank=16"], "serve": []}
NO_ADAPTERS = ("recommender",)  # its parameters are tables, which adapters leave alone


def options(model: str, task: str) -> list[str]:
    """What is typed behind the target."""
    if task == "finetune" and model in NO_ADAPTERS:
        return ["--task", task]
    return ["--task", task, *TASKS[task]]


def run(model: str, task: str, cache: Path) -> tuple[dict, float]:
    """(the JSON answer, seconds)."""
    environment = {**os.environ, "PLAIT_CACHE": str(cache)}
    command = [sys.executable, "-m", "plait", "advise", MODELS[model], *options(model, task), "--json"]
    began = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=HERE.parent, env=environment, check=False, timeout=600
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout), seconds


def measure(model: str, task: str, own: Path | None) -> dict:
    """One row: cold, then with the capture cached."""
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        if own is not None and (own / "plait").is_dir():
            for probe in (own / "plait").glob("probe-*.json"):
                (cache / "plait").mkdir(exist_ok=True)
                (cache / "plait" / probe.name).write_text(probe.read_text(encoding="utf-8"), encoding="utf-8")
        _, cold = run(model, task, cache)
        answer, cached = run(model, task, cache)
    first = answer["answers"][0]
    price = first["on_demand"]
    return {
        "model": model,
        "task": task,
        "target": MODELS[model],
        "options": options(model, task),
        "parameters": answer["parameters"],
        "cold_s": cold,
        "cached_s": cached,
        "search_s": answer["seconds"],
        "bounded": answer["bounded"],
        "searched": answer["searched"],
        "unsearched": answer["unsearched"],
        "work": f"{answer['work'].get('tokens', answer['work'].get('amount')):.4g} {answer['work']['unit']}",
        "answer": f"{first['count']:g} {first['accelerator']}",
        "from": "" if price is None else f"{price['cloud']} {price['instance_type']}",
        "hours": first["hours"],
        "usd_per_hour": None if price is None else price["usd_per_hour"],
        "usd": first["usd"],
        "memory_parts_gib": first["memory_parts_gib"],
        "memory_gib": first.get("peak_memory_gib", first.get("memory_gib")),
        "speed": first.get("tokens_per_s", first.get("throughput_per_s")),
        "mfu": first["mfu"],
        "plan": first["spec"],
        "advice": answer["advice"],
    }


def table(rows: list[dict]) -> str:
    """The page."""
    head = [
        "# Advice on seven models",
        "",
        "Made by `python benchmarks/advise.py`; the options of each row are in `benchmarks/results/advise.json`. Seconds are of whole",
        "processes on a virtual machine with 2 cores and light other work; cold is without any kept capture. Dollars are on demand: hours x dollars an",
        "hour, for the tokens or samples named (defaults; see [advice](advise.md)). Fine-tuning trains adapters of rank 16 (all",
        "parameters of the recommender: its tables take none). Prices are of the shipped catalogue; many have no date.",
        "",
        "| model | task | work | answer | from | $/h | hours | $ | plan | cold s | cached s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        hourly, usd = row["usd_per_hour"], row["usd"]
        money = "0" if hourly is None else f"{hourly:,.2f}"
        total = "0" if usd is None else (f"{usd:,.2f}" if usd >= 0.1 else f"{usd:.2g}")
        hours = f"{row['hours']:,.1f}" if row["hours"] >= 1 else f"{row['hours']:.2g}"
        head.append(
            f"| {row['model']} | {row['task']} | {row['work']} | {row['answer']} | {row['from']} | {money} | {hours} | {total} | "
            f"`{row['plan']}` | {row['cold_s']:.1f} | {row['cached_s']:.1f} |"
        )
    slow, slower = max(r["cold_s"] for r in rows), max(r["cached_s"] for r in rows)
    left = sum(r["unsearched"] for r in rows)
    head += [
        "",
        f"Slowest: {slow:.1f} s cold, {slower:.1f} s cached. Shapes left when the time for searching was over: {left}.",
        "",
    ]
    head += ["## In words", ""]
    for row in rows:
        head += [
            f"**{row['model']}, {row['task']}** ({row['bounded']} bounded, {row['searched']} searched). {row['advice']}",
            "",
        ]
    return "\n".join(head)


def kept() -> dict[tuple[str, str], dict]:
    """Rows measured so far."""
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []
    return {(row["model"], row["task"]): row for row in found}


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="models, split at commas")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    own = Path(os.environ.get("PLAIT_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for model in MODELS:
        if arguments.table or (arguments.only and model not in arguments.only.split(",")):
            continue
        for task in arguments.tasks.split(","):
            row = measure(model, task, own)
            print(
                f"{model} {task}: {row['cold_s']:.1f} s, {row['cached_s']:.1f} s, {row['answer']} {row['usd']}",
                flush=True,
            )
            rows = kept() | {(model, task): row}  # read again: another model may have been measured meanwhile
            ordered = [rows[m, t] for m in MODELS for t in TASKS if (m, t) in rows]
            RESULTS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    rows = kept()
    TABLE.write_text(table([rows[m, t] for m in MODELS for t in TASKS if (m, t) in rows]), encoding="utf-8")


if __name__ == "__main__":
    main()

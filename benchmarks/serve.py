"""Ten models on every serving runtime that is installed: do they compute what eager does, and how long do they take?

    python benchmarks/serve.py export [--models llama,bert] [--to onnxruntime]     once; no timing
    python benchmarks/serve.py time   [--models llama,bert] [--to onnxruntime]     on a quiet machine
    python benchmarks/serve.py write                                               results/serve_cpu_DATE.{md,json}

`export` keeps captured models and artefacts under runs/serve; `time` reads them, so that the machine is needed for timing
alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import plait
from plait.serve.child import Request
from plait.serve.isolate import run_child
from plait.serve.registry import backend_at, backends

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "runs" / "serve"
RESULTS = ROOT / "benchmarks" / "results"

MODELS = {
    "gpt": "examples/gpt.py:job",
    "llama": "hf:llama?hidden_size=256&num_hidden_layers=4&num_attention_heads=8&num_key_value_heads=4&"
    "intermediate_size=688&vocab_size=4096&seq_len=64",
    "bert": "hf:bert?hidden_size=256&num_hidden_layers=4&num_attention_heads=4&intermediate_size=1024&vocab_size=4096&"
    "seq_len=64",
    "t5": "hf:t5?d_model=128&d_kv=32&d_ff=512&num_layers=2&num_heads=4&vocab_size=1024&seq_len=32",
    "vit": "hf:vit?hidden_size=192&num_hidden_layers=12&num_attention_heads=3&intermediate_size=768",
    "resnet": "hf:resnet?embedding_size=64&hidden_sizes=64,128,256,512&depths=2,2,2,2&layer_type=basic",
    "unet": "examples/unet.py:job?width=16&depth=3&size=64",
    "dlrm": "examples/dlrm.py:job",
    "mixtral": "hf:mixtral?hidden_size=128&num_hidden_layers=2&num_attention_heads=4&num_key_value_heads=2&"
    "intermediate_size=256&vocab_size=1024&num_local_experts=4&seq_len=32",
    "lstm": "benchmarks/serve.py:lstm",
}
RUNS_HERE = ("torch", "aoti", "compile", "onnxruntime", "openvino", "executorch", "litert", "tvm")
TARGETS = {"llama": 0.75, "bert": 0.75, "resnet": 0.75, "vit": 0.85}
"""Latency of the best runtime over eager's, fp32, at batch 1 and 8."""


class Lstm(nn.Module):
    """A classifier of sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(32, 128, num_layers=2, batch_first=True)
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, length, 32] -> [batch, 10]."""
        return self.head(self.lstm(x)[0][:, -1])  # type: ignore[no-any-return]


def lstm() -> plait.Job:
    """The one of the ten that no example has."""
    generator = torch.Generator().manual_seed(0)
    batch = (torch.randn(8, 32, 32, generator=generator), torch.randint(10, (8,), generator=generator))
    return plait.Job(Lstm, loss=F.cross_entropy, batch=batch, name="lstm")


def export_one(model: str, to: str, precision: str, limit: float) -> None:
    os.chdir(ROOT)
    for word in to.split(",") if to != "all" else list(backends()):
        report = plait.export(
            MODELS[model],
            word,
            output=WORK / model,
            scratch=WORK / model / "scratch",
            precision=precision,
            threads=1,
            seconds=0,
            limit=limit,
            tell=lambda backend, stage: print(f"{model}: {backend} {stage}", file=sys.stderr, flush=True),
        )
        for row in report["rows"]:
            row.pop("trace", None)
            row["folder"] = row["backend"] if row.get("folder") else ""
            name = f"row-{row['backend']}-{row['precision']}.json"
            (WORK / model / name).write_text(json.dumps(row, indent=1))
            print(
                model, row["backend"], row["precision"], row["status"], row.get("error", "")[:300], row.get("where", "")
            )


def time_one(model: str, to: str, precision: str, threads: int, seconds: float) -> None:
    os.chdir(ROOT)
    for file in sorted((WORK / model).glob(f"row-*-{precision}.json")):
        row = json.loads(file.read_text())
        name = row["backend"]
        if row["status"] != "ok" or (to != "all" and name not in to.split(",")):
            continue
        place = backends()[name]
        folder = WORK / model / (name if precision == "fp32" else f"{name}-{precision}")
        request = Request(
            backend=place,
            subject=str(WORK / model / "scratch" / "subject"),
            artefact=str(folder),
            result=str(WORK / model / "time.json"),
            precision=precision,
            batches=(1, 8),
            threads=(threads,),
            seconds=seconds,
            compiled=False,
            task="time",
        )
        found = run_child(request, backend_at(place).interpreter(), limit=400)
        if found["status"] != "ok" or not found.get("latency"):
            print(model, name, found.get("error", "nothing was timed"))
            continue
        row["latency"] = found["latency"]
        file.write_text(json.dumps(row, indent=1))
        for one in found["latency"]:
            mine, eager = one["backend"]["p50_ms"], one["eager"]["p50_ms"]
            print(
                f"{model} {name} {precision} batch {one['batch']}: {mine:.2f} ms, eager {eager:.2f} ms, {one['ratio']:.2f}"
            )


def rows_of(model: str) -> list[dict[str, Any]]:
    found = [file.read_text() for file in sorted((WORK / model).glob("row-*.json"))]
    # Results are kept: without this machine's paths.
    return [json.loads(t.replace(f"{sysconfig.get_path('purelib')}/", "").replace(f"{ROOT}/", "")) for t in found]


def write(date: str) -> None:
    rows = {model: rows_of(model) for model in MODELS}
    names = [
        n
        for n in (*RUNS_HERE, "tensorrt", "coreml")
        if any(r["backend"] == n for found in rows.values() for r in found)
    ]
    lines = [
        f"# Serving runtimes, {date}",
        "",
        (
            f"`python benchmarks/serve.py export`, `time`, `write`; torch {torch.__version__.partition('+')[0]}, "
            f"{platform.machine()}, {os.cpu_count()} cores. Largest relative error against eager (max over max) on moved weights "
            "over all batch sizes and lengths that were tried; `prepared`: checked, but it cannot run here; an empty cell was not measured."
        ),
        "",
        "| model | " + " | ".join(names) + " |",
        "|" + "---|" * (len(names) + 1),
    ]
    causes, held, tried = [], 0, 0
    for model, found in rows.items():
        cells = []
        for name in names:
            row = next((r for r in found if r["backend"] == name and r["precision"] == "fp32"), None)
            cells.append(cell(row))
            if name in RUNS_HERE and row is not None and row["status"] != "missing":
                tried += 1
                held += row["status"] == "ok"
            if row is not None and row["status"] not in ("ok", "prepared"):
                causes.append(cause(model, row))
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"{held} of {tried} cells of the runtimes that run here hold ({100 * held / max(tried, 1):.0f} %).",
        "",
    ]
    lines += [*causes, ""] if causes else []
    lines += ["### Latency against eager", "", *latency_lines(rows)]
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"serve_cpu_{date}"
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    kept = json.dumps({"models": MODELS, "rows": rows}, indent=1).replace(f"{tempfile.gettempdir()}/", "")
    stem.with_suffix(".json").write_text(kept + "\n")
    page = ROOT / "docs" / "serve.md"
    before, _, rest = page.read_text().partition("<!-- matrix -->")
    page.write_text(
        before + "<!-- matrix -->\n" + "\n".join(lines[2:]) + "\n<!-- end -->" + rest.partition("<!-- end -->")[2]
    )
    print("\n".join(lines))


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["status"] != "ok":
        return str(row["status"])
    checks = [*row.get("perturbed", ()), *row.get("parity", ())]
    return f"{max(one['max_rel'] for one in checks):.1e}"


def cause(model: str, row: dict[str, Any]) -> str:
    operator = f"; operator `{row['operator']}`" if row.get("operator") else ""
    where = str(row.get("where", "")).rsplit("/", 1)[-1]
    return f"* {model}, {row['backend']}: {row.get('error', '')[:300]}{operator}{f', at {where}' if where else ''}"


def latency_lines(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [
        (
            "p50 of the runtime over p50 of eager, taken in turn in one process. Under 1 is quicker. Eager is the user's own module; "
            "`(program)`: the exported program's module in the same release of torch, since the runtime's own environment lacks what "
            "the model's code imports. Rows of one thread were taken while other work ran on the other core."
        ),
        "",
        "| model | batch | threads | runtime | precision | p50 ms | eager ms | of eager | cosine | target |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model, found in rows.items():
        timed = [(row, one) for row in found for one in row.get("latency", ())]
        for batch in (1, 8):
            for row, one in sorted((t for t in timed if t[1]["batch"] == batch), key=lambda t: t[1]["ratio"]):
                data = row.get("data") or {}
                target = 0.5 if row["precision"].startswith("int8") else TARGETS.get(model, "")
                lines.append(
                    f"| {model} | {batch} | {one['threads']} | {row['backend']} | {row['precision']} | {one['backend']['p50_ms']:.2f} | "
                    f"{one['eager']['p50_ms']:.2f}{' (program)' if one['baseline'] == 'exported' else ''} | {one['ratio']:.2f} | {data.get('cosine', 1):.4f} | {target} |"
                )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("export", "time", "write"))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--to", default="all")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--limit", type=float, default=400)
    parser.add_argument("--date", default=f"{datetime.datetime.now().astimezone():%Y-%m-%d}")
    asked = parser.parse_args()
    if asked.verb == "write":
        write(asked.date)
        return
    for model in asked.models.split(","):
        if asked.verb == "export":
            export_one(model, asked.to, asked.precision, asked.limit)
        else:
            time_one(model, asked.to, asked.precision, asked.threads, asked.seconds)


if __name__ == "__main__":
    main()

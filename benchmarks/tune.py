"""What tuning gains on four models: the best settings beside the default ones, in turns, as `plait export --tune` confirms them.

    python benchmarks/serve.py export --models llama,bert,vit,resnet --to onnxruntime,openvino,aoti    once; no timing
    python benchmarks/tune.py variants [--models llama]                                                once; no timing
    python benchmarks/tune.py [--models llama] [--to onnxruntime] [--for throughput] [--seconds 80]    on a quiet machine

The default settings are the first artefact (onnxruntime, fp32) with the threads that `plait.serve.load` takes. A line of a table is
printed for each model; records are kept as runs/serve/MODEL/tune-*.json.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from plait.serve.child import Request
from plait.serve.isolate import run_child
from plait.serve.manifest import Manifest
from plait.serve.output_folder import finished_folder
from plait.serve.registry import backend_at, backends
from plait.serve.tuning.record import Configuration
from plait.serve.tuning.tune import tune

WORK = Path(__file__).resolve().parent.parent / "runs" / "serve"
MODELS = "llama,bert,vit,resnet"
ARTEFACTS = "onnxruntime,openvino,aoti,aoti-freezing,aoti-autotune"


def make_variants(model: str) -> None:
    """`aoti` with inductor's other settings, from the captured model of benchmarks/serve.py."""
    place = backends()["aoti"]
    plain = Manifest.read(WORK / model / "aoti")
    for variant in backend_at(place).variants("fp32"):
        with finished_folder(WORK / model / f"aoti-{variant}") as folder:
            request = Request(
                backend=place,
                subject=str(WORK / model / "scratch" / "subject"),
                artefact=str(folder),
                result=str(WORK / model / "variant.json"),
                variant=variant,
                threads=(2,),
                seconds=0,
            )
            values = run_child(request, sys.executable, limit=300)
            worst = max((one["max_rel"] for one in values.get("parity", ())), default=float("nan"))
            print(
                model, variant, values["status"], f"{values.get('export_s', 0):.0f} s", worst, values.get("error", "")
            )
            if values["status"] != "ok":
                return
            replace(plain, facts=values["facts"]).write(folder)


def spelled(one: Configuration) -> str:
    """Such as `openvino, 2 threads, cores 0,1, spinning=False`."""
    words = [Path(one.artefact).name, f"{one.threads} threads", *([f"batch {one.batch}"] if one.batch > 1 else [])]
    words += [f"cores {','.join(map(str, one.cpus))}"] if one.cpus else []
    words += [f"wait {one.wait}"] if one.wait else []
    return ", ".join([*words, *(f"{name}={value}" for name, value in one.knobs.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["variants"])
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--to", default=ARTEFACTS)
    parser.add_argument("--for", dest="goal", default="latency", choices=["latency", "throughput"])
    parser.add_argument("--seconds", type=float, default=80.0)
    arguments = parser.parse_args()
    for model in arguments.models.split(","):
        if arguments.what:
            make_variants(model)
            continue
        folders = [WORK / model / name for name in arguments.to.split(",") if (WORK / model / name).is_dir()]
        record = tune(
            folders,
            seconds=arguments.seconds,
            batch=(1, 8) if arguments.goal == "throughput" else 1,
            goal=arguments.goal,
            output=WORK / model / f"tune-{arguments.goal}-{len(folders)}.json",
            tell=lambda text: print(text, file=sys.stderr, flush=True),
        )
        best, default = record.fastest, record.default
        print(
            f"| {model} | {arguments.goal} | {arguments.to if len(folders) == 1 else len(folders)} | "
            f"{len(record.trials)} | {default['sample_ms']:.2f} | {best['sample_ms']:.2f} | {record.ratio:.2f} | "
            f"{spelled(record.best)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

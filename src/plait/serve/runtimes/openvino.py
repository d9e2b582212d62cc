"""OpenVINO, from the exported program."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from plait.serve.backend import Artefact, Backend, Runner
from plait.serve.runtimes.openvino_weights import WEIGHTS, share_weights
from plait.serve.subject import Subject

if TYPE_CHECKING:
    import torch

__all__ = ["OpenVino"]

_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f32", "int8": "f32", "int8-weight": "f32"}
_GROUPS = {"int8": 32, "int8-weight": 0}
"""Values of an activation that share a scale where weights are int8; 0: activations stay as they are."""


class OpenVino(Backend):
    """`<entry>.xml` and `<entry>.bin`; of several entry points the weights are once, in `weights.bin`."""

    name = "openvino"
    extra = "openvino"
    imports = ("openvino",)
    distributions = ("openvino",)
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "fp16", "int8", "int8-weight")

    def knobs(self) -> Mapping[str, Sequence[Any]]:
        """What changes latency, and results by rounding at most; core types and hyper-threads where the processor has them."""
        found: dict[str, Sequence[Any]] = {
            "hint": ("LATENCY", "THROUGHPUT"),
            "streams": (1, 2),
            "pinning": (True, False),
        }
        if Path("/sys/devices/cpu_atom").exists():
            found["core_type"] = ("ANY_CORE", "PCORE_ONLY", "ECORE_ONLY")
        with suppress(OSError):
            if Path("/sys/devices/system/cpu/smt/active").read_text(encoding="ascii").strip() == "1":
                found["hyper_threading"] = (True, False)
        return found

    def export(self, subject: Subject, folder: Path, precision: str) -> Mapping[str, Any]:
        """One model for each entry point, with its sizes as open as the program's."""
        import openvino

        from plait.serve.decoding.cache_update import scattered
        from plait.serve.runtimes.complex_pairs import in_pairs
        from plait.serve.runtimes.lacking import converted
        from plait.serve.runtimes.openvino_int8 import compress

        for name, entry in subject.entries.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch, about its own use of pytrees
                model = converted(openvino.convert_model, scattered(in_pairs(subject.program(name))))
            if precision.startswith("int8") and not compress(model):
                raise ValueError("it has no matrix multiplication with weights, which is what int8 is for here")
            for port, spec in zip(model.inputs, entry.inputs, strict=True):
                port.get_tensor().set_names({spec.name})
            openvino.save_model(model, folder / f"{name}.xml", compress_to_fp16=precision == "fp16")
        if len(subject.entries) > 1:
            share_weights(folder / f"{name}.xml" for name in subject.entries)
        return {"note": "weights are kept in fp16 and multiplied in fp32"} if precision == "fp16" else {}

    def load(self, artefact: Artefact) -> Runner:
        """A compiled model with one request; without the precision hint this runtime would choose bfloat16 by itself."""
        import openvino
        import torch

        knobs = artefact.knobs or {}
        config = {
            "INFERENCE_PRECISION_HINT": _HINTS[artefact.precision],
            "INFERENCE_NUM_THREADS": artefact.threads,
            "PERFORMANCE_HINT": str(knobs.get("hint", "LATENCY")),
            "ENABLE_CPU_PINNING": bool(knobs.get("pinning", True)),
        }
        if artefact.precision in _GROUPS:
            config["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = _GROUPS[artefact.precision]
        if "core_type" in knobs:
            config["SCHEDULING_CORE_TYPE"] = str(knobs["core_type"])
        if "hyper_threading" in knobs:
            config["ENABLE_HYPER_THREADING"] = bool(knobs["hyper_threading"])
        if "streams" in knobs:
            config["NUM_STREAMS"] = int(knobs["streams"])
        core = openvino.Core()
        path, shared = artefact.folder / f"{artefact.entry.name}.xml", artefact.folder / WEIGHTS
        read = core.read_model(path, shared) if shared.is_file() else core.read_model(path)
        compiled = core.compile_model(read, "CPU", config)
        request = compiled.create_infer_request()
        wanted = [getattr(torch, spec.dtype) for spec in artefact.entry.outputs]
        places = range(len(compiled.outputs))

        def run(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            results = request.infer([t.detach().numpy() for t in inputs], share_inputs=True)
            # Copied: the request writes its next outputs into the same memory.
            return [torch.from_numpy(results[i].copy()).to(d) for i, d in zip(places, wanted, strict=True)]

        return run

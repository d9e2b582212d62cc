"""ExecuTorch with XNNPACK, the successor of PyTorch Mobile."""

from __future__ import annotations

import os
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from plait.serve.backend import Artefact, Backend, Runner
from plait.serve.runtimes.casting import cast, in_precision, open_dims
from plait.serve.subject import Subject

if TYPE_CHECKING:
    import torch

__all__ = ["ExecuTorch"]


class ExecuTorch(Backend):
    """`<entry>.pte`."""

    name = "executorch"
    extra = "executorch"
    imports = ("executorch",)
    distributions = ("executorch", "torchao")
    # Not bf16: XNNPACK has no kernels for it, and the portable ones took 15 to 130 times as long as eager in fp32.
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "int8")

    def export(self, subject: Subject, folder: Path, precision: str) -> Mapping[str, Any]:
        """One program for each entry point; how much of it XNNPACK runs is said in the note."""
        with _quiet():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

        from plait.serve.runtimes.complex_pairs import in_pairs
        from plait.serve.runtimes.lacking import VOLUMES, converted
        from plait.serve.runtimes.spelled import SORTING, spelled

        shares = []
        for name in subject.entries:
            program = spelled(in_pairs(subject.program(name)), {**SORTING, **VOLUMES})
            program = _quantised(program, subject, name) if precision == "int8" else cast(program, precision)

            def convert(
                program: torch.export.ExportedProgram, partitioner: Sequence[Any] = (XnnpackPartitioner(),)
            ) -> tuple[Any, Any]:
                # Its check of operators' types takes the length of a tensor, which closes the batch dimension for good.
                config = EdgeCompileConfig(_check_ir_validity=False)
                edge = to_edge_transform_and_lower(program, partitioner=list(partitioner), compile_config=config)
                lowered = edge.to_executorch()
                _refuse_lacking(lowered)
                return edge, lowered

            with _quiet():
                try:
                    edge, lowered = converted(convert, program)
                    shares.append(_share(edge))
                except Exception as problem:
                    if precision == "int8" or not _is_of_xnnpack(problem):
                        raise
                    # Its passes do not know every graph (a branch of torch.cond): then all of it runs by portable kernels.
                    edge, lowered = converted(partial(convert, partitioner=()), program)
                    shares.append(f"{_share(edge)}; XNNPACK refused it: {str(problem).splitlines()[0][:120]}")
                (folder / f"{name}.pte").write_bytes(lowered.buffer)
        return {"note": "; ".join(shares)}

    def load(self, artefact: Artefact) -> Runner:
        """A method of the program. Its pool of threads is one for the whole process."""
        with _quiet():
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime, Verification

            portable_lib._unsafe_reset_threadpool(artefact.threads)
            path = artefact.folder / f"{artefact.entry.name}.pte"
            program = Runtime.get().load_program(path, verification=Verification.InternalConsistency)
            method = program.load_method("forward")
        if method is None:
            raise ValueError(f"{path}: it has no method `forward`")

        def run(*inputs: torch.Tensor) -> Sequence[torch.Tensor]:
            # Cloned: the method writes its next outputs into the same memory. The program is kept alive with the method.
            try:
                return [value.clone() for value in method.execute(list(inputs))] if program else []
            except RuntimeError:
                with _quiet():  # once more, for what it writes: the error itself is a number
                    method.execute(list(inputs))
                raise

        return in_precision(run, artefact.entry, artefact.precision)


def _is_of_xnnpack(problem: BaseException | None) -> bool:
    """Whether XNNPACK's own code raised it, or is named by it."""
    while problem is not None:
        if "xnnpack" in str(problem).lower() or any(
            "/xnnpack/" in frame.filename for frame in traceback.extract_tb(problem.__traceback__)
        ):
            return True
        problem = problem.__cause__ or problem.__context__
    return False


def _refuse_lacking(lowered: Any) -> None:
    """Name the operators that the runtime has no kernel for: when it loads the program it gives a number alone."""
    from executorch.runtime import Runtime

    known = Runtime.get().operator_registry.operator_names
    plans = lowered.executorch_program.execution_plan
    wanted = [f"{o.name}.{o.overload}" if o.overload else o.name for plan in plans for o in plan.operators]
    lacking = sorted(set(wanted) - set(known))
    if lacking:
        raise RuntimeError(f"no kernel for {', '.join(lacking)}")


def _share(edge: Any) -> str:
    """How the graph was split between XNNPACK and the portable kernels."""
    nodes = list(edge.exported_program().graph.nodes)
    delegates = sum("executorch_call_delegate" in str(node.target) for node in nodes)
    skipped = ("getitem", "executorch_call_delegate")
    portable = [
        str(n.target) for n in nodes if n.op == "call_function" and not any(s in str(n.target) for s in skipped)
    ]
    return f"{delegates} parts run by XNNPACK, {len(portable)} operators by portable kernels"


def _quantised(program: Any, subject: Subject, name: str) -> Any:
    """Weights of linear layers as int8 for each row, their inputs quantised as they come."""
    import torch
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    # Of linear layers alone: for the whole graph it would also turn the indices of lookups into floats.
    quantizer = XNNPACKQuantizer().set_operator_type(torch.ops.aten.linear.default, config)
    prepared = prepare_pt2e(program.module(check_guards=False), quantizer)
    with torch.no_grad():
        for sample in subject.entries[name].samples:
            prepared(*subject.inputs(sample, name))
        converted = convert_pt2e(prepared)
        return torch.export.export(
            converted, program.example_inputs[0], dynamic_shapes=open_dims(program), strict=False
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """What the C++ side writes to stderr (of processors that it is not on) is kept, and shown with an error alone."""
    saved = os.dup(2)
    with tempfile.TemporaryFile() as sink:
        try:
            os.dup2(sink.fileno(), 2)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except RuntimeError as problem:
            sink.seek(0)
            written = sink.read().decode(errors="replace").splitlines()
            telling = [
                line
                for line in written
                if "cpuinfo" not in line and any(word in line for word in ("issing", "rror", "ail"))
            ]
            raise RuntimeError("; ".join([str(problem), *(telling or written)[-8:]])) from problem
        finally:
            os.dup2(saved, 2)
            os.close(saved)

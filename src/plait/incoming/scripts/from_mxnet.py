"""Run in the environment `mxnet`: a symbol and its params to ONNX. REQUEST.json REPLY.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

__all__: list[str] = []

_WRITES = 13
"""The opset whose operators MXNet 1.9.1's exporter writes; it stamps that of the onnx package beside it instead."""


def _convert(request: dict[str, Any]) -> dict[str, Any]:
    import mxnet
    import numpy as np
    import onnx

    shapes = [tuple(shape) for shape in request["shapes"]]
    mxnet.onnx.export_model(
        request["symbol"],
        request["params"],
        shapes,
        [np.dtype(name).type for name in request["dtypes"]],
        request["output"],
        dynamic=bool(request["dynamic"]),
        dynamic_input_shapes=[("batch", *shape[1:]) for shape in shapes] if request["dynamic"] else None,
    )
    model = onnx.load(request["output"])
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = _WRITES
    onnx.save(model, request["output"])
    initial = {tensor.name for tensor in model.graph.initializer}
    return {
        "inputs": [value.name for value in model.graph.input if value.name not in initial],
        "outputs": [value.name for value in model.graph.output],
        "versions": {"mxnet": mxnet.__version__, "onnx": onnx.__version__},
    }


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        reply = _convert(asked)
    except Exception as problem:  # whatever MXNet raises, told in one line to who asked
        lines = [line for line in str(problem).splitlines() if line.strip()]
        reply = {"error": f"{type(problem).__name__}: {lines[0][:500] if lines else ''}"}
    Path(sys.argv[2]).write_text(json.dumps(reply), encoding="utf-8")

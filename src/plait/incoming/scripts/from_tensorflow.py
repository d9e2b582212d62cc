"""Run in the environment `tensorflow`: a SavedModel, .keras, .h5, .tflite or frozen .pb file to ONNX. REQUEST.json REPLY.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

__all__: list[str] = []


def _saved_model(path: Path, signature: str) -> tuple[Any, list[Any]]:
    """(function of positional tensors, their specs) of one of a SavedModel's signatures."""
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    if signature not in loaded.signatures:
        known = ", ".join(loaded.signatures) or "none"
        raise ValueError(f"the SavedModel has no signature {signature!r}; it has {known}")
    function = loaded.signatures[signature]
    named = function.structured_input_signature[1]
    names = sorted(named)

    def call(*tensors: Any) -> Any:
        return function(**dict(zip(names, tensors, strict=True)))

    call.keep = loaded  # type: ignore[attr-defined]  # its variables live as long as it does
    return call, [tf.TensorSpec(named[name].shape, named[name].dtype, name=name) for name in names]


def _keras_file(path: Path) -> tuple[Any, list[Any]]:
    import keras
    import tensorflow as tf

    model = keras.saving.load_model(path, compile=False)
    specs = [tf.TensorSpec(x.shape, x.dtype, name=x.name) for x in model.inputs]

    def call(*tensors: Any) -> Any:
        return model(tensors[0] if len(tensors) == 1 else list(tensors), training=False)

    return call, specs


def _frozen(path: Path, request: dict[str, Any]) -> Any:
    """A graph of TensorFlow 1 whose variables are constants: from its placeholders to what nothing uses."""
    import tensorflow as tf
    import tf2onnx

    graph = tf.compat.v1.GraphDef()
    graph.ParseFromString(path.read_bytes())
    used = {name.split(":")[0].lstrip("^") for node in graph.node for name in node.input}
    inputs = [f"{node.name}:0" for node in graph.node if node.op == "Placeholder"]
    last = [node for node in graph.node if node.name not in used and node.op not in ("Placeholder", "Const", "NoOp")]
    outputs = [f"{node.name}:0" for node in last]
    if not inputs or not outputs:
        raise ValueError("the graph has no placeholder, or nothing that comes out of it")
    model, _ = tf2onnx.convert.from_graph_def(
        graph, input_names=inputs, output_names=outputs, opset=request["opset"], output_path=request["output"]
    )
    return model


def _convert(request: dict[str, Any]) -> dict[str, Any]:
    import tensorflow as tf
    import tf2onnx

    path = Path(request["path"])
    if path.suffix in (".pb", ".tflite"):
        if path.suffix == ".pb":
            model = _frozen(path, request)
        else:
            model, _ = tf2onnx.convert.from_tflite(str(path), opset=request["opset"], output_path=request["output"])
        return _reply(model)
    call, specs = _saved_model(path, request["signature"]) if path.is_dir() else _keras_file(path)
    model, _ = tf2onnx.convert.from_function(
        tf.function(call, input_signature=specs),
        input_signature=specs,
        opset=request["opset"],
        output_path=request["output"],
    )
    return _reply(model)


def _reply(model: Any) -> dict[str, Any]:
    import tensorflow as tf
    import tf2onnx

    return {
        "inputs": [value.name for value in model.graph.input],
        "outputs": [value.name for value in model.graph.output],
        "versions": {"tensorflow": tf.__version__, "tf2onnx": tf2onnx.__version__},
    }


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        reply = _convert(asked)
    except Exception as problem:  # whatever TensorFlow and tf2onnx raise, told in one line to who asked
        lines = [line for line in str(problem).splitlines() if line.strip()]
        reply = {"error": f"{type(problem).__name__}: {lines[0][:500] if lines else ''}"}
    Path(sys.argv[2]).write_text(json.dumps(reply), encoding="utf-8")

"""`python -m plait.incoming tensorflow|mxnet ...`: a model of another framework to an ONNX file."""

from __future__ import annotations

import argparse
import json
import sys

from plait.errors import PlaitError
from plait.incoming.convert import from_mxnet, from_tensorflow

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Exit status."""
    asked = _parser().parse_args(arguments)
    try:
        if asked.framework == "tensorflow":
            reply = from_tensorflow(asked.model, asked.output, signature=asked.signature, opset=asked.opset)
        else:
            shapes = [[int(size) for size in shape.split(",")] for shape in asked.shape]
            reply = from_mxnet(asked.symbol, asked.params, asked.output, shapes=shapes, dynamic=asked.dynamic)
    except PlaitError as problem:
        sys.stderr.write(f"error: {problem}\n")
        return problem.exit_status
    except ValueError:
        sys.stderr.write("error: --shape takes whole numbers with commas between, such as 4,3,32,32\n")
        return 2
    if asked.json:
        sys.stdout.write(json.dumps(reply) + "\n")
    else:
        sys.stdout.write(f"{asked.output}: {', '.join(reply['inputs'])} -> {', '.join(reply['outputs'])}\n")
        sys.stderr.write(f"next: plait verify onnx:{asked.output} --devices 2 --plan dp=2\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m plait.incoming", description=__doc__)
    frameworks = parser.add_subparsers(dest="framework", required=True, metavar="tensorflow|mxnet")
    tensorflow = frameworks.add_parser(
        "tensorflow", help="a SavedModel folder, or a .keras, .h5, .tflite or frozen .pb file"
    )
    tensorflow.add_argument("model")
    tensorflow.add_argument("--signature", default="serving_default", help="of a SavedModel")
    tensorflow.add_argument("--opset", type=int, default=17)
    mxnet = frameworks.add_parser("mxnet", help="a symbol file and a params file")
    mxnet.add_argument("symbol")
    mxnet.add_argument("params")
    mxnet.add_argument(
        "--shape", action="append", required=True, help="of an input, batch first: 4,3,32,32; once for each"
    )
    mxnet.add_argument("--dynamic", action="store_true", help="leave the batch open")
    for one in (tensorflow, mxnet):
        one.add_argument("-o", "--output", required=True, help="the ONNX file to write")
        one.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


if __name__ == "__main__":
    sys.exit(main())

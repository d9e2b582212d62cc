"""A LiteRT file with smaller weights, by LiteRT's own quantiser (ai-edge-quantizer), which works on the finished file.

int8          weights as int8 by channel, inputs of the same operators quantised as they come
int8-weight   weights as int8 by channel, computed in fp32
fp16          weights as fp16, computed in fp32
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["PRECISIONS", "shrink"]


def shrink(file: Path, precision: str) -> None:
    """Replace the file by one whose weights are of `precision`; fp32 leaves it as it is.

    Raises:
        ValueError: no operator in it has weights that can be made smaller.
    """
    if precision == "fp32":
        return
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer.quantizer import Quantizer

    result = Quantizer(str(file), _RECIPES[precision]()).quantize()
    aside = file.with_suffix(".small")
    result.export_model(str(aside))
    kept = "float16" if precision == "fp16" else "int8"
    types = {tensor["dtype"].__name__ for tensor in Interpreter(model_path=str(aside)).get_tensor_details()}
    if kept not in types:
        raise ValueError(f"no operator of {file.stem} has weights that LiteRT's quantiser makes smaller")
    aside.replace(file)


def _dynamic() -> Any:
    from ai_edge_quantizer.recipe import dynamic_wi8_afp32

    return dynamic_wi8_afp32()


def _weight_only() -> Any:
    from ai_edge_quantizer.recipe import weight_only_wi8_afp32

    return weight_only_wi8_afp32()


def _half() -> Any:
    from ai_edge_quantizer.algorithm_manager import AlgorithmName
    from ai_edge_quantizer.qtyping import TFLOperationName
    from ai_edge_quantizer.recipe_manager import RecipeManager

    recipe = RecipeManager()
    recipe.add_weight_only_config(
        regex=".*",
        operation_name=TFLOperationName.ALL_SUPPORTED,
        num_bits=16,
        algorithm_key=AlgorithmName.FLOAT_CASTING,
    )
    return recipe.get_quantization_recipe()


_RECIPES: dict[str, Callable[[], Any]] = {"int8": _dynamic, "int8-weight": _weight_only, "fp16": _half}
PRECISIONS = ("fp32", *_RECIPES)

"""An encoder's ONNX graph with int8 weights and activations, by static quantisation: ranges are those of calibration images.

Weights have 7 of the 8 bits, with a scale for each output channel: CPUs without VNNI add pairs of products in 16 bits, which
8 bits would overflow, so that the graph computes the same on every CPU.

# n images, S pixels a side
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clae_dist.deploy.onnx_graph import INPUT, Graph
from clae_dist.errors import ConfigError

METHOD = "static QDQ, int8 weights by channel (7 bits), uint8 activations, ranges by minimum and maximum"
_OPERATIONS = ("Conv", "Gemm", "MatMul", "Add", "MaxPool", "AveragePool", "GlobalAveragePool")
_BATCH = 16


class _Calibration:
    """The batches of calibration images, as onnxruntime asks for them."""

    def __init__(self, images_n3SS: torch.Tensor) -> None:
        self._batches = iter(images_n3SS.split(_BATCH))

    def get_next(self) -> dict[str, np.ndarray] | None:
        some = next(self._batches, None)
        return None if some is None else {INPUT: (some.float() / 255).numpy()}


def quantise(graph: Path, to: Path, images_n3SS: torch.Tensor, *, per_channel: bool = True) -> None:
    """Write the int8 form of the graph, with its metadata, to `to`; the ranges of activations are those of uint8 images.

    Raises ConfigError for a graph that onnxruntime cannot quantise.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    facts = dict(Graph(graph).facts)
    logger = logging.getLogger()  # onnxruntime's tools log to the root
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(action="ignore"):
            folded = Path(scratch, "folded.onnx")  # batch norms and constants
            quant_pre_process(str(graph), str(folded), skip_symbolic_shape=True)
            quantize_static(
                str(folded),
                str(to),
                _Calibration(images_n3SS),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=_operations(folded),
                per_channel=per_channel,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
            )
    except Exception as error:  # of onnxruntime's tools: ValueError, RuntimeError, its own kinds, …
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"onnxruntime cannot quantise this graph ({reason}); omit onnx-int8 from --format.") from None
    finally:
        logger.setLevel(level)
    model: Any = onnx.load_model(to)
    onnx.helper.set_model_props(model, facts)
    onnx.save_model(model, to)


def _operations(graph: Path) -> list[str]:
    """The kinds of nodes that get int8.

    In graphs with layer norms additions stay in float: sums along a transformer's residual stream can have a few large
    channels, which would decide the step of all (bench/RECORD.md has what that costs).
    """
    import onnx

    kinds = {node.op_type for node in onnx.load_model(graph).graph.node}
    return [kind for kind in _OPERATIONS if kind != "Add" or "LayerNormalization" not in kinds]

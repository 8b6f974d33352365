"""An encoder as an ONNX graph: pixels in [0, 1] in, features out, for any number of images, with the normalisation inside.

# n images, S pixels a side, F width of the features
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from clae_dist.deploy.encoder import Encoder
from clae_dist.errors import ConfigError

INPUT, OUTPUT = "images", "features"
TOLERANCE = 1e-4  # of the largest feature, or of 1 where all are smaller
CHECKED_IMAGES = 64
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_INSTALL = "pip install 'onnx>=1.18' 'onnxscript>=0.5' 'onnxruntime>=1.22'"
_OPSET = 18  # which torch's exporter writes without conversion
_WEIGHTS = "clae-dist weights"  # in the metadata of a graph
_MAX_BYTES = 2**31 - 1  # of a graph in one file
_BATCH = 64


def require_onnx() -> None:
    """Raises ConfigError unless the packages that write and run graphs are installed."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"ONNX needs {', '.join(missing)}, not installed here; {_INSTALL}, or use --format safetensors,timm.")


def write_graph(encoder: Encoder, path: Path, facts: Mapping[str, str]) -> None:
    """Write the encoder with its normalisation as one file, with `facts` and the digest of the weights in its metadata.

    Raises ConfigError for an encoder that torch's exporter cannot trace, or whose graph is too large for one file.
    """
    import onnx

    weight_bytes = sum(value.numel() * value.element_size() for value in encoder.state_dict().values())
    if weight_bytes > _MAX_BYTES:
        raise ConfigError(f"the encoder has {weight_bytes / 1e9:.1f} GB, and an ONNX file at most 2; omit onnx from --format.")
    images = torch.zeros(2, 3, encoder.image_size, encoder.image_size)
    try:
        with _quiet():
            program = torch.onnx.export(
                encoder,
                (images,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("n")},),
                opset_version=_OPSET,
                external_data=False,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # the exporter has errors of its own for each kind of operation
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise ConfigError(f"torch cannot export this encoder to ONNX ({reason}); omit onnx from --format.") from None
    assert program is not None
    model = program.model_proto
    _forget_sources(model)
    onnx.helper.set_model_props(model, dict(sorted({**facts, _WEIGHTS: encoder.weights_digest()}.items())))
    onnx.save_model(model, path)


def _forget_sources(model: Any) -> None:
    """Remove the exporter's notes on nodes, which are lines of this machine's files."""
    graph = model.graph
    for part in (
        model,
        graph,
        *graph.node,
        *graph.input,
        *graph.output,
        *graph.value_info,
        *graph.initializer,
        *model.functions,
    ):
        del part.metadata_props[:]
    for function in model.functions:
        for node in function.node:
            del node.metadata_props[:]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings and progress of the exporter: its result is checked, and errors are raised."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


class Graph:
    """A graph in onnxruntime, on the CPU. `weights` is the digest of the encoder that it was made of."""

    def __init__(self, path: Path, threads: int = 0) -> None:
        """`threads`: of an operation; 0: one a core. Raises ConfigError for a file that is no graph of an encoder."""
        require_onnx()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3  # errors
        try:
            self._session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # of onnxruntime's own kinds, which are not public
            raise _unusable(path, " ".join(str(error).split())[:200]) from None
        names = [one.name for one in (*self._session.get_inputs(), *self._session.get_outputs())]
        self.facts: Mapping[str, str] = self._session.get_modelmeta().custom_metadata_map
        self.weights = self.facts.get(_WEIGHTS, "")
        if names != [INPUT, OUTPUT] or not self.weights:
            raise _unusable(path, "it is not a graph that `clae export` wrote")

    def features(self, images_n3SS: torch.Tensor) -> torch.Tensor:
        """Features (n, F) of RGB images (n, 3, S, S): uint8, or float32 in [0, 1]."""
        parts = []
        for some in images_n3SS.split(_BATCH):
            pixels = some.float() / 255 if some.dtype == torch.uint8 else some
            parts.append(torch.from_numpy(self._session.run([OUTPUT], {INPUT: pixels.contiguous().numpy()})[0]))
        return torch.cat(parts)


def _unusable(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"{path} cannot be used ({reason}); export it again with `clae export RUN --format onnx`.")


def difference(graph: Graph, encoder: Encoder, images_n3SS: torch.Tensor) -> float:
    """The largest difference of the graph's features of uint8 images from the encoder's, as a share of the largest feature,
    or of 1 where all are smaller."""
    with torch.no_grad():
        expected = torch.cat([encoder(some.float() / 255) for some in images_n3SS.split(_BATCH)])
    return float((graph.features(images_n3SS) - expected).abs().max() / expected.abs().max().clamp(min=1.0))


def check_graph(path: Path, encoder: Encoder, images_n3SS: torch.Tensor) -> float:
    """`difference` of a file. Raises ConfigError if it is of another encoder or its features are not the encoder's."""
    graph = Graph(path)
    check_weights(path, graph, encoder)
    distance = difference(graph, encoder, images_n3SS)
    if not distance <= TOLERANCE:
        raise ConfigError(
            f"features of {path.name} differ from torch's by {distance:.1e}, more than {TOLERANCE:g}; omit onnx from --format."
        )
    return distance


def check_weights(path: Path, graph: Graph, encoder: Encoder) -> None:
    """Raise ConfigError for a graph of another encoder."""
    expected = encoder.weights_digest()
    if graph.weights != expected:
        raise _unusable(path, f"it is of another encoder, whose weights are {graph.weights[:12]}, not {expected[:12]}")

"""Names of the files of an export, and its contents."""

from __future__ import annotations

from dataclasses import dataclass

from clae_dist.errors import ConfigError

FORMAT = "clae-dist encoder 1"
WEIGHTS, CONFIG, README = "encoder.safetensors", "config.json", "README.md"
TIMM_WEIGHTS = "model.safetensors"
GRAPH, INT8_GRAPH, INT8_REPORT = "encoder.onnx", "encoder-int8.onnx", "onnx-int8.json"
HEAD = "head.safetensors"
FILES = frozenset({WEIGHTS, CONFIG, README, TIMM_WEIGHTS, GRAPH, INT8_GRAPH, INT8_REPORT, HEAD})

FORMATS = ("safetensors", "timm", "onnx", "onnx-int8")
_MOST_CALIBRATION = 4096


@dataclass(frozen=True)
class Contents:
    """The parts of an export beside encoder.safetensors: formats, calibration images of int8, and a linear classifier."""

    formats: frozenset[str] = frozenset({"safetensors", "timm"})
    calibration: int = 256
    head: bool = False

    @staticmethod
    def parse(formats: str, calibration: int = 256, head: bool = False) -> Contents:
        """`formats` is a list with commas. Raises ConfigError for an unknown format and for too many or no images."""
        names = {name.strip() for name in formats.split(",")}
        strange = sorted(names - set(FORMATS))
        if strange:
            raise ConfigError(f"--format has {strange[0]!r}; use some of {','.join(FORMATS)}.")
        if not 1 <= calibration <= _MOST_CALIBRATION:
            raise ConfigError(f"--calibration is {calibration}; use 1 to {_MOST_CALIBRATION} images, such as 256.")
        also = {"safetensors"} | ({"onnx"} if "onnx-int8" in names else set())  # the others are checked against these
        return Contents(frozenset(names | also), calibration, head)

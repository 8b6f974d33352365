"""Names of the files of an export, and of its formats."""

from __future__ import annotations

from clae_dist.errors import ConfigError

FORMAT = "clae-dist encoder 1"
WEIGHTS, CONFIG, README = "encoder.safetensors", "config.json", "README.md"
TIMM_WEIGHTS = "model.safetensors"
GRAPH = "encoder.onnx"
FILES = frozenset({WEIGHTS, CONFIG, README, TIMM_WEIGHTS, GRAPH})

FORMATS = ("safetensors", "timm", "onnx")
DEFAULT_FORMATS = frozenset({"safetensors", "timm"})


def parse_formats(text: str) -> frozenset[str]:
    """The formats of a list with commas. Raises ConfigError for an unknown one, and without safetensors."""
    names = [name.strip() for name in text.split(",")]
    strange = next((name for name in names if name not in FORMATS), None)
    if strange is not None:
        raise ConfigError(f"--format has {strange!r}; use some of {','.join(FORMATS)}.")
    return frozenset(names) | {"safetensors"}  # the other formats are checked against it

"""An export as a model of MLflow: signature, example, and the code that `mlflow models serve` runs. Nothing is pickled."""

from __future__ import annotations

import base64
import io
import json
import platform
from pathlib import Path
from typing import Any

from clae_dist.reading import ReadError, is_count, is_list_of, read_object

EXAMPLE, CODE = "input_example.json", "serve.py"
_CODE = '''"""The encoder in this folder as a model of MLflow. It takes the package clae_dist and its extra mlflow.

    mlflow models serve --model-uri THIS_FOLDER --env-manager local --port 5001

A request has images in base64, {"dataframe_split": {"columns": ["image"], "data": [["…"], …]}}, or paths in a column `path`,
below the folder that the environment variable CLAE_SERVE_IMAGES names. Each answer has `embedding`, and with head.safetensors
`class` and `probability`.
"""

import os
from pathlib import Path

from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from clae_dist.deploy.serving import Service
from clae_dist.errors import ClaeError


class ImageEncoder(PythonModel):
    def __init__(self):
        self._service = Service(Path(__file__).parent, os.environ.get("CLAE_SERVE_IMAGES", ""))

    def predict(self, context, model_input, params=None):
        try:
            return self._service.answer(model_input.to_dict("records"))
        except ClaeError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None


set_model(ImageEncoder())
'''


def write_model(export_folder: Path, folder: Path, **identity: Any) -> None:
    """Write what MLflow needs beside the files of an export into `folder`: MLmodel, the code, and an example (a grey image).

    `identity` are fields of MLflow's Model. An export without a readable description gets an MLmodel that cannot be served.
    """
    from mlflow.models import Model

    described = _described(export_folder, folder)
    model = Model(**identity, **described)
    if described:
        (folder / CODE).write_text(_CODE)
        # As mlflow.pyfunc.add_to_model writes it, whose module takes seconds to import.
        loader = {"loader_module": "mlflow.pyfunc.loaders.code_model", "model_code_path": CODE}
        model.add_flavor("python_function", **loader, python_version=platform.python_version())
    model.save(str(folder / "MLmodel"))


def _described(export_folder: Path, folder: Path) -> dict[str, Any]:
    """The signature and the example, which is written into `folder`; {} for an export without a readable description."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, Schema

    try:
        description = read_object(export_folder / "config.json")
    except ReadError:
        return {}
    size: Any = description.get("input_size")
    if not (is_list_of(is_count)(size) and len(size) == 3):
        return {}
    inputs = [ColSpec(DataType.binary, "image", required=False), ColSpec(DataType.string, "path", required=False)]
    outputs = [ColSpec(Array(DataType.double), "embedding")]
    if (export_folder / "head.safetensors").exists():
        outputs += [ColSpec(DataType.string, "class"), ColSpec(DataType.double, "probability")]
    example = {"columns": ["image"], "data": [[base64.b64encode(_grey_png(size[1], size[2])).decode()]]}
    (folder / EXAMPLE).write_text(json.dumps(example))
    return {
        "signature": ModelSignature(inputs=Schema(inputs), outputs=Schema(outputs)),
        "saved_input_example_info": {"artifact_path": EXAMPLE, "type": "dataframe", "pandas_orient": "split"},
    }


def _grey_png(height: int, width: int) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (width, height), (128, 128, 128)).save(stream, "PNG")
    return stream.getvalue()

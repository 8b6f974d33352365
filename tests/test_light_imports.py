"""A misspelt key, help texts and `clae config` answer without importing anything slow.

Counted in modules, as seconds depend on the machine.
"""

from __future__ import annotations

import json
import sys

import pytest

from tests import processes

SLOW = (
    "torch numpy scipy sklearn PIL matplotlib torchvision timm webdataset fsspec rich jinja2 shtab safetensors ray mlflow "
    "deepspeed asyncio multiprocessing ssl http.client"
).split()
PROGRAM = """
import json, sys
from clae_dist.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as ended:
    code = ended.code
print(json.dumps([code, list(sys.modules)]))
"""


def modules_of(*words: str) -> tuple[int, set[str], str]:
    """Exit code, imported modules and stderr of `clae WORDS`."""
    done = processes.run(sys.executable, "-c", PROGRAM, *words, check=True)
    code, modules = json.loads(done.stdout.splitlines()[-1])
    return code, set(modules), done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train configs/quickstart.yaml batch.global_sizze=1", 2),
        ("train configs/quickstart.yaml batch.global_size=0", 2),
        ("train no-such-recipe", 2),
        ("train --help", 0),
        ("train --no-such-option", 2),
        ("--help", 0),
        ("config configs/cifar10/clae.yaml", 0),
    ],
)
def test_an_answer_about_words_imports_nothing_slow(words: str, expected: int) -> None:
    code, modules, error = modules_of(*words.split())
    assert code == expected, error
    assert not modules & set(SLOW)
    assert len(modules) < 250, "too many modules for half a second"


def test_the_right_key_is_proposed() -> None:
    _, _, error = modules_of("train", "configs/quickstart.yaml", "batch.global_sizze=1")
    assert "batch.global_sizze (command line) is not a known key; did you mean batch.global_size?" in error

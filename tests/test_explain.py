"""`clae config --explain`, the table in configs/README.md and tab completion: one source, three forms.

After a change of a setting: python tests/test_explain.py writes the table anew.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from clae_dist.cli import main
from clae_dist.config import Config
from clae_dist.explain import explanations, markdown_table
from clae_dist.keys import flatten
from clae_dist.recipe import parse_overrides
from tests import processes

README = Path(__file__).parents[1] / "configs" / "README.md"
TABLE = re.compile(r"(?<=<!-- settings: clae config --explain --markdown -->\n\n)(.*?)(?=\n<!-- end -->)", re.DOTALL)
COMPLETE = """
source {script}
COMP_WORDS=("${{@}}")
COMP_CWORD=$(( $# - 1 ))
_clae_complete clae "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD-1]}}" 2> /dev/null
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def test_one_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--explain", "parallel.zero_stage"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == "parallel.zero_stage"
    for line in ("values: integer, 0 to 3", "default: 1", "used by: parallel.backend=deepspeed", "run resumes: yes"):
        assert line in printed


def test_a_section_and_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--explain", "optim"]) == 0
    section = capsys.readouterr().out
    assert "optim.name\n" in section
    assert "values: adamw, sgd, lars" in section
    assert "train.epochs" not in section
    assert main(["config", "--explain"]) == 0
    everything = capsys.readouterr().out
    assert all(f"{key}\n" in everything for key in flatten(Config()))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--explain", "optim.nam"], "optim.nam is not a known key; did you mean optim.name?"),
        (["--explain", "zzz"], "zzz is not a known key; `clae config --explain`"),
        (["quickstart", "--explain", "seed"], "omit CONFIG"),
        (["--explain", "seed", "--markdown"], "write --explain --markdown"),
        ([], "CONFIG is missing"),
    ],
)
def test_requests_that_cannot_be_answered(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", *words]) == 2
    assert message in capsys.readouterr().err


def test_every_default_and_choice_can_be_written_as_it_is_shown() -> None:
    """A default that is shown in a form that is not accepted misleads."""
    for key, one in explanations().items():
        if one.default not in ("''", "{}", "[]"):
            parse_overrides([f"{key}={one.default}"])


def test_the_table_in_the_readme_is_current() -> None:
    table = TABLE.search(README.read_text())
    assert table is not None
    assert table[0] == markdown_table(), "run: python tests/test_explain.py"


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """Words of a command line, the last one unfinished → what a real bash proposes."""
    bash = shutil.which("bash")
    assert bash, "the tests of completion need bash"
    folder = tmp_path_factory.mktemp("completion")
    (folder / "mine.yaml").write_text("")
    (folder / "notes.txt").write_text("")
    (folder / "runs").mkdir()
    script = folder / "clae.bash"
    with pytest.MonkeyPatch.context() as patch, script.open("w") as file:
        patch.setattr("sys.stdout", file)
        assert main(["completion", "bash"]) == 0

    def run(*words: str) -> set[str]:
        done = processes.run(bash, "--norc", "-c", COMPLETE.format(script=script), "bash", *words, cwd=folder, check=True)
        return {word for word in done.stdout.splitlines() if word}

    return run


@pytest.mark.parametrize(
    ("words", "proposed"),
    [
        ("clae tra", {"train"}),
        ("clae train --qu", {"--quiet"}),
        ("clae train --launcher r", {"ray"}),
        ("clae train cifar10/si", {"cifar10/simclr"}),
        ("clae train mi", {"mine.yaml"}),
        ("clae train quickstart optim.le", {"optim.learning_rate="}),
        ("clae train quickstart optim.name = ", {"adamw", "sgd", "lars"}),
        ("clae train quickstart optim.name =", {"adamw", "sgd", "lars"}),
        ("clae train quickstart optim.name = la", {"lars"}),
        ("clae train quickstart optim.name=la", {"optim.name=lars"}),  # where "=" does not split words
        ("clae train quickstart method.name = si", {"simclr"}),
        ("clae train quickstart objective.name = nt", {"nt_xent"}),
        ("clae train quickstart seed = 1 train.compile = f", {"false"}),
        ("clae train quickstart run_dir = ru", {"runs"}),
        ("clae doctor quickstart launch.dev", {"launch.device="}),
        ("clae config --explain optim.n", {"optim.name"}),
        ("clae evaluate ru", {"runs"}),
        ("clae completion z", {"zsh"}),
    ],
)
def test_completion_in_bash(complete, words: str, proposed: set[str]) -> None:  # type: ignore[no-untyped-def]
    assert complete(*words.split(" ")) == proposed


def test_the_script_for_zsh_names_every_key_and_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    """Its syntax is checked only where zsh is installed."""
    assert main(["completion", "zsh"]) == 0
    script = capsys.readouterr().out
    assert all(f"{key}=" in script for key in flatten(Config()))
    assert "cifar10/clae" in script
    if zsh := shutil.which("zsh"):
        processes.run(zsh, "-n", input=script, check=True)


if __name__ == "__main__":
    README.write_text(TABLE.sub(lambda _: markdown_table(), README.read_text()))

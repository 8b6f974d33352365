"""What must not be in the code: ways in which data, archives, settings or a stranger on the network could run something."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for package in ("clae_dist", "data_prep")
    for path in sorted((ROOT / package).rglob("*.py"))
}
SHELL = {"clae_dist/data/byte_streams.py"}  # the opener of pipe:COMMAND, which the user writes
UNPICKLERS = {
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "dill.load",
    "cloudpickle.load",
    "cloudpickle.loads",
    "joblib.load",
}
RUNNERS = {"eval", "exec", "os.system", "os.popen", "runpy.run_path", "code.interact"}
UNSAFE_YAML = {"yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all"}


def keywords(call: ast.Call) -> dict[str, str]:
    return {one.arg: ast.unparse(one.value) for one in call.keywords if one.arg}


def wrong(name: str, call: ast.Call) -> str:
    """What is wrong with a call; "" when nothing is."""
    what, given = ast.unparse(call.func), keywords(call)
    last = what.rsplit(".", 1)[-1]
    if what in UNPICKLERS:
        return f"{what} runs what the file says"
    if what == "torch.load" and given.get("weights_only") != "True":
        return "torch.load without weights_only=True"
    if last in ("load", "read_array") and given.get("allow_pickle", "False") != "False":
        return f"{what} with allow_pickle"
    if what in UNSAFE_YAML or (what.startswith("yaml.") and last in ("load", "compose", "load_all")):
        loader = given.get("Loader", ast.unparse(call.args[1]) if len(call.args) > 1 else "")
        return "" if "SafeLoader" in loader and what not in UNSAFE_YAML else f"{what} without SafeLoader"
    if what in RUNNERS and ast.unparse(call) != "exec('')":  # which runs nothing (clae_dist/lifetime.py)
        return f"{what} runs a text"
    if given.get("shell", "False") != "False" and name not in SHELL:
        return f"{what} with a shell"
    return "the archive says where its files go" if last == "extractall" or what.endswith(".extract") else ""


def found_in(sources: dict[str, str]) -> Iterator[str]:
    for name, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and (problem := wrong(name, node)):
                yield f"{name}:{node.lineno}: {problem}"
        for number, line in enumerate(text.splitlines(), 1):
            if re.search(r"0\.0\.0\.0|[\"']::[\"'], *port", line):
                yield f"{name}:{number}: listens to everybody"


def test_nothing_runs_what_data_says_and_nothing_listens_to_strangers() -> None:
    assert list(found_in(OURS)) == []
    scripts = {path.name: path.read_text() for path in (ROOT / "launch").iterdir() if path.suffix == ".sh"}
    commands = [line for text in scripts.values() for line in text.splitlines() if re.search("mlflow (ui|server)", line)]
    assert commands, "the quickstart names MLflow's page"
    assert not [line for line in commands if "--host" in line and "127.0.0.1" not in line]


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(file)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "yaml.load(text, yaml.Loader)",
        "yaml.full_load(text)",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "archive.extractall(folder)",
        "host = '0.0.0.0'",
    ],
)
def test_each_of_them_would_be_found(line: str) -> None:
    assert len(list(found_in({"clae_dist/x.py": line}))) == 1


@pytest.mark.parametrize(
    "line", ["yaml.load(text, Loader=yaml.SafeLoader)", "model.eval()", "torch.load(p, weights_only=True)"]
)
def test_what_is_fine_is_not(line: str) -> None:
    assert list(found_in({"clae_dist/x.py": line})) == []


def test_whoever_opens_a_run_asks_whether_it_is_trusted() -> None:
    """A run's config.yaml may be a stranger's: what reads it and opens shards or a store goes through runs/trust.py."""
    reads, acts = r"\b(load_model|read_record|from_yaml)\(", r"\b(open_shards|open_sets|continue_tracking)\("
    both = {name for name, text in OURS.items() if re.search(reads, text) and re.search(acts, text)}
    assert "clae_dist/report/run_page.py" in both
    both.add("clae_dist/evaluation/examined.py")  # reads what evaluation/evaluate.py opens
    assert [name for name in both if "open_run(" not in OURS[name]] == []

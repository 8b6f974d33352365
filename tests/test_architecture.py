"""Rules about the code that neither ruff nor import-linter can state."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
OURS = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text())
    for package in ("clae_dist", "data_prep")
    for path in sorted((ROOT / package).rglob("*.py"))
}
VENDORS = {
    "ray": ["clae_dist/launchers/ray"],
    "mlflow": ["clae_dist/tracking/mlflow"],
    "tensorboard": ["clae_dist/tracking/tensorboard.py"],
    "deepspeed": ["clae_dist/parallel/deepspeed.py"],
    "onnx": ["clae_dist/deploy/onnx"],
    "onnxruntime": ["clae_dist/deploy/onnx"],
    "webdataset": ["clae_dist/data/", "clae_dist/bench/data_peers.py", "data_prep/"],
}
ENVIRONMENT = ["clae_dist/world.py", "clae_dist/launchers/", "clae_dist/cli.py", "clae_dist/commands/", "data_prep/__main__.py"]
ENVIRONMENT += ["clae_dist/staging.py"]  # CLAE_CACHE
ENVIRONMENT += ["clae_dist/api.py"]  # what the commands are, for Python
ENVIRONMENT += ["clae_dist/plugins.py"]  # adds to the import path of the ranks that are started
ENVIRONMENT += ["clae_dist/parallel/deepspeed_extensions.py"]  # where a vendor puts what it compiles


def attributes(tree: ast.AST) -> Iterator[str]:
    """The dotted text of every attribute, such as "torch.distributed.barrier"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and module of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def test_the_code_was_found() -> None:
    assert {"clae_dist/config/__init__.py", "clae_dist/world.py", "clae_dist/objectives/nt_xent.py"} <= set(OURS)


def test_only_world_starts_or_ends_process_groups() -> None:
    forbidden = {"init_process_group", "destroy_process_group", "new_group"}
    for name, tree in OURS.items():
        words = {word for text in attributes(tree) for word in text.split(".")} | {
            m.rsplit(".", 1)[-1] for _, m in imports(tree)
        }
        assert name == "clae_dist/world.py" or not words & forbidden, (
            f"{name} uses {words & forbidden}; world.connect does that"
        )


def test_vendors_are_imported_where_they_are_used_and_nowhere_else() -> None:
    for name, tree in OURS.items():
        for line, module in imports(tree):
            homes = VENDORS.get(module.split(".")[0], [name])
            assert any(name.startswith(home) for home in homes), f"{name}:{line} imports {module}; {homes} may"


def test_errors_are_imported_from_their_home() -> None:
    """A re-export would be a second home."""
    errors = {node.name for node in OURS["clae_dist/errors.py"].body if isinstance(node, ast.ClassDef)}
    for name, tree in OURS.items():
        for line, module in imports(tree):
            home, _, word = module.rpartition(".")
            assert word not in errors or home == "clae_dist.errors", f"{name}:{line} imports {word} from {home}"


def test_environment_variables_are_read_at_the_edges() -> None:
    """Inside, what a run does depends on its Config and World alone. Writing for a child or a vendor is something else."""
    for name, tree in OURS.items():
        if any(name.startswith(home) for home in ENVIRONMENT):
            continue
        reads = [text for text in attributes(tree) if text in ("os.getenv", "os.environ.get")]
        subscripts = [node for node in ast.walk(tree) if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load)]
        reads += [ast.unparse(node) for node in subscripts if ast.unparse(node.value) == "os.environ"]
        assert not reads, f"{name} reads {reads}"


def test_no_file_for_odds_and_ends() -> None:
    stems = {Path(name).stem for name in OURS}
    assert not stems & {"utils", "util", "helpers", "misc", "common"}


def test_the_algorithm_knows_no_ranks() -> None:
    """A rank inside an objective or an attack is how the other ranks' negatives get lost."""
    for name in [name for name in OURS if name.startswith("clae_dist/objectives/")] + ["clae_dist/contrast/adversary.py"]:
        ours = [module for _, module in imports(OURS[name]) if "distributed" in module or "clae_dist" in module]
        ours = [module for module in ours if not module.startswith(("clae_dist.objectives", "clae_dist.errors"))]
        assert not ours, f"{name} imports {ours}"
        backward = [text for text in attributes(OURS[name]) if text.endswith(".backward")]
        assert not backward, f"{name}: an attack takes autograd.grad of its input and fills no parameter gradients"


def test_only_the_run_folder_module_names_its_files() -> None:
    """A second spelling of a name is how a reader looks for a file that nobody writes."""
    from clae_dist.runs import folder

    home = "clae_dist/runs/folder.py"
    for name, tree in OURS.items():
        paths = {id(node.right) for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)}
        words = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        literals = [node.value for node in words if node.value in folder.FILES | {folder.REPORT_PAGE}]
        literals += [node.value for node in words if node.value in folder.FOLDERS and id(node) in paths]
        assert name == home or not literals, f"{name} spells {literals}; runs.folder.RunFolder has these paths"

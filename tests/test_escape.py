"""Names that would control a terminal, forge a line or break a page, wherever they are shown."""

from __future__ import annotations

import ast
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from jinja2 import UndefinedError
from PIL import Image

from clae_dist.cli import main as clae
from clae_dist.data.manifest import content_digest
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.escape import in_json, shown, shown_lines
from clae_dist.page import render
from clae_dist.report.pictures import draw_neighbours
from data_prep.__main__ import main as data_prep
from tests.test_architecture import OURS, ROOT

EVIL = "\x1b[2J\x1b]0;title\x07\r\nclae: all is well\x9b31m\u202egnp.\u2066\u2028\ud800$\\frac$<b>"
SAFE = r"\x1b[2J\x1b]0;title\x07\r\nclae: all is well\x9b31m\u202egnp.\u2066\u2028\ud800$\frac$<b>"


def test_what_controls_is_written_out_and_nothing_else_is_changed() -> None:
    assert shown(EVIL) == SAFE
    assert shown("Käse 日本 👩‍🚀 عربي हिन्दी") == "Käse 日本 👩‍🚀 عربي हिन्दी"
    assert shown(Path("/a b/c")) == "/a b/c"
    assert shown_lines("one\x1b\ntwo") == "one\\x1b\ntwo"


def test_json_stays_json() -> None:
    text = json.dumps({"name": EVIL + "😀\U000e0041"}, ensure_ascii=False, indent=1)
    assert json.loads(in_json(text)) == json.loads(text)
    assert "\x9b" not in in_json(text)
    assert "\u202e" not in in_json(text)


@pytest.fixture
def evil_set(tmp_path: Path) -> Path:
    """A prepared set whose names are hostile and whose digest is right."""
    folder = write_synthetic_set(tmp_path / "set", 20, 16).folder
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    evil = EVIL.replace("\ud800", "")
    content.update(name=evil, source=evil, licence=evil, classes=[evil, "b"], created=evil)
    content["digest"] = content_digest(content)
    path.write_text(json.dumps(content))
    return folder


def is_harmless(text: str) -> None:
    assert shown_lines(text) == text
    assert not [line for line in text.split("\n") if line.startswith("clae: all is well")]


def test_names_of_a_set_on_the_console_of_data_prep(evil_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data_prep(["info", str(evil_set)]) == 0
    assert data_prep(["info", str(evil_set), "--json"]) == 0
    assert data_prep(["audit", str(evil_set), "--workers", "0", "--report", str(tmp_path / "report")]) == 0
    assert data_prep(["verify", str(tmp_path / EVIL.replace("\x00", ""))]) == 2
    out, err = capsys.readouterr()
    is_harmless(out)
    is_harmless(err.replace("\r", ""))
    page = (tmp_path / "report" / "audit.html").read_text()
    assert shown_lines(page) == page
    assert "<b>&" not in page


def test_names_of_files_on_the_console_of_data_prep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images" / "class"
    folder.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (16, 16), (80 * number, 0, 0)).save(folder / f"{number}.png")
    name = "\x1b[2J\nclae: all is well"
    (folder / f"{name}.png").write_bytes(b"none")
    (folder / f"{name}.txt").write_bytes(b"none")
    arguments = ["prepare", str(tmp_path / "images"), str(tmp_path / "set"), "--max-bad", "1", "--workers", "0"]
    assert data_prep(arguments) == 0
    out = capsys.readouterr().out
    assert r"\x1b[2J\nclae: all is well.png" in out
    is_harmless(out)


def test_names_of_a_set_and_a_run_in_clae(evil_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run\x1b[2J\nclae: all is well"
    settings = ["model.encoder=small_resnet", "data.image_size=16", "batch.global_size=8", "train.epochs=1", "data.workers=0"]
    settings += ["optim.warmup_epochs=0", "tracking.name=none", "train.knn_every=0", "launch.workers=1", "evaluation.knn_k=3"]
    settings.append(f"data.shards={evil_set}")
    (tmp_path / "recipe.yaml").write_text("launch: {launcher: local}\n")
    assert clae(["train", str(tmp_path / "recipe.yaml"), *settings, f"run_dir={run}"]) == 0
    for command in ("evaluate", "report"):
        assert clae([command, str(run)]) == 0
    assert clae(["export", str(tmp_path / EVIL.replace("\ud800", ""))]) == 2
    out, err = capsys.readouterr()
    is_harmless(out)
    is_harmless(err)
    for path in (run / "report" / "report.html", run / "console.log"):
        is_harmless(path.read_text())


def test_class_names_in_pictures_are_no_formulas() -> None:
    query = {"id": 0, "label": 0, "neighbour_ids": [1, 2], "neighbour_labels": [0, 1]}
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    with warnings.catch_warnings(action="error"):
        assert draw_neighbours([query], images, [images.expand(2, 3, 8, 8)], ["$\\frac$", "\x1b\n$x_$"])


def test_pages_escape_markup_and_control_characters() -> None:
    values = {"findings": [], "near_bits": 3, "num_listed": 0, "list_file": "", "profiles": [], "pairs": {}, "unreadable": []}
    images = [{"source": '"><b>', "words": [EVIL, "b"]}]
    patches = [{"alarm": True, "text": EVIL, "source": '"><b>', "images": images}]
    page = render("data_prep", "audit.html", title=EVIL, odd={'"': images}, patches=patches, patch_file=EVIL, **values)
    assert f"<h1>{SAFE.replace('<b>', '&lt;b&gt;')}</h1>" in page
    assert '<img alt="" src="&#34;&gt;&lt;b&gt;">' in page
    assert "&lt;b&gt;<br>b</figcaption>" in page
    is_harmless(page)
    with pytest.raises(UndefinedError):
        render("data_prep", "audit.html")


def test_no_template_and_no_module_marks_text_as_markup() -> None:
    """Marked text is escaped neither by Jinja2 nor by escape.shown."""
    for path in [*ROOT.glob("clae_dist/templates/*"), *ROOT.glob("data_prep/templates/*")]:
        assert not re.search(r"\|\s*safe|autoescape|<script", path.read_text()), path
    for name, tree in OURS.items():
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not calls & {"Markup", "html.escape"}, name

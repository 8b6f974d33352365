"""The report in a headless browser, at the widths of a desktop and of a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from clae_dist.report.run_page import write_report
from tests.run_files import evaluation

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
# A window is at least 500 pixels wide; a frame in it is as narrow as a phone.
FRAME = """<body style="margin: 0"><iframe src="{page}" width="{width}" height="2400" style="border: 0"></iframe><script>
window.onload = () => {{
  const page = document.querySelector("iframe").contentDocument, images = [...page.images];
  document.body.dataset.found = [page.documentElement.scrollWidth, images.length,
                                 images.filter(image => image.naturalWidth > 0).length].join(" ");
}}
</script></body>"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="needs a headless browser: apt install chromium")]


def browse(page: Path, width: int, *arguments: str) -> str:
    assert BROWSER is not None
    profile = f"--user-data-dir={page.parent / 'profile'}"
    line = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", profile, f"--window-size={width},2400"]
    return subprocess.run([*line, *arguments, page.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout


def measured(page: Path, width: int) -> tuple[int, int, int]:
    """Width of the content, number of pictures, and of those that the browser could show."""
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.format(page=page.name, width=width))
    found = re.search(r'data-found="(\d+) (\d+) (\d+)"', browse(frame, width, "--allow-file-access-from-files", "--dump-dom"))
    assert found
    content, pictures, shown = map(int, found.groups())
    return content, pictures, shown


@pytest.mark.parametrize("width", [1200, 390])
def test_the_report_fits_and_shows_its_pictures(
    make_run: Callable[..., Path], metrics: list[dict[str, float]], tmp_path: Path, width: int
) -> None:
    run = make_run(checkpoint=False)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (run / "evaluation.json").write_text(json.dumps(evaluation()))
    page = write_report(run, lambda _: None)
    content, pictures, shown = measured(page, width)
    assert content <= width
    assert pictures == shown > 10
    wide = page.with_name("wide.html")
    wide.write_text(page.read_text().replace("<main>", f'<main><div style="width: {width + 200}px">wide</div>'))
    assert measured(wide, width)[0] > width  # it would be noticed
    browse(page, width, f"--screenshot={tmp_path / 'page.png'}")
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.width == width
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 100  # neither blank nor an error page

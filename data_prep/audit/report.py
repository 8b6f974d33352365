"""The audit as one HTML file with pairs of pictures inside (nothing is loaded from anywhere), and its figures and lists."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from clae_dist.data.manifest import DataError
from clae_dist.escape import in_html as escape
from clae_dist.files import make_folders, write_atomically
from data_prep.audit.find import Audit
from data_prep.audit.overlap import Pair
from data_prep.audit.profile import oddities
from data_prep.audit.summary import as_json, overlap_lines, profile_lines, write_list
from data_prep.audit.thumbnails import Images

PAGE, DATA, LIST = "audit.html", "audit.json", "images.jsonl"
_KINDS = {"file": "the same file", "pixels": "the same pixels", "near": "near"}

_STYLE = """
:root { color-scheme: light dark; --ground: #f6f7f9; --card: #fff; --ink: #1d2329; --soft: #646d78; --line: #dfe3e8;
  --alarm: #d9653b; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --card: #1c2126; --ink: #e6e9ec; --soft: #98a1ac;
  --line: #2e353d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 16px 56px; }
h1 { font-size: 1.9rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 44px 0 4px; }
p, li { max-width: 92ch; }
.soft, figcaption { color: var(--soft); }
.alarm { color: var(--alarm); font-weight: 650; }
.cards { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); margin: 14px 0; }
.card, figure { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 14px 16px; margin: 0; }
pre { margin: 6px 0 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 0.82rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; }
figure img { width: 100%; height: 150px; object-fit: contain; image-rendering: auto; }
.small { grid-template-columns: repeat(auto-fill, minmax(min(200px, 100%), 1fr)); }
figcaption { font-size: 0.8rem; line-height: 1.35; overflow-wrap: anywhere; }
"""


def check_target(folder: Path, sets: Sequence[Path]) -> None:
    """Before hours of reading: raises DataError for a folder that cannot take the report, or is one of the sets."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--report {folder} is a file; name a folder.")
    for one in sets:
        if folder.resolve().is_relative_to(one.resolve()):
            raise DataError(f"--report {folder} lies inside the set {one}; name a folder elsewhere.")


def write_report(audit: Audit, folder: Path) -> Path:
    """Writes audit.html, audit.json and images.jsonl into `folder`, each whole or not at all; returns the page's path."""
    make_folders(folder)
    images = Images(audit)
    listed = write_list(folder / LIST, audit, images)
    write_atomically(folder / DATA, (json.dumps(as_json(audit, images), indent=1, ensure_ascii=False) + "\n").encode())
    write_atomically(folder / PAGE, _page(audit, images, listed).encode())
    return folder / PAGE


def _page(audit: Audit, images: Images, listed: int) -> str:
    names = " and ".join(dict.fromkeys(part.set_name for part in audit.parts))
    body = [f"<h1>Audit of {escape(names)}</h1>", *_findings(audit, listed), *_profiles(audit), *_pictures(audit, images)]
    body += _odd(audit, images)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Audit of {escape(names)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _findings(audit: Audit, listed: int) -> Iterator[str]:
    yield '<div class="card">'
    for line in overlap_lines(audit) or ["No copies were found."]:
        css = ' class="alarm"' if line.startswith(("LEAKAGE", "LABELS")) else ""
        word, _, rest = line.partition("  ")
        text = f"{word.capitalize()}: {rest.strip()}" if rest else line
        yield f"<p{css}>{escape(text)}</p>"
    yield "</div>"
    yield (
        f'<p class="soft">Near: the perceptual hashes, also of the mirrored image, differ in at most {audit.near_bits} of 64 '
        f"bits. Near pairs can be unlike pictures: look at them below. {listed} images are listed in {LIST}.</p>"
    )


def _profiles(audit: Audit) -> Iterator[str]:
    yield '<h2>What the sets hold</h2><div class="cards">'
    for part, facts in zip(audit.parts, audit.profiles, strict=True):
        text = "\n".join(map(escape, profile_lines(facts)))
        title = f"{part.set_name}, {part.split}: {facts['images']} images"
        yield f'<div class="card"><b>{escape(title)}</b><pre>{text}</pre></div>'
    yield "</div>"


def _pictures(audit: Audit, images: Images) -> Iterator[str]:
    part = audit.table["part"]
    titles: dict[str, list[Pair]] = {}
    for pair in audit.pairs:
        s, t = audit.parts[part[pair.first]], audit.parts[part[pair.second]]
        where = f"Within {s.name}" if s == t else f"{s.name} and {t.name}"
        titles.setdefault(f"{where}: {_KINDS[pair.kind]}", []).append(pair)
    if audit.conflict_pairs:
        titles["The same picture under two labels"] = list(audit.conflict_pairs)
    for title, pairs in titles.items():
        yield f'<h2>{escape(title)}</h2>\n<div class="cards">'
        yield from _figures(pairs, images)
        yield "</div>"


def _odd(audit: Audit, images: Images) -> Iterator[str]:
    """A few odd images of each part and oddity, and what cannot be decoded."""
    shown: dict[str, list[str]] = {}
    for number, part in enumerate(audit.parts):
        positions = np.flatnonzero((audit.table["part"] == number) & (audit.table["width"] > 0))
        for name, found in oddities(audit.table[positions]).items():
            for at in positions[found][: audit.limit_pictures].tolist():
                size = f"{audit.table[at]['width']}x{audit.table[at]['height']}"
                shown.setdefault(name, []).append(f"<figure>{_image(at, images, f'{part.name}, {size}')}</figure>")
    for name, figures in shown.items():
        yield f'<h2>Odd: {escape(name)}</h2>\n<div class="cards small">'
        yield from figures
        yield "</div>"
    if audit.unreadable:
        yield "<h2>Cannot be decoded</h2>\n<ul>"
        for at, reason in sorted(audit.unreadable.items())[: 5 * audit.limit_pictures]:
            place = images.place(at)
            yield f"<li>{escape(place['name'])} ({escape(place['shard'])}, row {place['row']}): {escape(reason)}</li>"
        yield "</ul>"


def _image(at: int, images: Images, more: str = "") -> str:
    place = images.place(at)
    words = (place["class"] or "no class", place["name"], f"{place['shard']}, row {place['row']}", more)
    caption = "<br>".join(escape(word) for word in words if word)
    return f'<img alt="" src="{images.data_uri(at)}"><figcaption>{caption}</figcaption>'


def _figures(pairs: Iterable[Pair], images: Images) -> Iterator[str]:
    for pair in pairs:
        sides = [f"<div>{_image(at, images)}</div>" for at in (pair.first, pair.second)]
        how = f"{pair.bits} of 64 bits" + (", mirrored" if pair.mirrored else "") if pair.kind == "near" else _KINDS[pair.kind]
        yield f'<figure><b>{how}</b><div class="pair">{"".join(sides)}</div></figure>'

"""The report as one HTML file: pictures inside, no script, nothing loaded from anywhere."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence

from clae_dist.escape import in_html as escape

STYLE = """
:root { color-scheme: light dark; --ground: #f6f7f9; --card: #ffffff; --ink: #1d2329; --soft: #646d78; --line: #dfe3e8;
  --clean: #3b82b8; --adversarial: #d9653b; --good: #3f8f66; --before: #b4bcc6; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --card: #1c2126; --ink: #e6e9ec; --soft: #98a1ac;
  --line: #2e353d; --good: #6dbb92; --before: #59636f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 16px 56px; }
h1 { font-size: 1.9rem; margin: 0; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 44px 0 4px; }
p { margin: 4px 0 12px; max-width: 92ch; }
.soft, figcaption, .note { color: var(--soft); }
.tag { display: inline-block; font-size: 0.8rem; font-weight: 600; padding: 2px 10px; border-radius: 99px; color: #fff;
  background: var(--adversarial); vertical-align: 0.45em; margin-left: 8px; }
.tag.SimCLR { background: var(--clean); }
.cards { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(235px, 100%), 1fr)); margin: 22px 0 8px; }
.charts { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(310px, 100%), 1fr)); margin-top: 14px; }
.card, figure { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 14px 16px; margin: 0; }
.card .what { font-size: 0.86rem; color: var(--soft); }
.card .value { font-size: 1.75rem; font-weight: 650; letter-spacing: -0.02em; font-variant-numeric: tabular-nums; }
.card .value small { font-size: 0.95rem; font-weight: 600; color: var(--good); letter-spacing: 0; margin-left: 6px; }
.card .value small.worse { color: var(--adversarial); }
.bar { height: 7px; border-radius: 4px; margin-top: 5px; background: var(--before); min-width: 2px; }
.bar.after { background: var(--good); }
figure b { display: block; font-size: 0.95rem; }
figcaption { font-size: 0.83rem; line-height: 1.4; }
figure img { width: 100%; height: auto; display: block; margin-top: 8px; }
figure.pixels { overflow-x: auto; margin-top: 12px; }
figure.pixels img { min-width: 560px; max-width: 980px; }
table { border-collapse: collapse; width: 100%; font-size: 0.93rem; font-variant-numeric: tabular-nums; }
.table { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 12px; margin: 12px 0; }
th, td { text-align: left; padding: 7px 16px; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 600; font-size: 0.84rem; }
td.number, th.number { text-align: right; white-space: nowrap; }
@media (max-width: 480px) { main { padding: 20px 10px 40px; } th, td { padding: 6px 9px; } table { font-size: 0.88rem; } }
.note { border-left: 3px solid var(--line); padding: 2px 0 2px 12px; margin: 12px 0; }
code, .mono { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 0.86em; }
details summary { cursor: pointer; color: var(--soft); margin-top: 12px; }
tr.section td { font-weight: 650; background: var(--ground); }
tr.set td:nth-child(2) { font-weight: 650; color: var(--adversarial); }
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole HTML document."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def heading(text: str, lead: str = "") -> str:
    return f"<h2>{escape(text)}</h2>" + (f'\n<p class="soft">{escape(lead)}</p>' if lead else "")


def paragraph(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'


def note(text: str) -> str:
    """Something that is missing, or to be known when reading on."""
    return f'<p class="note">{escape(text)}</p>'


def picture(png: bytes, title: str, caption: str, css: str = "") -> str:
    """A figure with its PNG inside the page."""
    data = base64.b64encode(png).decode()
    attribute = f' class="{css}"' if css else ""
    return (
        f"<figure{attribute}><b>{escape(title)}</b><figcaption>{escape(caption)}</figcaption>"
        f'<img alt="{escape(title, quote=True)}" src="data:image/png;base64,{data}"></figure>'
    )


def charts(figures: Sequence[str]) -> str:
    return '<div class="charts">\n' + "\n".join(figures) + "\n</div>"


def card(what: str, value: str, below: str = "") -> str:
    lines = [("what", what), ("value", value), ("what", below)]
    return '<div class="card">' + "".join(f'<div class="{css}">{escape(text)}</div>' for css, text in lines) + "</div>"


def comparison_card(what: str, before: float | None, after: float | None) -> str:
    """A percentage before and after pretraining, with bars."""
    if before is None or after is None:
        return card(what, "–", "not evaluated yet")
    points = after - before
    css = "" if points >= 0 else ' class="worse"'
    widths = (("bar", before), ("bar after", after))
    bars = "".join(f'<div class="{bar}" style="width:{value:.1f}%"></div>' for bar, value in widths)
    return (
        f'<div class="card"><div class="what">{escape(what)}, %, before → after</div>'
        f'<div class="value">{before:.1f} → {after:.1f}<small{css}>{points:+.1f}</small></div>{bars}</div>'
    )


Cell = str | tuple[str, ...]  # of a table: a text, or the lines of one


def table(rows: Sequence[Sequence[Cell]], header: Sequence[str] = (), numbers: bool = True) -> str:
    """The first column is text; the others are numbers unless said otherwise."""

    def row(cells: Sequence[Cell], tag: str) -> str:
        css = ' class="number"' if numbers else ""
        texts = ("<br>".join(map(escape, (cell,) if isinstance(cell, str) else cell)) for cell in cells)
        return "<tr>" + "".join(f"<{tag}{css if i else ''}>{text}</{tag}>" for i, text in enumerate(texts)) + "</tr>"

    lines = [row(header, "th")] if header else []
    return '<div class="table"><table>\n' + "\n".join(lines + [row(cells, "td") for cells in rows]) + "\n</table></div>"


def configuration(text: str) -> str:
    """A resolved config.yaml as a table of keys, values and origins; what differs from the defaults stands out."""
    rows = []
    for line in text.splitlines():
        setting, _, origin = line.partition("  # ")
        key, _, value = setting.partition(":")
        if not value.strip():
            rows.append(f'<tr class="section"><td colspan="3">{escape(key)}</td></tr>')
            continue
        css = ' class="set"' if origin and origin != "default" else ""
        cells = "".join(f"<td>{escape(cell.strip())}</td>" for cell in (key, value, origin))
        rows.append(f"<tr{css}>{cells}</tr>")
    head = "<tr><th>key</th><th>value</th><th>from</th></tr>"
    return f'<div class="table mono"><table>\n{head}\n' + "\n".join(rows) + "\n</table></div>"


def definitions(pairs: Mapping[str, object]) -> str:
    """Names and values, for versions and digests."""
    cells = ((escape(name), escape(str(value))) for name, value in pairs.items())
    rows = "\n".join(f'<tr><td>{name}</td><td class="mono">{value}</td></tr>' for name, value in cells)
    return f'<div class="table"><table>\n{rows}\n</table></div>'

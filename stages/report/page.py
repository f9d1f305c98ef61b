"""Safe HTML, and the one page: style inside, no scripts, nothing loaded from anywhere."""

import html
from collections.abc import Iterable, Sequence
from typing import Final

VOID = frozenset({"img", "meta", "br"})


class Html(str):
    """Text that is markup already. Any other text is escaped when it enters a page."""

    __slots__ = ()


def tag(name: str, /, *content: object, **attributes: object) -> Html:
    """An element. Content and attributes are escaped, unless they are `Html`; None is left out.

    `class_` stands for class, and an underscore in the name of an attribute for a hyphen.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>" if name in VOID else f"<{name}{written}>{join(content)}</{name}>")


def join(parts: Iterable[object]) -> Html:
    """Pieces one after the other, each escaped unless it is `Html`; None is left out."""
    return Html(
        "".join(part if isinstance(part, Html) else html.escape(str(part)) for part in parts if part is not None)
    )


def note(text: object, kind: str = "note") -> Html:
    """A paragraph that stands out; kind: note or warning."""
    return tag("p", text, class_=kind)


def code(*commands: str) -> Html:
    """Commands to copy, a line each."""
    return tag("pre", tag("code", "\n".join(commands)))


def table(
    headings: Sequence[object],
    rows: Iterable[Sequence[object]],
    *,
    numeric: Iterable[int] = (),
    bold: Iterable[int] = (),
    rule: Iterable[int] = (),
    bands: Sequence[tuple[str, int]] = (),
) -> Html:
    """A table that scrolls sideways where it does not fit; its first column stays.

    Args:
        rows: cells; a cell that is a `td` or `th` of its own is taken as it is.
        numeric, bold: columns that are set to the right, or bold. rule: columns that a line stands before.
        bands: a second row of headings above the first: text and number of columns.
    """
    right, heavy, ruled = set(numeric), set(bold), set(rule)

    def classes(column: int) -> str | None:
        names = [name for name, members in (("n", right), ("b", heavy), ("r", ruled)) if column in members]
        return " ".join(names) or None

    def cell(column: int, value: object) -> Html:
        if isinstance(value, Html) and value.startswith(("<td", "<th")):
            return value
        if column == 0:
            return tag("th", value, scope="row")
        return tag("td", value, class_=classes(column))

    above, start = [], 0
    for text, width in bands:
        above.append(tag("th", text, colspan=width, scope="colgroup", class_="r" if start in ruled else None))
        start += width
    head = [tag("th", heading, scope="col", class_=classes(column)) for column, heading in enumerate(headings)]
    body = [tag("tr", *(cell(column, value) for column, value in enumerate(row))) for row in rows]
    parts = (
        tag("thead", tag("tr", *above, class_="bands") if above else None, tag("tr", *head)),
        tag("tbody", *body),
    )
    return tag("div", tag("table", *parts), class_="scroll", tabindex="0")


def section(title: str, *content: object, anchor: str | None = None) -> Html:
    """A titled part of a data set's report."""
    return tag("section", tag("h3", title), *content, id=anchor)


def document(title: str, *body: object) -> Html:
    """The whole page."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    return Html(f"<!doctype html>\n{tag('html', head, tag('body', *body), lang='en')}\n")


STYLE: Final = """
:root {
  color-scheme: light dark;
  --page: #fcfcfa; --card: #ffffff; --text: #1d2127; --soft: #5b6470; --line: #dfe2e6; --shade: #f3f4f2;
  --accent: #0b5cad; --good: #17703f; --bad: #b3261e; --warn: #fff4dc; --warn-line: #d9a227; --heat: 214 90 20;
  --s0: #0b5cad; --s1: #b4540a; --s2: #17703f; --s3: #8a3ab9; --s4: #5b6470; --s5: #b01657; --s6: #0b7285;
  --s7: #7a6000;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1b1f25; --text: #e4e7eb; --soft: #9aa4b0; --line: #333a43; --shade: #20252c;
    --accent: #79b4f2; --good: #6fce97; --bad: #ff8f86; --warn: #33290f; --warn-line: #a8822a; --heat: 240 130 60;
    --s0: #79b4f2; --s1: #f0a35e; --s2: #6fce97; --s3: #cf9bf0; --s4: #aab3be; --s5: #f58ab5; --s6: #63cfe0;
    --s7: #dcc35a;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 80rem; background: var(--page);
  color: var(--text); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1, h2, h3, h4 { line-height: 1.25; font-weight: 650; text-wrap: balance; }
h1 { font-size: 1.9rem; margin: 0; }
h2 { font-size: 1.45rem; margin: 3.2rem 0 .5rem; padding-top: 1.4rem; border-top: 2px solid var(--text); }
h3 { font-size: 1.1rem; margin: 2.4rem 0 .6rem; }
h4 { font-size: .9rem; margin: 1.2rem 0 .4rem; }
p { margin: .5rem 0; max-width: 75ch; }
a { color: var(--accent); }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
  font-size: .87em; }
pre { background: var(--shade); border: 1px solid var(--line); border-radius: 6px; padding: .7rem .9rem;
  overflow-x: auto; }
.soft, figcaption, .facts dt { color: var(--soft); }
.small { font-size: .87rem; }
.note, .warning, .verdict { border-left: 4px solid var(--line); background: var(--shade); padding: .6rem .9rem;
  border-radius: 0 6px 6px 0; overflow-wrap: anywhere; }
.warning { border-color: var(--warn-line); background: var(--warn); }
.verdict { border-color: var(--accent); max-width: 90ch; }
.verdict p { max-width: none; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .8rem 0; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
nav { margin: 1rem 0 0; display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; background: var(--card);
  margin: .7rem 0; width: fit-content; max-width: 100%; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .6rem; text-align: left; white-space: nowrap; border-top: 1px solid var(--line); }
thead th { border-top: 0; white-space: normal; font-weight: 600; color: var(--soft);
  vertical-align: bottom; background: var(--shade); }
thead .bands th { padding-bottom: 0; color: var(--text); }
tbody th { font-weight: 500; position: sticky; left: 0; background: var(--card); }
thead th:first-child { position: sticky; left: 0; }
.side { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 0 1.5rem; }
.side > div { min-width: 0; }
.n { text-align: right; }
.b { font-weight: 700; color: var(--text); }
.r { border-left: 1px solid var(--line); }
.error { color: var(--soft); font-weight: 400; font-size: .92em; }
.heat { text-align: right; min-width: 4.4rem; background: rgb(var(--heat) / var(--share)); }
.right { color: var(--good); }
.wrong { color: var(--bad); }
svg { display: block; font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
svg text { fill: var(--text); }
svg .soft { fill: var(--soft); }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .box { fill: var(--card); stroke: var(--soft); stroke-width: 1.2; }
svg .box.teacher { stroke: var(--accent); stroke-width: 2; }
svg .box.assistant { stroke-dasharray: 5 3; }
svg .arrow { fill: none; stroke: var(--soft); stroke-width: 1.4; }
svg .head { fill: var(--soft); }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.s0 { stroke: var(--s0); }
.s1 { stroke: var(--s1); stroke-dasharray: 7 3; }
.s2 { stroke: var(--s2); }
.s3 { stroke: var(--s3); stroke-dasharray: 2 2.5; }
.s4 { stroke: var(--s4); stroke-dasharray: 9 3 2 3; }
.s5 { stroke: var(--s5); }
.s6 { stroke: var(--s6); stroke-dasharray: 7 3; }
.s7 { stroke: var(--s7); stroke-dasharray: 2 2.5; }
svg .mark { stroke-width: 4; stroke-dasharray: none; fill: none; }
svg .mark.ring { stroke-width: 2; fill: var(--card); }
.dots { fill: none; stroke-width: 3.4; stroke-linecap: round; stroke-opacity: .7; }
.dots.behind { stroke: var(--line); stroke-dasharray: none; stroke-width: 3; stroke-opacity: 1; }
svg .crosses { fill: none; stroke-width: 1.1; stroke-dasharray: none; stroke-opacity: .8; }
svg .between { fill: none; stroke: var(--text); stroke-width: 2; }
.ground .disc { fill: var(--soft); }
.ground .reach { fill: var(--soft); fill-opacity: .16; }
.ground .finish { fill: none; stroke: var(--good); stroke-width: 1.6; stroke-dasharray: 6 4; }
.ground .trail { fill: none; stroke-width: 1.3; stroke-opacity: .75; stroke-linejoin: round; stroke-linecap: round; }
.ground .missed { fill: none; stroke: var(--bad); stroke-width: 2; }
.ground .rod { stroke: var(--text); stroke-width: 1.4; }
.ground path, .ground .rod { vector-effect: non-scaling-stroke; }
.now { stroke: var(--text); stroke-width: 1.6; }
.share, .taken { stroke: none; }
.played:hover .moves, .played:focus .moves { animation-play-state: paused; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .87rem; margin: .5rem 0; padding: 0;
  list-style: none; }
.legend li { display: flex; align-items: center; gap: .45rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: .9rem; }
.charts figure, .sample { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: .7rem .8rem; min-width: 0; }
.charts figure > svg { width: 100%; height: auto; }
.charts.large { flex: 0 1 27rem; margin: .7rem 0; }
.clouds { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 10.5rem), 1fr)); gap: .7rem; }
.clouds figure { margin: 0; padding: .4rem .5rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; min-width: 0; }
.clouds svg { width: 100%; height: auto; }
.clouds figcaption { font-size: .8rem; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.clouds b { color: var(--text); }
.grounds { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 13.5rem), 1fr)); gap: .9rem; }
.grounds figure { margin: 0; padding: .6rem .7rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; min-width: 0; }
.grounds svg { width: 100%; height: auto; }
.grounds figcaption { font-size: .84rem; margin-top: .35rem; font-variant-numeric: tabular-nums; }
.grounds b { color: var(--text); }
.played { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); gap: .9rem; }
.played figure { margin: 0; padding: .6rem .7rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; min-width: 0; }
.played figure > div { display: flex; align-items: center; gap: .6rem; }
.played svg { flex: 1 1 60%; min-width: 0; height: auto; }
.played svg.ground { flex: 0 1 36%; }
.played figcaption { font-size: .87rem; margin-bottom: .3rem; }
.played b { color: var(--text); }
.charts figcaption { font-size: .87rem; margin-bottom: .3rem; }
.charts figcaption b { color: var(--text); }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 14.5rem), 1fr)); gap: .9rem; }
.sample figcaption { font-size: .87rem; margin: .5rem 0 .3rem; overflow-wrap: anywhere; }
.sample figcaption b { color: var(--text); }
.sample ul { list-style: none; margin: 0; padding: 0; font-size: .84rem; font-variant-numeric: tabular-nums; }
.sample li { display: grid; grid-template-columns: 1.1rem minmax(0, 1fr) auto; gap: .35rem; line-height: 1.45; }
.sample li span:nth-child(2) { overflow-wrap: anywhere; }
.texts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: .9rem; }
.sample blockquote { margin: .4rem 0 .6rem; padding-left: .7rem; border-left: 3px solid var(--line); font-size: .9rem;
  overflow-wrap: anywhere; }
td.long { white-space: normal; min-width: 22rem; max-width: 60rem; overflow-wrap: anywhere; }
.views { display: flex; gap: .7rem; flex-wrap: wrap; }
.views div { font-size: .76rem; color: var(--soft); }
.views img { display: block; width: 96px; height: 96px; border: 1px solid var(--line); border-radius: 2px; }
.views img.pixels { image-rendering: pixelated; }
.near { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: .3rem; margin: .15rem 0 .6rem;
  font-size: .8rem; line-height: 1.2; text-align: center; }
.near img { display: block; width: 100%; height: auto; border: 2px solid var(--line); border-radius: 3px;
  image-rendering: pixelated; }
.near .right img { border-color: var(--good); }
.near .wrong img { border-color: var(--bad); border-style: dashed; }
.scenes { display: grid; gap: .9rem; }
.maps { display: flex; flex-wrap: wrap; gap: .7rem; }
.maps div { width: min(176px, calc(50% - .35rem)); font-size: .8rem; color: var(--soft); overflow-wrap: anywhere; }
.maps b { color: var(--text); font-variant-numeric: tabular-nums; }
.maps img { display: block; max-width: 100%; height: auto; margin-bottom: .3rem; border-radius: 2px; }
.maps img.pixels { image-rendering: pixelated; }
.swatch { width: .9rem; height: .9rem; border-radius: 2px; }
footer { margin-top: 3rem; color: var(--soft); font-size: .87rem; }
@media print { .scroll { overflow: visible; } body { max-width: none; } }
"""

"""A page that is one file: text that is escaped, tables, charts with their data, and no way out to a network."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from facefast.evaluation.report_charts import Chart
from facefast.evaluation.report_style import STYLE
from facefast.runtime import files
from facefast.runtime.terminal import escape_letter

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'; img-src data:"
"""The page asks nobody for anything, whatever stands in it. Vega makes functions of its expressions, hence eval."""
CREDIT = (
    "Charts are drawn by Vega, Vega-Lite and Vega-Embed, copyright University of Washington Interactive Data Lab and "
    "contributors, under the BSD 3-clause licence (github.com/vega)."
)
"""Whose scripts the page holds, as their licence asks."""
MOST_ROWS = 200
"""Of a table behind a chart; more are thinned evenly."""
DRAW = """
for (const place of document.querySelectorAll("[data-chart]")) {
  const spec = JSON.parse(document.getElementById("charts").textContent)[place.dataset.chart];
  vegaEmbed(place, spec, {mode: "vega-lite", renderer: "svg", actions: false, logLevel: 1, tooltip: {theme: "page"}})
    .catch(error => { place.textContent = "This chart cannot be drawn: " + error.message; });
}
"""
EMPTY = Markup("")


def plain(text: Any) -> str:
    """A text as people read it: line ends, control letters and marks of direction as escapes."""
    return "".join(map(escape_letter, str(text)))


def name(text: Any) -> Markup:
    """A name from elsewhere, whatever it holds and in whichever direction it is written."""
    return Markup('<bdi dir="auto">{}</bdi>').format(plain(text))


def percent(value: Any, digits: int = 1) -> str:
    """0.9668 as 96.7 %; a dash for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return "–"
    return f"{100 * value:.{digits}f}\u00a0%"


def between(interval: Sequence[Any] | None, digits: int = 1) -> str:
    """The ends of a rate's interval; empty where there is none."""
    low, high = interval or (None, None)
    if not isinstance(low, int | float) or not isinstance(high, int | float):
        return ""
    return f"{100 * low:.{digits}f}–{100 * high:.{digits}f}\u00a0%"


def whole(value: Any) -> str:
    """12345 as 12 345."""
    return f"{int(value):,}".replace(",", "\u202f") if isinstance(value, int | float) else "–"


def figure(value: Any) -> str:
    """A number as short as it may be; other things as they are."""
    if isinstance(value, bool) or value is None:
        return "–" if value is None else str(value)
    if isinstance(value, int):
        return whole(value)
    return f"{value:.4g}" if isinstance(value, float) else plain(value)


def joined(parts: Iterable[Any]) -> Markup:
    """Parts one after the other, those that are text escaped."""
    return EMPTY.join(parts)


def paragraph(text: Any, kind: str = "") -> Markup:
    """A paragraph."""
    return Markup("<p{}>{}</p>").format(Markup(' class="{}"').format(kind) if kind else EMPTY, text)


def heading(text: Any) -> Markup:
    """Of a part of a section."""
    return Markup("<h3>{}</h3>").format(text)


def folded(title: Any, *content: Any, kind: str = "") -> Markup:
    """What is shown to whoever asks for it."""
    return Markup('<details class="{}"><summary>{}</summary>{}</details>').format(kind, title, joined(content))


def table(
    header: Sequence[Any], rows: Iterable[Sequence[Any]], label: str, *, marked: int = -1, words: Sequence[int] = (0,)
) -> Markup:
    """A table whose first column names its rows.

    Args:
        header: titles of the columns.
        rows: cells; what is no Markup is escaped.
        label: what it is, for those who do not see it.
        marked: the row that stands out.
        words: columns that hold text, and are aligned to the left.
    """

    def cell(k: int, value: Any, tag: str, scope: str = "") -> Markup:
        kind = Markup(' class="words"') if k in words else EMPTY
        return Markup("<{tag}{scope}{kind}>{value}</{tag}>").format(
            tag=tag, scope=Markup(scope), kind=kind, value=value
        )

    header = [title.replace(" %", "\u00a0%") if type(title) is str else title for title in header]
    head = joined(
        cell(k, title, "th" if title else "td", ' scope="col"' if title else "") for k, title in enumerate(header)
    )
    body = joined(
        Markup("<tr{}>{}</tr>").format(
            Markup(' class="marked"') if number == marked else EMPTY,
            joined(cell(k, value, "td" if k else "th", "" if k else ' scope="row"') for k, value in enumerate(row)),
        )
        for number, row in enumerate(rows)
    )
    return Markup(
        '<div class="scroll" tabindex="0" role="region" aria-label="{}"><table><thead><tr>{}</tr></thead>'
        "<tbody>{}</tbody></table></div>"
    ).format(label, head, body)


def bar(part: float) -> Markup:
    """A part from 0 to 1 as a small bar with its number."""
    return Markup(
        '<span class="bar" aria-hidden="true"><span style="width:{:.0f}%"></span></span><span class="num">{}</span>'
    ).format(100 * min(max(part, 0.0), 1.0), percent(part, 0))


def card(title: Any, value: Any, note: Any = "", kind: str = "") -> Markup:
    """One number that people look for."""
    return Markup('<div class="card {}"><dt>{}</dt><dd><strong>{}</strong><span>{}</span></dd></div>').format(
        kind, title, value, note
    )


def cards(*content: Markup) -> Markup:
    """Cards beside each other."""
    return Markup('<dl class="cards">{}</dl>').format(joined(content))


@dataclass
class Page:
    """A page in the making."""

    title: str
    sections: list[tuple[str, str, Markup]] = field(default_factory=list)
    """Anchor, title and content."""
    specs: list[dict[str, Any]] = field(default_factory=list)

    def section(self, anchor: str, title: str, build: Callable[[Page], Iterable[Any]]) -> None:
        """Adds a section, where there is something to say; what a damaged file does not let it say is named."""
        drawn = len(self.specs)
        try:
            content = [part for part in build(self) if part]
        except Exception as error:  # a file of the run folder that holds something else than a run writes
            del self.specs[drawn:]
            reason = f"{type(error).__name__}: {error}"[:200]
            content = [
                paragraph(
                    f"This part cannot be shown: a file of the run folder is not as a run writes it ({plain(reason)})."
                )
            ]
        if content:
            self.sections.append((anchor, title, joined(content)))

    def chart(self, chart: Chart | None) -> Markup:
        """A drawing, and its data as a table that is folded away."""
        if chart is None:
            return EMPTY
        self.specs.append(_shown(chart.spec))
        rows = chart.rows
        note = ""
        if len(rows) > MOST_ROWS:
            rows = [rows[k * len(rows) // MOST_ROWS] for k in range(MOST_ROWS)]
            note = f" ({MOST_ROWS} of {whole(len(chart.rows))} rows)"
        behind = table(chart.header, [[figure(value) for value in row] for row in rows], f"Data of {chart.title}")
        return Markup(
            "<figure><figcaption><strong>{title}</strong> {note}</figcaption>"
            '<div role="img" aria-label="{label}"><div class="plot" aria-hidden="true" data-chart="{number}"></div>'
            "</div>{data}</figure>"
        ).format(
            title=chart.title,
            note=chart.note,
            label=f"{chart.title}: {chart.note} The data is in the table below.",
            number=len(self.specs) - 1,
            data=folded(f"Data as a table{note}", behind, kind="data"),
        )

    def charts(self, charts: Iterable[Chart | None]) -> Markup:
        """Drawings side by side, as far as the page is wide."""
        drawn = [self.chart(chart) for chart in charts if chart is not None]
        columns = "three" if len(drawn) % 3 == 0 or len(drawn) == 5 else "two" if len(drawn) > 1 else "one"
        return Markup('<div class="charts {}">{}</div>').format(columns, joined(drawn)) if drawn else EMPTY

    def html(self, head: Markup, foot: Markup) -> str:
        """The whole page."""
        links = joined(
            Markup('<li><a href="#{}">{}</a></li>').format(anchor, title) for anchor, title, _ in self.sections
        )
        body = joined(
            Markup('<section id="{0}" aria-labelledby="{0}-title"><h2 id="{0}-title">{1}</h2>{2}</section>').format(
                anchor, title, content
            )
            for anchor, title, content in self.sections
        )
        scripts, notice = EMPTY, EMPTY
        if self.specs:
            try:
                libraries = Markup(bundle())
            except ImportError as error:
                notice = paragraph(f"The charts are not drawn ({plain(error)}); each has its data as a table.", "warn")
            else:
                scripts = Markup(
                    '<script type="application/json" id="charts">{}</script><script>{}</script><script>{}</script>'
                    "<noscript><p>The charts need JavaScript; each has its data as a table.</p></noscript>"
                ).format(Markup(_in_script(self.specs)), libraries, Markup(DRAW))
        return Markup(
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta http-equiv="Content-Security-Policy" content="{policy}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="color-scheme" content="light dark"><title>{title}</title><style>{style}</style></head>'
            '<body><header>{head}</header><div class="columns">'
            '<nav aria-label="Parts of the report"><ul>{links}</ul></nav>'
            "<main>{body}</main></div><footer>{foot}</footer>{scripts}</body></html>\n"
        ).format(
            policy=POLICY,
            title=plain(self.title),
            style=Markup(STYLE),
            head=head + notice,
            links=links,
            body=body,
            foot=foot + (Markup("<br>") + CREDIT if scripts else EMPTY),
            scripts=scripts,
        )


def _shown(value: Any) -> Any:
    """A specification whose texts are as people read them."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, dict):
        return {key: _shown(item) for key, item in value.items()}
    return [_shown(item) for item in value] if isinstance(value, list | tuple) else value


def _in_script(value: Any) -> str:
    """Strict JSON that no letter of it can end: it stands inside of a script."""
    text = json.dumps(files.strict(value), separators=(",", ":"), allow_nan=False)  # ASCII: U+2028 too is an escape
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@functools.cache
def bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, by which a page draws its charts.

    Raises:
        ImportError: vl-convert-python is not installed.
    """
    import vl_convert  # a large library of its own, which only a report needs

    script: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its default is the three libraries
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")

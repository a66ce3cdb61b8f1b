"""suspects.html: the findings with their photographs on one self-contained page, for a browser without a network."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from facefast.data import FaceIndex
from facefast.labels.sheets import Strip, tile
from facefast.runtime.files import replacing
from facefast.runtime.terminal import escape_letter

STYLE = (
    "body{font:14px system-ui,sans-serif;margin:24px;color:#222;background:#fff}section{margin:0 0 32px}"
    "article{display:inline-block;vertical-align:top;margin:0 16px 16px 0;max-width:100%}"
    "p{margin:2px 0;max-width:60em;overflow-wrap:anywhere}article p{max-width:40em}"
    "figure{display:inline-block;margin:2px 12px 0 0}img{width:94px;height:94px;margin-right:2px}"
)
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may load: nothing, whatever a name holds."""


def text(value: str) -> str:
    """A name or a sentence as HTML: it cannot begin a tag, end an attribute, break a line or turn what follows it."""
    # <bdi> keeps the direction of Arabic or Hebrew names to themselves; codes of direction are shown as codes.
    return f"<bdi>{html.escape(''.join(map(escape_letter, value)))}</bdi>"


def write_page(
    path: str | os.PathLike[str],
    title: str,
    lines: Iterable[str],
    parts: Mapping[str, Sequence[Strip]],
    index: FaceIndex,
) -> None:
    """Writes the page.

    Args:
        lines: what is said above the findings.
        parts: strips under each heading.

    Raises:
        StorageError: it cannot be written.
    """
    shown: dict[int, str] = {}

    def image(row: int) -> str:
        if row not in shown:
            content = io.BytesIO()
            tile(index, row).save(content, "JPEG", quality=85)
            shown[row] = base64.b64encode(content.getvalue()).decode()
        name = html.escape("".join(map(escape_letter, index.name(row))), quote=True)
        return f'<img src="data:image/jpeg;base64,{shown[row]}" alt="{name}" title="{name}">'

    def article(strip: Strip) -> str:
        figures = "".join(f"<figure>{''.join(map(image, group))}</figure>" for group in strip.groups)
        return f"<article><p>{text(strip.title)}</p><p>{text(strip.text)}</p>{figures}</article>\n"

    body = "".join(
        f"<section><h2>{text(heading)}</h2>\n{''.join(map(article, strips))}</section>\n"
        for heading, strips in parts.items()
        if strips
    )
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{html.escape(''.join(map(escape_letter, title)))}</title><style>{STYLE}</style></head><body>"
        f"<h1>{text(title)}</h1>{''.join(f'<p>{text(line)}</p>' for line in lines)}\n{body}</body></html>\n"
    )
    content = page.encode("utf-8", "backslashreplace")
    with replacing(Path(path), len(content), parents=True) as aside:
        aside.write_bytes(content)

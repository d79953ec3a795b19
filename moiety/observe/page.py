"""What our pages share: one file each, a policy that runs only their own code, plotly from its wheel, escaped text.

A page is a template beside this file. `{{style}}`, `{{shared}}` and `{{library}}` stand for `page.css`, `page.js` and
plotly, `{{unused}}` for what keeps plotly's map styles away, and `{{policy}}` for the hashes of exactly this code, so
that a script which got in with the data would not run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.resources
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moiety.packages import need

__all__ = [
    "data_json",
    "details",
    "escape",
    "fill",
    "plotly",
    "plotly_javascript",
    "scrolled",
    "table",
    "tokens",
    "visible",
]

CODE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)  # those with a type hold data
MAPS = re.compile(
    r'getElementById\("([0-9a-f]{64})"\)'
)  # plotly brings styles for maps unless this element is there
SLOT = re.compile(r"\{\{(\w+)\}\}")


def fill(
    template: str, slots: Mapping[str, str], *, without: Sequence[str] = (), connects: bool = False
) -> tuple[str, str]:
    """A page and the content security policy that stands in its head.

    Args:
        template: Name of a file beside this one.
        slots: HTML for each `{{name}}` besides those named above. Values are never searched for slots.
        without: Ids of sections that are left out, with the links to them.
        connects: Whether it may ask where it came from for more.

    Raises:
        DependencyError: plotly is not installed.
    """
    text = _file(template)
    for section in without:
        text = re.sub(rf'<section id="{section}".*?</section>\n', "", text, flags=re.DOTALL)
        text = text.replace(f'<a href="#{section}">', '<a hidden href="#top">')
    code = {"style": _file("page.css"), "shared": _file("page.js"), "library": plotly_javascript()}
    code["unused"] = "".join(f'<meta id="{one}">' for one in MAPS.findall(code["library"]))
    # hashed before any data is in: a script in the data has no hash
    policy = _policy([(kind, _filled(body, code)) for kind, body in CODE.findall(text)], connects)
    return _filled(text, {**slots, **code, "policy": policy}), policy


def _file(name: str) -> str:
    return (importlib.resources.files("moiety.observe") / name).read_text(encoding="utf-8")


def _filled(text: str, slots: Mapping[str, str]) -> str:
    return SLOT.sub(lambda found: slots[found[1]], text)  # one pass: data is never a slot


def _policy(code: Iterable[tuple[str, str]], connects: bool) -> str:
    found: dict[str, list[str]] = {"script": [], "style": []}
    for kind, body in code:
        digest = hashlib.sha256(body.encode("utf-8", errors="replace")).digest()
        found[kind].append(f"'sha256-{base64.b64encode(digest).decode('ascii')}'")
    empty = base64.b64encode(hashlib.sha256(b"").digest()).decode("ascii")
    reach = "'self'" if connects else "'none'"
    # plotly makes an empty style element and fills it from its own code, and sets style attributes, which run nothing
    return (
        f"default-src 'none'; script-src {' '.join(found['script'])}; "
        f"style-src-elem {' '.join(found['style'])} 'sha256-{empty}'; style-src-attr 'unsafe-inline'; "
        f"img-src data: blob:; connect-src {reach}; base-uri 'none'; form-action 'none'"
    )


def plotly() -> tuple[Any, Any]:
    """`plotly.graph_objects`, and what makes several charts of one page.

    Raises:
        DependencyError: it is not installed.
    """
    objects, subplots = (
        need(f"plotly.{name}", "the page", "moiety[report]") for name in ("graph_objects", "subplots")
    )
    return objects, subplots.make_subplots


def plotly_javascript() -> str:
    """plotly's code, from the installed package.

    Raises:
        DependencyError: it is not installed.
    """
    return str(need("plotly.offline", "the page", "moiety[report]").get_plotlyjs())


# Values into HTML


def escape(text: object) -> str:
    """Text that is text anywhere in HTML, attributes included."""
    return html.escape(str(text), quote=True)


def data_json(value: Any) -> str:
    """JSON that can stand inside a script element, whatever text is in it."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def visible(token: str) -> str:
    """A token's text as HTML, its spaces and line ends made visible."""
    shown = token.replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")
    return escape(shown or "∅")


def tokens(texts: Sequence[str]) -> str:
    """A text token by token, for `startText` of page.js: one stop for the tab key."""
    parts = []
    for number, text in enumerate(texts):
        may_break = "" if text.startswith("\n") else "<wbr>"
        ends_line = text.endswith("\n") and number + 1 < len(texts)
        shown = visible(text).replace("·", "<i>·</i>")
        parts.append(
            f'{may_break}<span class="token" role="option" aria-selected="false" '
            f'tabindex="{-1 if number else 0}">{shown}<sub></sub></span>{"<br>" if ends_line else ""}'
        )
    return "".join(parts)


def scrolled(name: str, content: str) -> str:
    """A box that scrolls sideways by itself, by keyboard too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{name}">{content}</div>'


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in a box that scrolls; cells are HTML already, the first of a row is its heading."""
    heads = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for first, *cells in rows
    )
    inner = f"<table><caption>{caption}</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
    return scrolled(caption, inner)


def details(
    found: Mapping[int, Sequence[tuple[int, Sequence[tuple[str, float, int]]]]], *, opened: int | None = None
) -> str:
    """What experts take, layer by layer to be opened.

    Args:
        found: By layer its experts, each with tokens: text, share of its occurrences, their count.
        opened: The layer that is open at first; None is the last.
    """
    parts = []
    for layer, experts in sorted(found.items()):
        rows = []
        for expert, taken in sorted(experts):
            chips = " ".join(
                f'<span class="chip" title="{share:.0%} of {count:,} occurrences">'
                f"<code>{visible(text)}</code> {share:.0%}</span>"
                for text, share, count in taken
            )
            rows.append((f"expert {expert}", f'<div class="chips">{chips or "–"}</div>'))
        is_open = layer == (max(found) if opened is None else opened)
        inner = table(f"Favourite tokens in layer {layer}", ("Expert", "Token and the share of it"), rows)
        parts.append(
            f'<details data-layer="{layer}"{" open" if is_open else ""}>'
            f"<summary>Layer {layer}</summary>{inner}</details>"
        )
    return "".join(parts)

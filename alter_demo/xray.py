"""The token X-ray for the page, for notebooks, and as a file of its own; drawn in the browser by `static/xray.js`.

Python hands over one JSON value. No text reaches HTML by any other way, so hostile text stays text.
"""

from __future__ import annotations

import json
from importlib.resources import files

from .entropy import PUBLISHED_THRESHOLD
from .tokens import EXPERT_NAMES, QS, TokenRecord

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"  # such a file can ask nobody
STATIC = files(__package__) / "static"


def xray_data(records: list[TokenRecord], config=None) -> dict:
    """What `drawXray` reads. `config`: the run's AlterConfig, None for a method without a router."""
    q = config.q if config else 1.5
    experts, qs = len(records[0].weights) if records else 0, sorted({*QS, q})
    own = qs.index(q) if q not in QS else None  # an order between the slider's: its values are the records' own
    return {
        "names": list(EXPERT_NAMES[:experts]),
        "qs": qs,
        "q": q,
        "threshold": round(config.threshold if config else PUBLISHED_THRESHOLD, 4),
        "tokens": [
            {
                "t": r.token, "id": r.id, "sp": r.special, "S": orders(r, own), "e": r.expert, "w": r.weights,
                "b": r.log_prob, "a": r.log_prob_after, "tb": short(r.top), "ta": short(r.top_after),
                "c": round(r.change, 4),
            }
            for r in records
        ],
    }  # fmt: skip


def orders(record: TokenRecord, own: int | None) -> list[float]:
    """S_q of each order; at place `own` that of the run's q."""
    s = record.entropies
    return s if own is None else [*s[:own], round(record.entropy, 4), *s[own:]]


def short(top: list[tuple[str, float]]) -> list[list]:
    return [[token, round(p, 4)] for token, p in top]


def script() -> str:
    return (STATIC / "xray.js").read_text(encoding="utf-8")


def style() -> str:
    return (STATIC / "xray.css").read_text(encoding="utf-8")


def xray_html(data: dict, title: str = "Token X-ray") -> str:
    """A whole HTML page with the X-ray in it: no request, no other file. For the export, and for a notebook's frame."""
    # "<" never appears in the JSON, so nothing in it can end the script element
    value = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")
    value = value.replace("\u2029", "\\u2029")
    heading = title.replace("&", "&amp;").replace("<", "&lt;")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{heading}</title>
<style>body {{ font-family: system-ui, sans-serif; margin: 1rem; color-scheme: light dark; }}
{style()}</style></head>
<body><h1>{heading}</h1><div id="xray"></div>
<script>{script()}
drawXray(document.getElementById("xray"), {value});</script></body></html>
"""

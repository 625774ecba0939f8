"""The token X-ray for the page, the notebooks and a file of its own. `static/xray.js` draws it.

All text reaches the browser as one JSON value and never as HTML, so hostile text stays text.
"""

import html
import json
from importlib.resources import files

from ..alter import PUBLISHED_THRESHOLD
from .traces import DEFAULT_Q, QS, TokenTrace
from .words import EXPERT_NAMES

STATIC = files(__package__) / "static"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"  # no requests


def xray_data(traces: list[TokenTrace], config=None) -> dict:
    """The JSON value that `drawXray` takes; `config`: the AlterConfig, None without a router."""
    q, threshold = (config.q, config.threshold) if config else (DEFAULT_Q, PUBLISHED_THRESHOLD)
    n_experts = len(traces[0].weights) if traces else 0
    qs = sorted({*QS, q})
    extra = None if q in QS else qs.index(q)  # place of the run's own q on the slider
    return {
        "names": list(EXPERT_NAMES[:n_experts]),
        "qs": qs,
        "q": q,
        "threshold": round(threshold, 4),
        "tokens": [token_data(trace, extra) for trace in traces],
    }


def token_data(trace: TokenTrace, extra: int | None) -> dict:
    """One token for `drawXray`, with short keys, because a text has thousands."""
    entropies = list(trace.entropies)
    if extra is not None:
        entropies.insert(extra, round(trace.entropy, 4))
    return {
        "t": trace.token,
        "id": trace.id,
        "sp": trace.special,
        "S": entropies,
        "e": trace.expert,
        "w": trace.weights,
        "b": trace.log_prob,
        "a": trace.log_prob_after,
        "tb": [[token, round(p, 4)] for token, p in trace.top],
        "ta": [[token, round(p, 4)] for token, p in trace.top_after],
        "c": round(trace.change, 4),
        "g": trace.gate,
    }


def xray_html(data: dict, title: str = "Token X-ray") -> str:
    """A complete HTML page with the X-ray, which needs no other file and sends no request."""
    value, heading = json.dumps(data, ensure_ascii=False), html.escape(title, quote=False)
    for character in "<\u2028\u2029":  # without "<" the JSON cannot end the script element
        value = value.replace(character, f"\\u{ord(character):04x}")
    css, script = ((STATIC / name).read_text(encoding="utf-8") for name in ("xray.css", "xray.js"))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{heading}</title>
<style>body {{ font-family: system-ui, sans-serif; margin: 1rem; color-scheme: light dark; }}
{css}</style></head>
<body><h1>{heading}</h1><div id="xray"></div>
<script>{script}
drawXray(document.getElementById("xray"), {value});</script></body></html>
"""

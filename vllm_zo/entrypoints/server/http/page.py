"""GET /fine-tuning: one page of plain HTML and JavaScript that uses the API like any other client."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

router = APIRouter()

SCRIPTS = ("base.js", "curves.js", "job.js", "create.js", "page.js")
"""In static/, in this order: what a file uses while it is loaded stands in an earlier one."""


@router.get("/fine-tuning", include_in_schema=False)
def page() -> HTMLResponse:
    """The page itself holds no data: it asks for the key, and fetches what the key allows."""
    html, policy = _whole()
    return HTMLResponse(html, headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})


@cache
def _whole() -> tuple[str, str]:
    """The page with style and scripts in it, and its content security policy.

    The page has everything in it, so the policy forbids all else: text of a job or a model that got into it as HTML
    could not run, load anything, or send the key elsewhere.
    """
    script = "\n".join(_text(name) for name in SCRIPTS)
    html = _text("page.html").replace("{style}", _text("style.css")).replace("{script}", script)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy


def _text(name: str) -> str:
    return files(__package__).joinpath("static", name).read_text(encoding="utf-8")

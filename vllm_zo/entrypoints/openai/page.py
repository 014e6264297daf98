"""GET /fine-tuning: one page of plain HTML and JavaScript that uses the API like any other client."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

router = APIRouter()

HEADERS = {
    # Everything is in the page: it loads nothing from elsewhere and talks to this server only.
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}


@router.get("/fine-tuning", include_in_schema=False)
def page() -> HTMLResponse:
    """Holds no data: it asks for the key, and fetches what the key allows."""
    return HTMLResponse(files(__package__).joinpath("page.html").read_text(encoding="utf-8"), headers=HEADERS)

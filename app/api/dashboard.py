"""The dashboard: one page at `/` and its assets. Everything that it shows comes from the API."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from app.dashboard import ASSETS, PAGE

router = APIRouter(tags=["operations"])

# No inline code, no other host; uPlot and dialogs set styles by script, which this allows.
CONTENT_POLICY = "; ".join((
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data:",
    "connect-src 'self'",
    "base-uri 'none'", "form-action 'self'", "frame-ancestors 'none'",
))  # fmt: skip
PAGE_HEADERS = {
    "Content-Security-Policy": CONTENT_POLICY,
    "Cache-Control": "no-cache",  # asked for again, answered with 304 while unchanged
    "Vary": "Accept",
}


@router.get("/", response_class=Response, responses={200: {"content": {"text/html": {}}}})
def index(request: Request) -> Response:
    """The dashboard for browsers; for others, what this is and where to look."""
    if "text/html" in request.headers.get("accept", ""):
        return FileResponse(PAGE, media_type="text/html", headers=PAGE_HEADERS)
    return JSONResponse({
        "service": "nibble",
        "version": request.app.version,
        "links": {"openapi": "/openapi.json", "jobs": "/v1/jobs", "artifacts": "/v1/artifacts",
                  "health": "/healthz", "ready": "/readyz", "metrics": "/metrics"},
    }, headers={"Vary": "Accept"})  # fmt: skip


class Assets(StaticFiles):
    """Files that browsers keep, but ask about each time."""

    def file_response(self, *args: object, **options: object) -> Response:
        answer = super().file_response(*args, **options)  # type: ignore[arg-type]  # passed on as they came
        answer.headers["Cache-Control"] = "no-cache"
        return answer


def install(app: FastAPI) -> None:
    app.include_router(router)
    app.mount("/assets", Assets(directory=ASSETS), name="assets")

"""The dashboard: one page at `/` and its assets. All of its data comes from the API."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from app.dashboard import ASSETS, PAGE, REFERENCE

router = APIRouter(tags=["operations"])

# No inline code and no other host. Styles set by script (uPlot, dialogs) are allowed.
CONTENT_POLICY = "; ".join((
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data:",
    "connect-src 'self'",
    "base-uri 'none'", "form-action 'self'", "frame-ancestors 'none'",
))  # fmt: skip
PAGE_HEADERS = {
    "Content-Security-Policy": CONTENT_POLICY,
    "Cache-Control": "no-cache",  # revalidated on each use; 304 while unchanged
    "Vary": "Accept",
}


@router.get("/", response_class=Response, responses={200: {"content": {"text/html": {}}}})
def index(request: Request) -> Response:
    """The dashboard for browsers, an index of links for other clients."""
    if "text/html" in request.headers.get("accept", ""):
        return FileResponse(PAGE, media_type="text/html", headers=PAGE_HEADERS)
    return JSONResponse({
        "service": "nibble",
        "version": request.app.version,
        "links": {"docs": "/docs", "openapi": "/openapi.json", "jobs": "/v1/jobs",
                  "artifacts": "/v1/artifacts", "health": "/healthz", "ready": "/readyz",
                  "metrics": "/metrics"},
    }, headers={"Vary": "Accept"})  # fmt: skip


@router.get("/docs", include_in_schema=False)
def reference() -> Response:
    """The description of the API as a page for people; it reads `/openapi.json`."""
    return FileResponse(REFERENCE, media_type="text/html", headers=PAGE_HEADERS)


class Assets(StaticFiles):
    """Static files that browsers cache and revalidate on each use."""

    def file_response(self, *args: object, **options: object) -> Response:
        answer = super().file_response(*args, **options)  # type: ignore[arg-type]  # passed on as they came
        answer.headers["Cache-Control"] = "no-cache"
        return answer


def install(app: FastAPI) -> None:
    app.include_router(router)
    app.mount("/assets", Assets(directory=ASSETS), name="assets")

"""The dashboard's page and assets: plain files, served as they are."""

from pathlib import Path

FOLDER = Path(__file__).parent
PAGE = FOLDER / "index.html"
LINK_REFUSED = FOLDER / "link_refused.html"
REFERENCE = FOLDER / "reference.html"
ASSETS = FOLDER / "assets"

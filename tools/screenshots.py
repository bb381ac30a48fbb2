"""Take the screenshots of the explorer and the report in docs/images.

    imvia-graph fit countries --out runs/countries
    imvia-graph fit countries --out runs/texts --set "modalities=[text]"
    imvia-graph pictures runs/countries
    python tools/screenshots.py runs/countries runs/texts

Needs the extras explore, report and browser, and Chromium ($CHROMIUM, or from the PATH).
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import uvicorn
from playwright.sync_api import Page, sync_playwright

import imvia_graph as ig
from imvia_graph.explore import make_app

IMAGES = Path(__file__).parents[1] / "docs" / "images"
QUESTION = "?entity=France&relation=borders"
PORT = 8765


def main(*folders: str) -> None:
    """Take all screenshots."""
    runs = [ig.load(folder, "cpu") for folder in folders]
    server = uvicorn.Server(uvicorn.Config(make_app(runs[0]), port=PORT, log_level="warning"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.1)
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])

        def opened(url: str, width: int, height: int, scheme: str) -> Page:
            context = browser.new_context(
                viewport={"width": width, "height": height},
                color_scheme=scheme,
                reduced_motion="reduce",
            )
            page = context.new_page()
            page.goto(url)
            page.wait_for_load_state("networkidle")
            return page

        explorer = f"http://127.0.0.1:{PORT}/{QUESTION}"
        opened(explorer, 1200, 900, "light").screenshot(path=IMAGES / "explore.png")
        opened(explorer, 375, 800, "dark").screenshot(path=IMAGES / "explore-phone.png")
        report = ig.write_report(runs, Path(folder) / "report.html").as_uri()
        for name, section, height, scheme in (
            ("report-metrics.png", "Metrics", 1000, "light"),
            ("report-gallery.png", "Gallery", 900, "dark"),
        ):
            page = opened(report, 1200, height, scheme)
            page.get_by_role("heading", name=section, exact=True).evaluate(
                "h => h.scrollIntoView()"
            )
            page.screenshot(path=IMAGES / name)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])

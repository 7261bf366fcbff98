"""Opens every page of a built site in a headless Chromium, on a wide and on a narrow screen. Fails where a page has an error
in its console, asks for what is not there, or is wider than a narrow screen.

    python .ci/site/open_pages.py build/site [SCREENSHOTS]
"""

from __future__ import annotations

import http.server
import os
import shutil
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, TimeoutError, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 400, "height": 800}


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def browser_path() -> str:
    named = os.environ.get("CHROMIUM")
    found = named or next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        sys.exit("no Chromium is installed (apt-get install chromium); CHROMIUM names one that is elsewhere")
    return found


def opened(page: Page, address: str) -> list[str]:
    """What is wrong with a page."""
    problems: list[str] = []
    hearing = {
        "console": lambda message: message.type == "error" and problems.append(message.text),
        "pageerror": lambda error: problems.append(str(error)),
        "requestfailed": lambda request: problems.append(f"{request.url}: {request.failure}"),
        "response": lambda answer: answer.status >= 400 and problems.append(f"{answer.url}: {answer.status}"),
    }
    for event, hear in hearing.items():
        page.on(event, hear)  # type: ignore[call-overload]
    page.set_viewport_size(WIDE)
    page.goto(address, wait_until="networkidle")
    page.set_viewport_size(NARROW)
    try:  # the page may have to be laid out first
        page.wait_for_function(
            "document.documentElement.scrollWidth <= document.documentElement.clientWidth", timeout=5000
        )
    except TimeoutError:
        problems.append(f"it is wider than a screen of {NARROW['width']} pixels")
    page.set_viewport_size(WIDE)
    for event, hear in hearing.items():
        page.remove_listener(event, hear)
    return problems


def main(site: str, pictures: str | None = None) -> int:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pages = sorted(path.relative_to(site) for path in Path(site).rglob("*.html") if path.name != "404.html")
    bad = 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        page = browser.new_page()
        for path in pages:
            problems = opened(page, f"http://127.0.0.1:{server.server_port}/{path.as_posix()}")
            bad += bool(problems)
            for problem in problems:
                print(f"{path}: {problem}")
            if pictures is not None:
                name = str(path.parent).replace("/", "_").strip(".") or "start"
                page.screenshot(path=Path(pictures, f"{name}.png"), full_page=True)
        browser.close()
    server.shutdown()
    print(f"{len(pages)} pages opened, {bad} with problems")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

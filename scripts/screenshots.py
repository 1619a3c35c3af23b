"""Pictures of a finished report, by headless Chromium.

python -m scripts.screenshots RUN                the two small pictures of the README: docs/images/index.png and 07.png
python -m scripts.screenshots RUN --all FOLDER   every page at laptop and phone width and as PDF, to be looked at
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lib.report.pdf import print_page, run_browser
from lib.runs.files import PROJECT, reports_folder


def shoot(page: Path, output: Path, width: int, height: int, scale: float = 1.0) -> None:
    """A picture of the top `height` pixels of a page at `width` pixels."""
    run_browser(
        page, f"--window-size={width},{height}", f"--force-device-scale-factor={scale}", f"--screenshot={output}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="name of a finished run")
    parser.add_argument("--all", type=Path, metavar="FOLDER", help="every page, laptop, phone and PDF")
    arguments = parser.parse_args()
    folder = reports_folder() / arguments.run
    pages = sorted(folder.glob("*.html"))
    if not pages:
        sys.exit(f"No page in {folder}: run make report first.")
    if arguments.all:
        arguments.all.mkdir(parents=True, exist_ok=True)
        for page in pages:
            shoot(page, arguments.all / f"{page.stem}-laptop.png", 1280, 5000)
            shoot(page, arguments.all / f"{page.stem}-phone.png", 390, 8000)
            print_page(page, arguments.all / f"{page.stem}.pdf")
        print(arguments.all)
        return
    images = PROJECT / "docs" / "images"
    images.mkdir(parents=True, exist_ok=True)
    last = next((page for page in pages if page.stem.startswith("07")), None)
    for page, name in ((folder / "index.html", "index.png"), (last, "07.png")):
        if page is not None and page.is_file():
            shoot(page, images / name, 1000, 1250, 0.8)
            print(images / name)


if __name__ == "__main__":
    main()

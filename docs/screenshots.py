"""The pictures of these pages, from the quickstart's own output: the inspect page, the report, a merge's coefficients.

    python examples/quickstart.py && fusechat-fuse run quickstart-output/recipe.yml && python docs/screenshots.py

Needs chromium; writes docs/images, under 1 MB together.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

IMAGES = Path(__file__).parent / "images"


def photograph(page: Path, name: str, height: int) -> None:
    """The first `height` pixels of a page, in 128 colours."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "page.png")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size=1100,{height}"]
        command = ["chromium", *flags, f"--screenshot={raw}", page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True)
        compress(raw, name)


def compress(picture: Path, name: str) -> None:
    """A picture at most 1100 pixels wide, in 128 colours."""
    with Image.open(picture) as image:
        image.thumbnail((1100, 2000))
        image.convert("RGB").quantize(128).save(IMAGES / f"{name}.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", type=Path, default=Path("quickstart-output"), help="what the quickstart wrote")
    parser.add_argument("--row", default="capitals-273", help="conversation of the inspect page")
    folder = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        page = Path(work, "page.html")
        aligned = folder.quickstart / "aligned" / "fusechat-words"
        command = ["fusechat-fuse", "inspect", str(aligned), "--row", folder.row, "--html", str(page)]
        subprocess.run(command, check=True, capture_output=True)
        photograph(page, "inspect", 560)
    photograph(folder.quickstart / "run" / "report.html", "report", 820)
    compress(min((folder.quickstart / "run" / "merged" / "reports").rglob("coefficients.png")), "coefficients")


if __name__ == "__main__":
    main()

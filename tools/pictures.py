"""Take the README's pictures: an excerpt of each page in light colours, as a small PNG.

python3 tools/pictures.py .demo/report.html .demo/evaluation.html --output_dir docs/pictures
"""

import argparse
import io
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image, ImageChops

from llama_lora.cli import InputError, one_line_errors
from llama_lora.corpus.records.atomic_files import replacing
from llama_lora.options import Help
from llama_lora.report.html_frame import digest

WIDTH, TALLEST, BELOW = 760, 4000, 28  # of a page, and under its end; in CSS pixels
SCALE = 2  # PNG pixels in one of CSS
EXACT, BETWEEN = 24, 32  # colours: of areas and lines, and those that smooth the letters
LARGEST = 150_000  # bytes
PREFER_LIGHT = "--blink-settings=preferredColorScheme=1"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]

# A picture is no place to read on: some examples, and little space between them.
EXCERPT = """
header .note, .figures div:nth-child(n + 5), .flow :is(th, td):nth-child(n + 6), .why,
table:not(.flow), .scroll + .note, .facts, section:has(> h2 + .facts),
:is(.charts, .looks) figure:nth-of-type(n + 3), .looks ~ :is(h3, .looks),
.index, .index ~ h3, .asked ~ .asked {
  display: none;
}
header { padding-top: 1.75rem; }
section { margin-top: 2rem; }
section:last-child { margin-bottom: 0; }
.charts { margin-bottom: 1rem; gap: 2rem; }
.tick, .unit { font-size: 13px; }
.figures { gap: 1.75rem; }
.panes { height: calc(20rem + 2px); margin-bottom: 0; }
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("pages", type=Path, nargs="+", help="pages of inspect_data.py --html and of evaluate.py")
    add("--output_dir", type=Path, required=True, help="for report.png of report.html, and so on")
    return parser.parse_args()


@one_line_errors
def main(args: argparse.Namespace) -> None:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for page in args.pages:
        picture = args.output_dir / f"{page.stem}.png"
        size = write(picture, trimmed(photograph(excerpt(page))))
        print(f"{picture}: {size:,} bytes")


def excerpt(page: Path) -> str:
    """The page with a style that leaves out most of it, which its policy allows.

    Raises:
        InputError: it cannot be read, or is no page of ours.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{page}: cannot be read: {error}; make demo writes it") from None
    style = text.partition("<style>")[2].partition("</style>")[0]
    if digest(style) not in text:
        raise InputError(f"{page}: expected a page of inspect_data.py or evaluate.py")
    return text.replace(digest(style), digest(style + EXCERPT)).replace(style, style + EXCERPT, 1)


def photograph(page: str) -> Image.Image:
    """What Chromium shows of it, with the empty space below.

    Raises:
        InputError: Chromium is missing, or took no picture.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        raise InputError("Chromium is missing: make browser")
    with TemporaryDirectory() as folder:
        source, picture = Path(folder, "page.html"), Path(folder, "page.png")
        source.write_text(page, encoding="utf-8")
        command = [chromium, *FLAGS, PREFER_LIGHT, f"--force-device-scale-factor={SCALE}"]
        command += [f"--window-size={WIDTH},{TALLEST}", f"--user-data-dir={folder}/profile"]
        command += [f"--screenshot={picture}", source.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True)
        if not picture.is_file():
            raise InputError(f"Chromium took no picture: {done.stderr}")
        return Image.open(picture).convert("RGB")


def trimmed(image: Image.Image) -> Image.Image:
    """The image without what is empty at its end, except for a margin."""
    paper = Image.new("RGB", image.size, image.getpixel((0, 0)))
    box = ImageChops.difference(image, paper).getbbox()
    end = box[3] if box else 0
    return image.crop((0, 0, image.width, min(end + round(BELOW * SCALE), image.height)))


def compressed(image: Image.Image) -> bytes:
    """A PNG with a palette: the commonest colours as they are, so that areas and lines keep theirs,
    and such as lie widely apart for the rest."""
    counted = sorted(image.getcolors(image.width * image.height), reverse=True)
    colours = [part for _, colour in counted[:EXACT] for part in colour]
    spread = image.quantize(BETWEEN, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    palette = Image.new("P", (1, 1))
    palette.putpalette(colours + spread.getpalette()[: 3 * BETWEEN])
    made = io.BytesIO()
    image.quantize(palette=palette, dither=Image.Dither.NONE).save(made, "PNG", optimize=True)
    return made.getvalue()


def write(picture: Path, image: Image.Image) -> int:
    """Write the image, and return its bytes.

    Raises:
        InputError: there are more than a README should load.
    """
    data = compressed(image)
    if len(data) > LARGEST:
        raise InputError(
            f"{picture}: {len(data):,} bytes, expected at most {LARGEST:,}: let EXCERPT in "
            "tools/pictures.py leave out more"
        )
    with replacing(str(picture)) as file:
        file.write(data)
    return len(data)


if __name__ == "__main__":
    main(parse_args())

"""The README's pictures: they are there and small, and the command that takes them works."""

import runpy
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from llama_lora.cli import InputError
from tests.browser import needs_chromium, opened
from tests.conftest import ROOT, error_line, run_here, shipped
from tests.corpora import save, save_lines
from tests.eval.evaluation import adapted, evaluate
from tests.report.inspected import inspect

SCRIPT = ROOT / "tools" / "pictures.py"
pictures = SimpleNamespace(**runpy.run_path(str(SCRIPT)))  # tools/ is not installed
NAMES = ["evaluation", "report"]
LARGEST = 150_000  # bytes, which a README loads at once
PAPER = (0xFA, 0xF9, 0xF6)  # of the pages, in light colours
CLOSE = 4  # of 255: Pillow looks colours up in steps of this


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_there_and_small(name):
    path = ROOT / "docs" / "pictures" / f"{name}.png"
    assert path.stat().st_size <= LARGEST
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert near(pixels(picture)[0, 0], PAPER)


def pixels(picture) -> np.ndarray:
    """Its colours, (height, width, 3) int."""
    return np.asarray(picture.convert("RGB")).astype(int)


def near(found, colour) -> np.ndarray:
    """Whether each colour looks like that one."""
    return (abs(found - np.array(colour)) <= CLOSE).all(-1)


@pytest.fixture(scope="module")
def pages(tmp_path_factory, tiny_base):
    """The folder of a page of each kind, on a corpus that a stage has cleaned."""
    folder = tmp_path_factory.mktemp("pages")
    raw, clean = folder / "raw.json", folder / "clean.json"
    save(raw, [*shipped("dummy_en.json")[:12], 42])
    questions = [{"question_id": n, "category": str(n), "text": f"Are you {n}?"} for n in range(2)]
    for done in (
        run_here("fastchat/data/clean_sharegpt.py", "--in", raw, "--out", clean, "--workers", 1),
        inspect("--in", clean, "--model-name", tiny_base, "--html", folder / "report.html"),
        evaluate(
            *("--base_model", tiny_base, "--lora_weights", adapted(tiny_base, folder / "adapter")),
            *("--questions", save_lines(folder / "q.jsonl", questions), "--max_new_tokens", 8),
            *("--data_path", clean, "--output_dir", folder),
        ),
    ):
        assert done.returncode == 0, done.stderr
    return folder


@needs_chromium
def test_pictures_are_taken_in_light_colours(pages, tmp_path):
    done = run_here(SCRIPT, *pages.glob("*.html"), "--output_dir", tmp_path / "new" / "pictures")
    assert done.returncode == 0, done.stderr
    found = sorted((tmp_path / "new" / "pictures").iterdir())
    assert [path.name for path in found] == [f"{name}.png" for name in NAMES]
    for path in found:
        assert f"{path}: {path.stat().st_size:,} bytes" in done.stdout
        with Image.open(path) as picture:
            seen = pixels(picture)
        assert seen.shape[1] == pictures.WIDTH * pictures.SCALE
        assert len(seen) < pictures.TALLEST * pictures.SCALE
        drawn = (~near(seen, PAPER)).any(axis=1).nonzero()[0]
        margin = len(seen) - 1 - drawn[-1]
        assert margin == pytest.approx(pictures.BELOW * pictures.SCALE, abs=1)


@needs_chromium
@pytest.mark.parametrize(
    ("name", "shown", "left_out"),
    [
        ("report", [".figures", ".flow", ".panes"], [".why", ".facts", ".charts ~ .scroll > *"]),
        ("evaluation", [".verdict", ".looks", ".asked"], [".index", ".facts", ".asked ~ .asked"]),
    ],
)
def test_an_excerpt_is_a_page_without_some_of_it(pages, tmp_path, name, shown, left_out):
    path = tmp_path / "excerpt.html"
    path.write_text(pictures.excerpt(pages / f"{name}.html"), encoding="utf-8")
    with opened(path, tmp_path / "profile") as page:
        for selector in shown + left_out:
            those = f"[...document.querySelectorAll({selector!r})]"
            visible = page.run(f"{those}.map(element => element.checkVisibility())")
            assert visible, selector
            assert any(visible) is (selector in shown), selector
        assert not page.complaints


def test_areas_keep_their_colours(tmp_path):
    """However many shades there are beside them, as where letters are smoothed."""
    seen = np.random.default_rng(0).integers(0, 256, (240, 100, 3), np.uint8)
    areas = [(250, 249, 246), (215, 236, 232), (248, 229, 218), (227, 224, 216)]
    for number, colour in enumerate(areas):
        seen[60 * number : 60 * number + 55] = colour
    path = tmp_path / "areas.png"
    pictures.write(path, Image.fromarray(seen))
    with Image.open(path) as picture:
        assert picture.mode == "P"
        found = pixels(picture)
    for colour in areas:
        assert near(found[(seen == colour).all(-1)], colour).all()


def test_a_picture_that_is_too_large_leaves_the_old_one(tmp_path):
    path = tmp_path / "noise.png"
    path.write_bytes(b"old")
    noise = np.random.default_rng(0).integers(0, 256, (500, 500, 3), np.uint8)
    with pytest.raises(InputError, match=r"noise\.png: [\d,]+ bytes, expected at most 150,000"):
        pictures.write(path, Image.fromarray(noise))
    assert path.read_bytes() == b"old"


def test_what_is_no_page_is_refused(tmp_path):
    other = tmp_path / "other.html"
    other.write_text("<style>p { color: red; }</style>")
    for path in (other, tmp_path / "missing.html"):
        done = run_here(SCRIPT, path, "--output_dir", tmp_path)
        assert f"error: {path}: " in error_line(done)


def test_without_chromium_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="make browser"):
        pictures.photograph("")

"""What the pages have in common: each is one HTML file without network access or foreign code.

`frame.html` is their head and header; the templates of the pages extend it.
"""

import base64
import hashlib
from importlib import resources

import jinja2

from llama_lora.report.terminal import visible

PACKAGE = "llama_lora"


def environment() -> jinja2.Environment:
    """Jinja that escapes whatever it prints, with filters for numbers.

    A template is named by its path in this library, such as `report/page.html`.
    """
    made = jinja2.Environment(
        loader=jinja2.PackageLoader(PACKAGE, ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters.update(number="{:,}".format, percent="{:.1%}".format, visible=visible)
    return made


def part(path: str) -> str:
    """The text of a file of this library."""
    return resources.files(PACKAGE).joinpath(path).read_text(encoding="utf-8")


def policy(style: str, script: str | None = None) -> str:
    """The content security policy: only this style and this script, and no address at all."""
    scripts = f"script-src '{digest(script)}'; " if script else ""
    return (
        f"default-src 'none'; style-src '{digest(style)}'; {scripts}"
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def digest(text: str) -> str:
    """How a policy names an inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

"""The documents, and what tests take out of them: examples to run, outputs to compare, and everything that is named."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DEPLOYMENT = ROOT / "deploy" / "README.md"
RUNBOOK = ROOT / "deploy" / "RUNBOOK.md"
DEMO = ROOT / "kino_refunds" / "demo" / "README.md"
PUBLISHING = ROOT / "kino_refunds" / "events" / "README.md"
LEDGER = ROOT / "kino_refunds" / "ledger" / "README.md"
FAULTS = ROOT / "tests" / "faults" / "README.md"
CHANGELOG = ROOT / "CHANGELOG.md"
PAGES = [
    README,
    *sorted(page for folder in ("deploy", "kino_refunds", "tests") for page in (ROOT / folder).rglob("*.md")),
]
"""Every document but the changelog, which may name what is gone."""


def text_of(page: Path) -> str:
    """Return a document as it is."""
    return page.read_text(encoding="utf-8")


def example(page: Path, name: str) -> str:
    """Return the code behind the marker `<!-- example: name -->`."""
    return _behind(page, f"example: {name}", r"\w+")


def block(page: Path, name: str) -> str:
    """Return the output behind the marker `<!-- name -->`."""
    return _behind(page, name, "")


def rewrite(page: Path, name: str, text: str) -> None:
    """Put `text` in the place of the output behind the marker `<!-- name -->`."""
    text = "".join(f"{line.rstrip()}\n" for line in text.splitlines())
    old, new = (f"<!-- {name} -->\n```\n{each}```" for each in (block(page, name), text))
    page.write_text(text_of(page).replace(old, new), encoding="utf-8")


def _behind(page: Path, marker: str, language: str) -> str:
    found = re.search(rf"<!-- {re.escape(marker)} -->\n```{language}\n(.*?)```", text_of(page), re.DOTALL)
    assert found is not None, f"{page} has no block behind <!-- {marker} -->"
    return found[1]


_FENCED = re.compile(r"^ *```\w*\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """Return a document without its blocks of code and output."""
    return _FENCED.sub("", text_of(page))


def blocks(page: Path) -> list[str]:
    """Return a document's blocks of code and output."""
    return _FENCED.findall(text_of(page))


def spans(page: Path) -> list[str]:
    """Return what stands between backticks in the prose; a span may go over a line's end."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def links(page: Path) -> list[str]:
    """Return where the links in the prose lead, but for those to other sites."""
    found: list[str] = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [link for link in found if "://" not in link]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a document's headings."""
    headings: list[str] = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^a-z0-9_ -]", "", heading.lower()).replace(" ", "-") for heading in headings}

"""Checks a site that was built: every link within it leads to a page and a place there, and every picture has a text.

    python docs/check.py docs/_build

Links that lead out are counted, not followed, as that needs a network:

    sphinx-build -b linkcheck -D nb_execution_mode=off -c docs . docs/_build/links
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The places, links and pictures of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.pictures: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids |= {found[name] for name in ("id", "name") if name in found}
        if tag == "img":
            self.pictures.append((found.get("src", ""), found.get("alt", "")))
        if tag in ("a", "link", "img", "script"):
            self.links += [found[name] for name in ("href", "src") if found.get(name)]


def check(site: Path) -> list[str]:
    """What is wrong, a line each."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    if not pages:
        return [f"{site}: no pages"]
    faults, outside = [], 0
    for path, page in pages.items():
        here = path.relative_to(site)
        faults += [
            f"{here}: no text for {src}" for src, alt in page.pictures if not alt or alt in (src, Path(src).name)
        ]
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                outside += 1
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                faults.append(f"{here}: {link} leads nowhere")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                faults.append(f"{here}: {link}: there is no such place on that page")
    links = sum(len(page.links) for page in pages.values())
    pictures = sum(len(page.pictures) for page in pages.values())
    print(f"{len(pages)} pages, {links - outside} links within, {outside} that lead out, {pictures} pictures")
    return list(dict.fromkeys(faults))


if __name__ == "__main__":
    found = check(Path(sys.argv[1]).resolve())
    print(*found, sep="\n")
    sys.exit(bool(found))

"""The help pages in the help panel of a real browser: in English and in Chinese, with their pictures."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.host

DOCS = Path(__file__).resolve().parent.parent.parent / "web" / "docs"
NODES = sorted(path.stem for path in DOCS.glob("*.md"))


def help_of(page, node, file):
    """The help panel's words and pictures for a node, once it shows that file: a click on the node, and one on the info button above it."""
    page.page.evaluate(
        """(type) => { app.graph.clear(); app.canvas.ds.reset(); const node = LiteGraph.createNode(type); app.graph.add(node);
        node.pos = [850, 300]; app.canvas.setDirty(true, true); }""", node,
    )
    page.page.wait_for_timeout(700)
    page.page.mouse.click(1000, 285)
    page.page.locator("[data-testid=info-button]").first.click(timeout=15_000)
    heading = file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    titled = "(heading) => [...document.querySelectorAll('.node-help-content h1')].some((title) => title.innerText === heading)"
    page.page.wait_for_function(titled, arg=heading, timeout=15_000)
    page.page.wait_for_function("() => [...document.querySelectorAll('.node-help-content img')].every((image) => image.complete)", timeout=15_000)
    return page.page.evaluate(
        """() => { const content = document.querySelector(".node-help-content");
        return { words: content.innerText, pictures: [...content.querySelectorAll("img")].map((image) => [image.src, image.naturalWidth]) }; }"""
    )


@pytest.mark.parametrize("locale", ["en", "zh"])
def test_every_help_page_is_shown_with_its_pictures(page, locale):
    page.server.post("/settings", {"Comfy.Locale": locale})
    try:
        page.reload()
        for node in NODES:
            file = DOCS / (f"{node}.md" if locale == "en" else f"{node}/zh.md")
            shown = help_of(page, node, file)
            named = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", file.read_text(encoding="utf-8"))
            assert named and [source.split("/docs/")[1] for source, _ in shown["pictures"]] == named
            assert all(width > 300 for _, width in shown["pictures"]), "each has come"
            assert (locale == "zh") == bool(re.search("[\u4e00-\u9fff]", shown["words"]))
            if node == NODES[1]:
                page.picture(f"help-{locale}")
    finally:
        page.server.post("/settings", {"Comfy.Locale": "en"})
    assert page.errors == []

"""Writes the repository's public addresses into pyproject.toml: python tools/registry.py https://github.com/<owner>/<name>

The Comfy Registry shows icon and banner from an address, not from the archive. --check only looks, before publishing.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

FILE = Path(__file__).resolve().parent.parent / "pyproject.toml"
PICTURES = {"Icon": "assets/icon.png", "Banner": "assets/banner.png"}
BRANCH = "main"
_REPOSITORY = re.compile(r"https://github\.com/([A-Za-z0-9-]+/[A-Za-z0-9._-]+?)(?:\.git)?/?")


def with_addresses(text: str, repository: str) -> str:
    """pyproject.toml's text with the addresses of a GitHub repository, in place of any there; ValueError if it is not one."""
    match = _REPOSITORY.fullmatch(repository)
    if not match:
        raise ValueError(f"not the address of a GitHub repository: {repository}")
    home = f"https://github.com/{match[1]}"
    urls = f'[project.urls]\nRepository = "{home}"\nDocumentation = "{home}#readme"\nIssues = "{home}/issues"\n\n'
    text = re.sub(r"^\[project\.urls\]\n(?:\w.*\n)*\n*", "", text, flags=re.MULTILINE)
    text = re.sub(r"^(?:#.*\n)*\[tool\.comfy\]", lambda start: urls + start[0], text, count=1, flags=re.MULTILINE)
    for key, path in PICTURES.items():
        text = re.sub(rf'^{key} = ".*"', f'{key} = "https://raw.githubusercontent.com/{match[1]}/{BRANCH}/{path}"', text, flags=re.MULTILINE)
    return text


def missing(text: str) -> list[str]:
    """The entries that are not addresses yet."""
    return [key for key in ("Repository", *PICTURES) if not re.search(rf'^{key} = "https://', text, re.MULTILINE)]


def main(arguments: list[str]) -> int:
    text = FILE.read_text(encoding="utf-8")
    if arguments == ["--check"]:
        lacking = missing(text)
        if lacking:
            print(f"pyproject.toml has no address yet for {', '.join(lacking)}: run python tools/registry.py https://github.com/<owner>/<name>")
        return 1 if lacking else 0
    if len(arguments) != 1:
        print(__doc__)
        return 2
    FILE.write_text(with_addresses(text, arguments[0]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What the Comfy Registry and ComfyUI-Manager read of the pack: pyproject.toml, the archive's files, the pictures, the workflows of GitHub."""

import importlib
import json
import re
import subprocess
import sys

import pytest
import yaml
from load_pack import ROOT
from PIL import Image

tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
registry = importlib.import_module("registry")
TEXT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PROJECT = tomllib.loads(TEXT)["project"]
COMFY = tomllib.loads(TEXT)["tool"]["comfy"]
# https://docs.comfy.org/registry/specifications: one entry that is none of these, and the registry drops them all.
SYSTEMS = ("Microsoft", "POSIX", "MacOS", "OS Independent")
ACCELERATORS = {"GPU :: NVIDIA CUDA", "GPU :: AMD ROCm", "GPU :: Intel Arc", "NPU :: Huawei Ascend", "GPU :: Apple Metal"}


def lines(path):
    return [line for line in (ROOT / path).read_text(encoding="utf-8").splitlines() if line.strip() and not line.startswith("#")]


def test_the_name_the_version_and_the_publisher_are_such_as_the_registry_takes():
    assert re.fullmatch(r"[a-z](?:[a-z0-9]|[._-](?=[a-z0-9]))*", PROJECT["name"]) and "comfy" not in PROJECT["name"] and len(PROJECT["name"]) < 100
    assert re.fullmatch(r"\d+\.\d+\.\d+", PROJECT["version"])
    assert re.fullmatch(r"[a-z0-9-]+", COMFY["PublisherId"]) and COMFY["DisplayName"]
    assert (ROOT / PROJECT["license"]["file"]).is_file() and (ROOT / PROJECT["readme"]).is_file()


def test_the_version_is_the_newest_of_the_changelog():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == PROJECT["version"]


def test_comfyui_versions_are_in_the_form_that_is_read():
    assert re.fullmatch(r">=\d+\.\d+\.\d+", COMFY["requires-comfyui"])


def test_every_classifier_is_one_that_the_registry_knows():
    for classifier in PROJECT["classifiers"]:
        kind, _, value = classifier.partition(" :: ")
        assert value.startswith(SYSTEMS) if kind == "Operating System" else kind == "Environment" and value in ACCELERATORS, classifier


def test_torch_and_triton_are_never_installed():
    """ComfyUI brings its own; Manager installs requirements.txt, and the registry reads pyproject.toml: both say the same."""
    assert lines("requirements.txt") == PROJECT["dependencies"]
    names = {re.split(r"[^A-Za-z0-9_-]", line)[0].lower().replace("_", "-") for line in lines("requirements.txt")}
    assert names and not {name for name in names if name.startswith(("torch", "triton", "pytorch"))}


def test_the_pictures_have_the_sizes_that_the_registry_asks_for():
    assert registry.PICTURES.keys() <= COMFY.keys()
    for key, path in registry.PICTURES.items():
        assert COMFY[key].endswith(path) and (ROOT / path).stat().st_size < 100_000
    with Image.open(ROOT / registry.PICTURES["Icon"]) as icon:
        assert icon.width == icon.height <= 400
    with Image.open(ROOT / registry.PICTURES["Banner"]) as banner:
        assert banner.width * 9 == banner.height * 21


def test_the_folder_of_the_browser_side_is_named_once():
    """Named in pyproject.toml as well, every script would be served, and run, twice."""
    assert "web" not in COMFY


def files(*selection):
    """The checkout's files that git lists."""
    asked = subprocess.run(["git", "ls-files", "-z", *selection], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=True)
    return set(asked.stdout.split("\0")) - {""}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_the_archive_holds_what_runs_and_nothing_else():
    """The archive is git's tracked files without .comfyignore's; a file that is about to be added has to fit as well."""
    tracked = files("--cached")
    everything = tracked | files("--others", "--exclude-standard")
    shipped = everything - files("--cached", "--others", "--ignored", "--exclude-from=.comfyignore")
    needed = {"__init__.py", "LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "requirements.txt"}
    rooms = ("assets/", "attention/", "docs/", "kernels/", "locales/", "nodes/", "subgraphs/", "web/", "workflows/")
    assert needed | {path for path in everything if path.startswith(rooms)} <= shipped
    assert [path for path in shipped & tracked if not path.startswith(rooms) and path not in needed] == []
    assert all(any(path.startswith(room) for path in shipped) for room in rooms if (ROOT / room).is_dir())


ADDRESS = "https://github.com/someone/sparse-video-attention"


@pytest.mark.parametrize("given", [ADDRESS, ADDRESS + ".git", ADDRESS + "/"])
def test_the_command_writes_the_addresses_and_nothing_else(given):
    written = registry.with_addresses(TEXT, given)
    data, before = tomllib.loads(written), tomllib.loads(TEXT)
    assert data["project"].pop("urls") == {"Repository": ADDRESS, "Documentation": f"{ADDRESS}#readme", "Issues": f"{ADDRESS}/issues"}
    raw = "https://raw.githubusercontent.com/someone/sparse-video-attention/main/assets"
    assert (data["tool"]["comfy"].pop("Icon"), data["tool"]["comfy"].pop("Banner")) == (f"{raw}/icon.png", f"{raw}/banner.png")
    before["project"].pop("urls", None)
    del before["tool"]["comfy"]["Icon"], before["tool"]["comfy"]["Banner"]
    assert data == before
    assert registry.with_addresses(written, given) == written
    assert registry.missing(written) == []


def test_publishing_waits_for_the_addresses():
    bare = re.sub(r'"https://[^"]*"', '"assets/x.png"', registry.with_addresses(TEXT, ADDRESS))
    assert registry.missing(bare) == ["Repository", "Icon", "Banner"]
    with pytest.raises(ValueError, match="not the address"):
        registry.with_addresses(TEXT, "assets/icon.png")


def workflow(name):
    """The steps of all jobs, and when they run; YAML reads the key "on" as true."""
    data = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))
    return data, [step for job in data["jobs"].values() for step in job["steps"]]


def test_github_runs_the_tests_on_the_oldest_and_a_newer_python():
    data, steps = workflow("test.yml")
    assert {"push", "pull_request"} <= data[True].keys()
    assert "make test" in [step.get("run") for step in steps]
    pythons = data["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert min(pythons, key=lambda python: int(python.split(".")[1])) == PROJECT["requires-python"].removeprefix(">=") and len(pythons) > 1


def test_github_publishes_when_pyproject_changes_and_has_addresses():
    data, steps = workflow("publish.yml")
    assert data[True]["push"] == {"branches": [registry.BRANCH], "paths": ["pyproject.toml"]}
    *before, publish = steps
    assert "python3 tools/registry.py --check" in [step.get("run") for step in before]
    assert publish["uses"] == "Comfy-Org/publish-node-action@main"
    assert publish["with"] == {"personal_access_token": "${{ secrets.REGISTRY_ACCESS_TOKEN }}"}


# ---- the help pages: web/docs/<NodeId>.md, and <NodeId>/<locale>.md where there is one ----

DOCS = ROOT / "web" / "docs"
NODES = json.loads((ROOT / "tests" / "snapshots" / "nodes.json").read_text(encoding="utf-8"))
PAGES = [DOCS / f"{node}{end}" for node in NODES for end in (".md", "/zh.md")]
every_page = pytest.mark.parametrize("page", PAGES, ids=[path.relative_to(DOCS).as_posix() for path in PAGES])


def images(page):
    return re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", page.read_text(encoding="utf-8"))


def test_every_help_page_is_of_a_node():
    assert {*DOCS.glob("*.md"), *DOCS.glob("*/*.md")} == set(PAGES)


@every_page
def test_a_help_page_tells_every_input_and_has_a_picture(page):
    words = page.read_text(encoding="utf-8")
    node = page.stem if page.stem in NODES else page.parent.name
    assert words.startswith("# ") and "�" not in words
    assert [slot["id"] for slot in NODES[node]["inputs"] if f"**{slot['id']}**" not in words] == []
    assert images(page)


@every_page
def test_the_pictures_of_a_help_page_are_where_the_help_panel_looks_for_them(page):
    """Below web/docs/, whatever the language: the panel puts that folder's address before every relative one. Links it leaves as they are."""
    for words, address in images(page):
        assert words and re.fullmatch(r"pictures/\w+\.png", address) and (DOCS / address).is_file()
    links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)]*)\)", page.read_text(encoding="utf-8"))
    assert all(link.startswith("https://") for link in links)


def test_the_pictures_of_the_help_pages_are_small_and_all_are_used():
    used = {DOCS / address for page in PAGES for _, address in images(page)}
    assert used == set((DOCS / "pictures").iterdir())
    for path in used:
        assert path.stat().st_size < 150_000
        with Image.open(path) as picture:
            assert picture.format == "PNG" and 300 < picture.width < 1200

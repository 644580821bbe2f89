"""A running ComfyUI with the pack and tiny models, and a real browser on it.

Needs COMFYUI_PATH, playwright (`pip install playwright`) and a Chromium: CHROMIUM names one, else one on the PATH or playwright's own
is taken. What is missing is named where tests are skipped. Screenshots go to output/browser/.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from comfy_server import ComfyServer, python_of_host

TESTS = Path(__file__).resolve().parent.parent
sys.path.append(str(TESTS / "browser"))
PICTURES = TESTS.parent / "output" / "browser"
# No space in it: the host serves no scripts from a folder with one.
FOLDER = "any-folder-name"
# What the frontend puts before a person when something is wrong: missing nodes and models, failed runs, dialogs.
TROUBLE = "[data-testid=error-overlay], [role=dialog], [role=alertdialog], .p-toast-message-error, .p-toast-message-warn"
_QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync")


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    named = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as running:
        if named is None and not Path(running.chromium.executable_path).exists():
            pytest.skip("there is no Chromium: CHROMIUM names none, the PATH has none, and playwright has not installed one")
        started = running.chromium.launch(executable_path=named, args=list(_QUIET))
        yield started
        started.close()


@pytest.fixture(scope="session")
def server(browser, tmp_path_factory):
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.skip("COMFYUI_PATH names no ComfyUI checkout")
    comfyui, base = Path(path).expanduser().resolve(), tmp_path_factory.mktemp("comfyui")
    writing = [python_of_host(), str(TESTS / "tiny_models.py"), str(comfyui), str(base / "models" / "diffusion_models")]
    done = subprocess.run(writing, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # tensors this small only wait for one another's threads
        with ComfyServer(comfyui, base, FOLDER, nodes=(TESTS / "host_nodes",)) as running:
            yield running


@pytest.fixture(scope="session", params=[False, True], ids=["classic canvas", "Nodes 2.0"])
def design(request):
    """Whether nodes are drawn in the new design."""
    return request.param


class Page:
    """ComfyUI in a tab of its own, as a person has it open."""

    def __init__(self, server, context, design, name):
        self.server, self.design, self._name, self.errors = server, design, name, []
        self.page = context.new_page()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        server.post("/settings", {"Comfy.VueNodes.Enabled": design, "Comfy.TutorialCompleted": True, "Comfy.Workflow.WarnBlueprintOverwrite": False})

    def open(self):
        self.page.goto(f"http://127.0.0.1:{self.server.port}")
        self._ready()

    def reload(self):
        self.page.reload()
        self._ready()

    def _ready(self):
        """Waits until nodes are known, and notes every event of ours from then on."""
        known = "() => window.app?.extensionManager && window.LiteGraph?.registered_node_types?.['SparseAttentionPatchSVG'] && window.app.graph"
        self.page.wait_for_function(known, timeout=90_000)
        self.page.wait_for_timeout(1500)
        self.page.evaluate(
            """() => { window.told = []; window.texts = [];
            app.api.addEventListener("sparse_video_attention.run", (event) => told.push(event.detail));
            app.api.addEventListener("progress_text", (event) => texts.push(event.detail)); }"""
        )

    def load(self, graph):
        """Opens a graph in API form, its patch nodes side by side, as a workflow of its own."""
        self.page.evaluate("([graph, name]) => app.loadApiJson(graph, name)", [graph, self._name])
        self.page.wait_for_timeout(300)
        self.page.evaluate(
            """async () => { let x = 40; for (const node of app.graph.nodes) { const mine = node.type.startsWith("SparseAttentionPatch");
            node.pos = mine ? [x, 120] : [x % 900, 760]; x += mine ? 440 : 10; if (mine) node.setSize([400, node.size[1]]); }
            const saved = app.graph.serialize(); saved.id = crypto.randomUUID();
            await app.loadGraphData(saved); app.canvas.ds.reset(); app.canvas.setDirty(true, true); }"""
        )
        self.page.wait_for_timeout(300)

    def open_file(self, path):
        """Opens a workflow's file through the menu's own file chooser; returns its nodes' types as they are now, by id."""
        with self.page.expect_file_chooser() as chooser:
            self.page.evaluate("() => app.ui.loadFile()")
        chooser.value.set_files(path)
        self.page.wait_for_function("(name) => app.extensionManager.workflow.activeWorkflow?.filename === name", arg=path.stem)
        self.page.wait_for_timeout(500)
        return dict(self.page.evaluate("app.graph.nodes.map((node) => [Number(node.id), node.type])"))

    def troubles(self):
        """What the frontend says is wrong, and the types of nodes that it does not know."""
        said = self.page.evaluate(
            "(kinds) => [...document.querySelectorAll(kinds)].filter((part) => part.checkVisibility()).map((part) => part.innerText)", TROUBLE
        )
        unknown = self.page.evaluate("app.graph.nodes.filter((node) => !LiteGraph.registered_node_types[node.type]).map((node) => node.type)")
        return said + unknown + self.errors

    def queue(self):
        self._before = set(self.server.get("/history"))
        self.page.evaluate("() => void app.queuePrompt(0, 1)")

    def finished(self, seconds=90):
        """The history entry of what was queued, when it is over, and the page has drawn what came."""
        for _ in range(seconds * 5):
            for prompt in self.server.get("/history").keys() - self._before:
                entry = self.server.wait(prompt)
                self.page.wait_for_timeout(700)
                return entry
            self.page.wait_for_timeout(200)
        raise TimeoutError(f"nothing ended; told so far: {self.page.evaluate('told')}")

    def panel(self, node):
        """What the panel on a node shows, by its parts; None where there is none. node: an expression for it."""
        return self.page.evaluate(
            f"""() => {{ const node = {node}; const root = node?.widgets?.find((widget) => widget.type === "sparse_video_attention_panel")?.element;
            if (!root) return null; const part = (name) => root.querySelector(".sva-" + name); const box = root.getBoundingClientRect();
            return {{ state: root.dataset.state, figures: "figures" in root.dataset, head: part("head").innerText, line: part("line").textContent,
            fill: part("fill").style.width, asked: part("asked").style.left, width: box.width, height: box.height,
            line_visible: part("line").checkVisibility() && root.isConnected,
            texts: node.widgets.filter((widget) => widget.name.startsWith("$$")).length,
            colour: getComputedStyle(part("fill")).backgroundColor, edge: getComputedStyle(part("inner")).borderLeftColor }}; }}"""
        )

    def assert_shows(self, node, data):
        """That the panel on a node shows the end of the run whose record this is. node: an expression for it."""
        panel = self.panel(node)
        achieved, counts = f"{data['achieved_sparsity']:.0%}", f" · {data['sparse_calls']} sparse, {data['dense_calls']} dense calls"
        if data["asked_sparsity"] is None:
            error, most = f"{data['measured_error']:.0%}", f"{data['asked_error']:.0%}"
            head, mark, said = f"{achieved} skipped, off by {error}, {most} asked", "", f"{achieved} skipped, off by {error} (at most {most} asked)"
        else:
            mark = f"{data['asked_sparsity']:.0%}"
            head, said = f"{achieved} skipped, {mark} asked", f"{achieved} skipped (asked {mark})"
        assert panel["state"] == "done" and panel["figures"] and panel["line_visible"]
        assert panel["head"].split("\n") == [head, f"step {data['steps']}/{data['steps']}"]
        assert (panel["fill"], panel["asked"]) == (achieved, mark)
        assert said + counts in panel["line"]
        assert panel["width"] > 100 and panel["height"] > 30
        assert panel["texts"] == 1, "the line is said once"

    def picture(self, name):
        PICTURES.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=PICTURES / f"{name}-{'nodes2' if self.design else 'classic'}.png")


def _page(server, browser, design, name):
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    yield Page(server, context, design, name)
    context.close()


@pytest.fixture
def page(server, browser, design, request):
    for opened in _page(server, browser, design, request.node.originalname):
        opened.open()
        yield opened


@pytest.fixture(scope="module")
def shared_page(server, browser, design, request):
    """One page for all tests of a module, not yet opened."""
    yield from _page(server, browser, design, request.node.name)

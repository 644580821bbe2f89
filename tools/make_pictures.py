"""Makes the pictures of the help pages, web/docs/pictures/: runs the demo's small trained model in a real ComfyUI, and takes its nodes' pictures.

    COMFYUI_PATH=... COMFYUI_PYTHON=... python tools/make_pictures.py [runs] [auto] [probe] [pattern]

Needs playwright and a Chromium: CHROMIUM names one, else one on the PATH is taken. OUT: another folder. Figures of time in them are of the machine.
"""

import io
import itertools
import os
import shutil
import sys
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

from comfy_server import ROOT, ComfyServer
from PIL import Image
from playwright.sync_api import Page, sync_playwright

SVG, ADASPA, AUTO = "SparseAttentionPatchSVG", "SparseAttentionPatchAdaSpa", "SparseAttentionPatchAuto"
MOST_BYTES = 150_000
# The videos are short, and would stay dense otherwise.
SHORT = {"min_tokens": 0}
WIDTH = 400  # of a node, about as wide as the help panel
_seeds = itertools.count()


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def graph(patched: dict, last: list, steps: int = 12) -> dict:
    """The demo's model and clip; `patched`: nodes from "model" (1) to what is sampled (`last`)."""
    return {
        "1": node("UNETLoader", unet_name="tiny_wan_clips.safetensors", weight_dtype="default"),
        "2": node("ModelSamplingSD3", model=["1", 0], shift=3.0),
        "3": node("SparseDemoClips", model=["1", 0], file="clips.safetensors", clips="2"),
        **patched,
        "9": node(
            "KSampler", model=last, positive=["3", 0], negative=["3", 0], latent_image=["3", 1], seed=next(_seeds), steps=steps, cfg=1.0,
            sampler_name="euler", scheduler="simple", denoise=1.0,
        ),
    }


class Frontend:
    """ComfyUI in a browser, with nodes in the newer of its two designs."""

    def __init__(self, server: ComfyServer, page: Page):
        self.server, self.page = server, page
        server.post("/settings", {"Comfy.VueNodes.Enabled": True, "Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False})

    def start(self) -> None:
        """Loads the frontend anew: it keeps the values of a graph's widgets, and gives them to nodes of the same number."""
        self.page.goto(f"http://127.0.0.1:{self.server.port}")
        known = f"() => window.app?.extensionManager && window.LiteGraph?.registered_node_types?.['{SVG}'] && app.graph"
        self.page.wait_for_function(known, timeout=120_000)
        self.page.wait_for_timeout(3000)
        self.page.keyboard.press("Escape")

    def open(self, prompt: dict, shown: tuple[str, ...]) -> None:
        """Opens a graph, with the nodes that are to be seen side by side, below what the frontend announces."""
        self.start()
        self.page.evaluate("(prompt) => app.loadApiJson(prompt, 'picture')", prompt)
        self.page.wait_for_timeout(1000)
        self.page.evaluate(
            """async ([shown, width]) => {
              const saved = app.graph.serialize(); saved.id = crypto.randomUUID();
              await app.loadGraphData(saved);
              let y = 3000;
              for (const node of app.graph.nodes) {
                const place = shown.indexOf(String(node.id));
                node.pos = place < 0 ? [0, y += 400] : [80 + place * (width + 60), 260];
                if (place >= 0) node.setSize([width, node.size[1]]);
              }
              app.canvas.ds.reset(); app.canvas.deselectAll?.(); app.canvas.setDirty(true, true);
            }""", [shown, WIDTH],
        )
        self.page.wait_for_timeout(1000)

    def run(self, until: str | None = None, pictures: tuple[str, ...] = ()) -> dict:
        """Queues what is open and returns its outputs by node; waits for `until` first, an expression, and takes pictures by then."""
        before = set(self.server.get("/history"))
        self.page.evaluate("() => void app.queuePrompt(0, 1)")
        taken = []
        if until:
            self.page.wait_for_function(until, timeout=300_000)
            taken = [self.panel(number) for number in pictures]
        while not (new := set(self.server.get("/history")) - before):
            self.page.wait_for_timeout(300)
        entry = self.server.wait(new.pop())
        if entry["status"]["status_str"] != "success":
            raise RuntimeError(str(entry["status"]["messages"])[-2000:])
        self.page.wait_for_timeout(2500)
        self.page.keyboard.press("Escape")
        return {**entry["outputs"], "taken": taken}

    def node(self, number: str) -> Image.Image:
        return self._picture(f"[data-node-id='{number}']")

    def panel(self, number: str) -> Image.Image:
        return self._picture(f"[data-node-id='{number}'] .sva-inner")

    def _picture(self, selector: str) -> Image.Image:
        """An element with all that is in it, slots and buttons on its edges too."""
        x, y, right, bottom = self.page.evaluate(
            """(selector) => { const whole = document.querySelector(selector);
              const parts = [whole, ...whole.querySelectorAll("*")].filter((part) => part.checkVisibility());
              const filled = parts.map((part) => part.getBoundingClientRect()).filter((box) => box.width && box.height);
              return [Math.min(...filled.map((box) => box.left)), Math.min(...filled.map((box) => box.top)),
                Math.max(...filled.map((box) => box.right)), Math.max(...filled.map((box) => box.bottom))]; }""", selector,
        )
        taken = self.page.screenshot(clip={"x": x - 4, "y": y - 4, "width": right - x + 8, "height": bottom - y + 8})
        return Image.open(io.BytesIO(taken)).convert("RGB")

    def view(self, image: dict) -> Image.Image:
        """A picture that a node has put out."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.server.port}/view?{urllib.parse.urlencode(image)}") as answer:
            return Image.open(io.BytesIO(answer.read())).convert("RGB")


def below(*pictures: Image.Image, gap: int = 12) -> Image.Image:
    """Pictures one below another, on the canvas's colour."""
    whole = Image.new("RGB", (max(one.width for one in pictures), sum(one.height + gap for one in pictures) - gap), "#141414")
    y = 0
    for one in pictures:
        whole.paste(one, (0, y))
        y += one.height + gap
    return whole


def save(picture: Image.Image, path: Path) -> None:
    """As a PNG of 256 colours, which drawings and panels do with; the rare ones, such as an end of a scale, count as much as the others."""
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes")
    print(path.name, picture.size, path.stat().st_size)


def patch(kind: str, **settings) -> dict:
    return {"5": node(kind, model=["2", 0], **SHORT, **settings)}


def report(number: str = "5") -> dict:
    return {"10": node("SparseAttentionReport", model=[number, 0], samples=["9", 0], layer=3)}  # SVG leaves layer 0 dense


def runs(frontend: Frontend, out: Path) -> None:
    """Both patch nodes, their panels, and the reports."""
    under_way = "() => document.querySelector('.sva-panel[data-state=running][data-figures] .sva-fill')?.offsetWidth > 0"
    states = []
    for kind, name in ((SVG, "svg"), (ADASPA, "adaspa")):
        frontend.open({**graph(patch(kind), ["5", 0]), **report()}, ("5", "10"))
        done = frontend.run(under_way, ("5",))
        save(frontend.node("5"), out / f"patch_{name}.png")
        picture = frontend.view(done["10"]["images"][0])
        save(picture.resize((1024, round(1024 * picture.height / picture.width)), Image.Resampling.LANCZOS), out / f"report_{name}.png")
        if kind == SVG:
            states += [*done["taken"], frontend.panel("5")]
    frontend.open({**graph(patch(SVG, warmup_steps=4), ["5", 0], steps=4), **report()}, ("5", "10"))
    frontend.run()
    save(below(*states, frontend.panel("5")), out / "panel.png")


def auto(frontend: Frontend, out: Path) -> None:
    """The node with a fidelity, its panel, and its report."""
    frontend.open({**graph(patch(AUTO), ["5", 0]), **report()}, ("5", "10"))
    done = frontend.run()
    save(frontend.node("5"), out / "patch_auto.png")
    picture = frontend.view(done["10"]["images"][0])
    save(picture.resize((1024, round(1024 * picture.height / picture.width)), Image.Resampling.LANCZOS), out / "report_auto.png")


def probe(frontend: Frontend, out: Path) -> None:
    probed = {**patch(SVG, sparsity=0.8, dense_layers=""), "6": node("SparseAttentionProbe", model=["5", 0])}
    results = {"10": node("SparseAttentionProbeResults", model=["6", 0], samples=["9", 0]), "11": node("PreviewAny", source=["10", 1])}
    frontend.open({**graph(probed, ["6", 0]), **results}, ("6", "10", "11"))
    frontend.page.evaluate("() => { const node = app.graph.getNodeById(11); node.setSize([520, 620]); }")
    frontend.run()
    save(frontend.node("6"), out / "probe.png")
    save(frontend.node("10"), out / "probe_results.png")
    save(frontend.node("11"), out / "probe_table.png")


def pattern(frontend: Frontend, out: Path) -> None:
    kept = {
        "10": node("SparseAttentionSavePattern", model=["5", 0], samples=["9", 0], filename_prefix="clip"),
        "11": node("PreviewAny", source=["10", 1]),
    }
    frontend.open({**graph(patch(ADASPA), ["5", 0]), **kept}, ("5", "10", "11"))
    path = frontend.run()["11"]["text"][0]
    save(frontend.node("10"), out / "save_pattern.png")
    loaded = {**patch(ADASPA), "6": node("SparseAttentionLoadPattern", model=["5", 0], file="none", path=path)}
    frontend.open({**graph(loaded, ["6", 0]), **report("6")}, ("6", "10"))
    frontend.run()
    save(frontend.node("6"), out / "load_pattern.png")


PARTS = (runs, auto, probe, pattern)


def main(names: list[str]) -> int:
    comfyui, out = Path(os.environ["COMFYUI_PATH"]).expanduser(), Path(os.environ.get("OUT", ROOT / "web" / "docs" / "pictures"))
    out.mkdir(parents=True, exist_ok=True)
    chromium = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        base, model = Path(folder), ROOT / "demo" / "model"
        for file, place in (("tiny_wan_clips", "models/diffusion_models"), ("clips", "input")):
            (base / place).mkdir(parents=True)
            shutil.copy(model / f"{file}.safetensors", base / place)
        of_torch = ("--use-pytorch-cross-attention",)  # as in the demo
        with ComfyServer(comfyui, base, "SparseVideoAttention", nodes=(ROOT / "demo" / "nodes",), arguments=of_torch) as server:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_context(viewport={"width": 1600, "height": 1400}).new_page()
            frontend = Frontend(server, page)
            for part in PARTS:
                if not names or part.__name__ in names:
                    part(frontend, out)
            browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

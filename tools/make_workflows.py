"""Makes the files of workflows/ and subgraphs/: builds each graph in a real ComfyUI's own frontend, saves it as the frontend does, and takes
a workflow's picture.

    COMFYUI_PATH=... COMFYUI_PYTHON=... PLAYWRIGHT_CORE=.../node_modules/playwright-core python tools/make_workflows.py [--check] [NAME ...]

--check writes nothing: it opens every workflow in both of the frontend's node designs, and fails where a node is missing, a link is
lost, a value changes, or the server finds an error; blueprints have tests/browser/test_blueprints.py. OUT: a folder to put workflows/ and
subgraphs/ in, instead of the checkout. FRONTEND: the static folder of another frontend. Needs Chromium and node.

Settings and files are those of ComfyUI's own templates for each model. Empty files stand for the models, so that the server can
check every value of a graph but cannot run it.
"""

# ruff: noqa: E501, RUF001  -- notes and prompts as they stand in the files, and Chinese

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

from comfy_server import ROOT, ComfyServer

HUB = "https://huggingface.co"
WAN21, WAN22 = f"{HUB}/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files", f"{HUB}/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"
HUNYUAN, H3 = f"{HUB}/Comfy-Org/HunyuanVideo_1.5_repackaged/resolve/main/split_files", f"{HUB}/Comfy-Org/MiniMax-H3/resolve/main"
LTX2, LTX2_COMFY = f"{HUB}/Lightricks/LTX-2/resolve/main", f"{HUB}/Comfy-Org/ltx-2/resolve/main/split_files"

WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，"
    "画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
FOX = "a fox moving quickly in a beautiful winter scenery nature trees mountains daytime tracking camera"
SVG, ADASPA, AUTO = "SparseAttentionPatchSVG", "SparseAttentionPatchAdaSpa", "SparseAttentionPatchAuto"
REPORT = "SparseAttentionReport"
SAVE, LOAD = "SparseAttentionSavePattern", "SparseAttentionLoadPattern"
PROBE, RESULTS = "SparseAttentionProbe", "SparseAttentionProbeResults"
SEED = 82628696717253


def file(base: str, directory: str, name: str, folder: str | None = None) -> dict:
    """A model file as the frontend's loaders name it; `folder` is where it lies in its repository."""
    return {"name": name, "url": "/".join(part for part in (base, directory if folder is None else folder, name) if part), "directory": directory}


UMT5 = file(WAN21, "text_encoders", "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
WAN_VAE = file(WAN21, "vae", "wan_2.1_vae.safetensors")


# For whatever model is connected: what suits it.
AUTOMATIC = {"sparsity": -1, "dense_layers": "auto"}


# ---- nodes: [name in the links, type, widgets, what else] ----

def unet(name: str, model: dict, title: str | None = None) -> list:
    return [name, "UNETLoader", {"unet_name": model["name"]}, {"models": [model], "title": title}]


def clip(model: dict, kind: str) -> list:
    return ["clip", "CLIPLoader", {"clip_name": model["name"], "type": kind}, {"models": [model]}]


def vae(model: dict, name: str = "vae", title: str | None = None) -> list:
    return [name, "VAELoader", {"vae_name": model["name"]}, {"models": [model], "title": title}]


def lora(name: str, model: dict, title: str | None = None) -> list:
    return [name, "LoraLoaderModelOnly", {"lora_name": model["name"], "strength_model": 1}, {"models": [model], "title": title}]


def text(name: str, words: str, title: str) -> list:
    colors = {"Positive Prompt": ["#232", "#353"], "Negative Prompt": ["#322", "#533"]}[title]
    return [name, "CLIPTextEncode", {"text": words}, {"title": f"CLIP Text Encode ({title})", "height": 170, "colors": colors}]


def shift(name: str, value: float) -> list:
    return [name, "ModelSamplingSD3", {"shift": value}]


def patch(name: str, kind: str, title: str | None = None, **settings) -> list:
    return [name, kind, settings, {"title": title, "room": 150}]  # for its panel, once it has something to say


def report(name: str = "report", title: str | None = None) -> list:
    return [name, REPORT, {}, {"title": title, "height": 560}]


def sampler(name: str, steps: int, cfg: float, method: str, scheduler: str = "simple", title: str | None = None, seed: int = SEED) -> list:
    return [name, "KSampler", {
        "seed": seed, "control_after_generate": "fixed", "steps": steps, "cfg": cfg, "sampler_name": method, "scheduler": scheduler, "denoise": 1,
    }, {"title": title}]


def stage(name: str, steps: int, cfg: float, first: int, last: int, title: str) -> list:
    """One of two KSamplerAdvanced: the first adds the noise and hands the rest of it on."""
    return [name, "KSamplerAdvanced", {
        "add_noise": "enable" if first == 0 else "disable", "noise_seed": SEED if first == 0 else 0, "control_after_generate": "fixed",
        "steps": steps, "cfg": cfg, "sampler_name": "euler", "scheduler": "simple", "start_at_step": first, "end_at_step": last,
        "return_with_leftover_noise": "enable" if last < steps else "disable",
    }, {"title": title}]


def video(fps: float) -> list:
    return ["video", "CreateVideo", {"fps": fps}]


def save(prefix: str) -> list:
    return ["save", "SaveVideo", {"filename_prefix": f"video/{prefix}"}, {"height": 330}]


def note(title: str, words: str) -> list:
    return ["note" + title, "MarkdownNote", {"text": words}, {"title": title}]


def read_me(heading: str, words: str, *models: dict, extra: str = "") -> str:
    lines = [f"- models/{model['directory']}: [{model['name']}]({model['url']})" for model in models]
    return f"## {heading}\n\n{words}\n\n**Files**, the same as in ComfyUI's own example for this model:\n\n" + "\n".join(lines) + "\n" + extra


SVG_KNOBS = """- **sparsity** up: faster, and further from the dense video. Down: slower and closer.
- **warmup_steps** up: closer to the dense video, less gain.
- **dense_layers**: layers that stay dense; "0" is the first.
"""
ADASPA_KNOBS = """- **sparsity** up: faster, and further from the dense video. Down: slower and closer.
- **warmup_steps** up: closer to the dense video, less gain.
- **cache_refresh**: how often blocks are searched anew{refresh}.
"""
BYPASS = "select it, press Ctrl+B (bypass) and run again: the seed is fixed."
LARGER = "Small or short videos stay dense: there is nothing to gain. The larger and longer the video, the more there is."


def expect(words: str, knobs: str, end: str = LARGER) -> str:
    return f"## What to expect\n\n{words}\n\n## The knobs\n\n{knobs}\nThe rest can stay as it is. {end}\n"


def column(width: int, *nodes: list) -> dict:
    """Nodes one below another; columns of a group stand side by side."""
    return {"width": width, "nodes": nodes}


def group(title: str, *columns: dict) -> dict:
    return {"title": title, "columns": columns}


def height_of(words: str) -> int:
    """Of a note of 560, so that it need not be scrolled, nor grow over what stands below, in either of the frontend's designs."""
    lines = [re.sub(r"\]\([^)]*\)|\*\*", "", line) for line in words.splitlines() if line.strip()]
    return 80 + sum(46 if line.startswith("## ") else 12 + 14 * -(-len(line) // 105) for line in lines)


def notes(*of: list) -> dict:
    """Side by side, and equally high."""
    height = max(height_of(one[2]["text"]) for one in of)
    return group("Read me first", *(column(560, [name, kind, text, {**options, "height": height}]) for name, kind, text, options in of))


def prompt(*last: dict, first: tuple = (), words: str = FOX, negative: str = WAN_NEGATIVE, text_encoder: list | None = None, decoder: list | None = None) -> dict:
    """Text encoder and VAE, with `first` below them, the two prompts, and what they go into."""
    loaders = column(420, text_encoder or clip(UMT5, "wan"), decoder or vae(WAN_VAE), *first)
    return group("2. Prompt and size", loaders, column(420, text("positive", words, "Positive Prompt"), text("negative", negative, "Negative Prompt")), *last)


def saving(prefix: str, fps: float, *before: dict, number: int = 5) -> list:
    """The last group: a decoder, unless others stand before, a video and its file."""
    return [group(f"{number}. Video", *(before or [column(200, ["decode", "VAEDecode"])]), column(210, video(fps)), column(400, save(prefix)))]


def size_of(type: str = "EmptyHunyuanLatentVideo", width: int = 832, height: int = 480, length: int = 81) -> dict:
    return column(270, ["latent", type, {"width": width, "height": height, "length": length, "batch_size": 1}, {"title": "Video size"}])


def links(text: str) -> list:
    """"a -> b.input" a line; "a:1 -> b.input" is a's second output."""
    found = []
    for line in text.strip().splitlines():
        source, target = (part.strip() for part in line.split("->"))
        name, _, output = source.partition(":")
        for one in target.split(","):
            node, slot = one.strip().split(".", 1)
            found.append([name, int(output or 0), node, slot])
    return found


# ---- the workflows ----

def two_stages(name: str, heading: str, high: dict, low: dict, loras: tuple[dict, ...], steps: int, split: int, cfg: float, patches: tuple[list, list],
               read: str, tell: str, image: bool = False, words: str = FOX, prefix: str = "") -> dict:
    """Wan 2.2's two networks, each with a patch and a report of its own."""
    files = [*loras, high, low, UMT5, WAN_VAE]
    start = ["image", "LoadImage", {"image": "example.png"}, {"height": 300, "title": "Start image"}]
    from_image = ["latent", "WanImageToVideo", {"width": 832, "height": 480, "length": 81, "batch_size": 1}, {"title": "Start image and video size"}]
    left, right = ("high_lora", "low_lora") if loras else ("high", "low")
    positive, negative, empty = ("latent:0", "latent:1", "latent:2") if image else ("positive", "negative", "latent")

    def network(number: int, key: str, model: dict, lora_file: tuple[dict, ...], patched: list) -> dict:
        noise = f"{key.capitalize()} noise"
        with_lora = [column(400, lora(f"{key}_lora", one, f"{noise}: LoRA")) for one in lora_file]
        return group(f"{number}. {noise}: model and patch", column(400, unet(key, model, f"{noise}: model")), *with_lora, column(220, shift(f"{key}_shift", 5)), column(400, patched))

    def sampled(number: int, key: str, which: str, first: int, last: int) -> list:
        noise = f"{key.capitalize()} noise"
        return [group(f"{number}. {noise}: the {which} steps", column(340, stage(f"{key}_sampler", steps, cfg, first, last, f"{noise}: sampler")),
                      column(600, report(f"{key}_report", f"{noise}: report")))]

    sizes = prompt(column(300, from_image), first=(start,), words=words) if image else prompt(size_of(), words=words)
    return {
        "name": name,
        "stacks": [
            [notes(note("Read me", read_me(heading, read, *files)), note("What to expect, and the knobs", tell)),
             network(1, "high", high, loras[:1], patches[0]), {**sizes, "title": "2. Prompt and size"}, network(3, "low", low, loras[1:], patches[1])],
            sampled(4, "high", "first", 0, split), sampled(5, "low", "last", split, steps), saving(prefix or name, 16, number=6),
        ],
        "links": links(
            ("high -> high_lora.model\nlow -> low_lora.model\n" if loras else "")
            + ("positive -> latent.positive\nnegative -> latent.negative\nvae -> latent.vae\nimage -> latent.start_image\n" if image else "")
            + f"""clip -> positive.clip, negative.clip
            {left} -> high_shift.model
            {right} -> low_shift.model
            high_shift -> high_patch.model
            low_shift -> low_patch.model
            high_patch -> high_sampler.model, high_report.model
            low_patch -> low_sampler.model, low_report.model
            {positive} -> high_sampler.positive, low_sampler.positive
            {negative} -> high_sampler.negative, low_sampler.negative
            {empty} -> high_sampler.latent_image
            high_sampler -> high_report.samples
            high_report -> low_sampler.latent_image
            low_sampler -> low_report.samples
            low_report -> decode.samples
            vae -> decode.vae
            decode -> video.images
            video -> save.video"""
        ),
    }


def wan22(kind: str, noise: str) -> dict:
    return file(WAN22, "diffusion_models", f"wan2.2_{kind}_{noise}_noise_14B_fp8_scaled.safetensors")


def wan22_t2v() -> dict:
    return two_stages(
        "wan22_t2v", "Wan 2.2 text to video, sparse in both stages", wan22("t2v", "high"), wan22("t2v", "low"), (), 20, 10, 3.5,
        (patch("high_patch", SVG, "High noise: sparse attention"), patch("low_patch", SVG, "Low noise: sparse attention")),
        "Wan 2.2 is two networks: one makes the first steps, at high noise, the other the last. So there is one **Sparse Attention Patch (SVG)** for each, "
        "and both skip most of the attention, which is where a long video spends its time. To compare, bypass both patches (select them, Ctrl+B) "
        "and run again: the seed is fixed.",
        expect(
            "While it samples, a line on each patch tells the step, the share skipped, and why calls stayed dense. The first 4 steps at high noise are dense on "
            "purpose: they fix the composition. The low-noise stage starts with that done and needs no warm-up. Each report shows its own stage.",
            SVG_KNOBS, "Set both patches alike, or the low-noise one lower if fine detail suffers. 1280 x 720 works too; there is more to gain there."),
    )


REFRESH_OF_STAGES = "; -1 is once more at about 60 percent of all steps, which falls into the low-noise stage, right after its first search; 0 there leaves it out"


def wan22_i2v() -> dict:
    return two_stages(
        "wan22_i2v", "Wan 2.2 image to video, sparse in both stages", wan22("i2v", "high"), wan22("i2v", "low"), (), 20, 10, 3.5,
        (patch("high_patch", ADASPA, "High noise: sparse attention"), patch("low_patch", ADASPA, "Low noise: sparse attention")),
        "It starts from an image: choose yours in **Start image**. Wan 2.2 is two networks: one makes the first steps, at high noise, the other the last. "
        "So there is one **AdaSpa Patch** for each. To compare, bypass both patches (select them, Ctrl+B) and run again: the seed is fixed.",
        expect(
            "While it samples, a line on each patch tells the step, the share skipped, and why calls stayed dense. The first 4 steps at high noise are dense on "
            "purpose: they fix the composition. The low-noise stage has one dense step, in which it searches the blocks for its own network. "
            "Each report shows its own stage.",
            ADASPA_KNOBS.format(refresh=REFRESH_OF_STAGES),
            "If the video leaves the start image, lower the sparsity of the high-noise patch. 1280 x 720 works too; there is more to gain there."),
        image=True, words="the camera slowly moves closer, gentle wind, natural light, lifelike motion",
    )


def wan22_t2v_4_steps() -> dict:
    found = tuple(file(WAN22, "loras", f"wan2.2_t2v_lightx2v_4steps_lora_v1.1_{noise}_noise.safetensors") for noise in ("high", "low"))
    return two_stages(
        "wan22_t2v_4_steps", "Wan 2.2 in 4 steps with a lightning LoRA, sparse", wan22("t2v", "high"), wan22("t2v", "low"), found, 4, 2, 1,
        (patch("high_patch", SVG, "High noise: sparse attention", sparsity=0.6, warmup_steps=1),
         patch("low_patch", SVG, "Low noise: sparse attention", sparsity=0.6, warmup_steps=0)),
        "A LoRA brings Wan 2.2 down to 4 steps without guidance (cfg 1): two at high noise, two at low. **Sparse Attention Patch (SVG)** stands behind "
        "the LoRA and its shift, one for each stage. To compare, bypass both patches (select them, Ctrl+B) and run again: the seed is fixed.",
        expect(
            "The very first step is dense on purpose: it fixes the composition. The other three are sparse. So of four steps a quarter cannot gain "
            "anything: expect less than from a run of 20 steps.",
            "- **warmup_steps**: 1 at high noise, 0 at low noise. 2 at high noise is closer to the dense video and leaves only two sparse steps.\n"
            "- **sparsity** 0.6 instead of the usual 0.7: with so few steps there is no later one to mend what a step gets wrong. Up from there if the video looks "
            "right, down if it suffers.\n- For 8 steps set steps to 8 on both samplers, end_at_step and start_at_step to 4, and leave warmup_steps.\n"),
    )


# Wan 2.1's small model, sampled as in ComfyUI's own example.
SMALL, SMALL_SAMPLING = file(WAN21, "diffusion_models", "wan2.1_t2v_1.3B_fp16.safetensors"), (30, 6, "uni_pc")
LONGER_WARMUP = "The first third of the steps is dense on purpose: this small model needs a longer warm-up."


OF_SPARSITY = "**sparsity** -1: what suits this model, {}. Type a number yourself: up is faster, and further from the dense video; down is slower and closer."


def wan_t2v(kind: str, name: str, heading: str, looks: str, knob: str, refresh: str, **settings) -> dict:
    called = {SVG: "Sparse Attention Patch (SVG)", ADASPA: "AdaSpa Patch", AUTO: "Sparse Attention Patch (Auto)"}[kind]
    return {
        "name": name,
        "stacks": [
            [notes(note("Read me", read_me(
                heading, f"**{called}** stands between the model and the sampler and skips most of the attention, which is where a long video spends its time. "
                f"To compare, {BYPASS}", SMALL, UMT5, WAN_VAE)),
                note("What to expect, and the knobs", expect(
                    f"While it samples, a line on **{called}** tells the step, the share skipped, and why calls stayed dense. {LONGER_WARMUP} "
                    f"Then **Sparse Attention Report** shows what was skipped by layer and step, and {looks}.",
                    f"- {knob}\n- **warmup_steps** up: closer to the dense video, less gain.\n- **cache_refresh**: {refresh}\n"))),
             group("1. Model and patch", column(400, unet("model", SMALL)), column(220, shift("shift", 8)), column(400, patch("patch", kind, **settings))), prompt(size_of())],
            [group("3. Sample", column(330, sampler("sampler", *SMALL_SAMPLING)))],
            [group("4. Report", column(600, report()), column(430, ["json", "PreviewAny", {}, {"title": "Report: JSON", "height": 560}]))],
            saving(name.replace("t2v_", ""), 16),
        ],
        "links": links("""clip -> positive.clip, negative.clip
            model -> shift.model
            shift -> patch.model
            patch -> sampler.model, report.model
            positive -> sampler.positive
            negative -> sampler.negative
            latent -> sampler.latent_image
            sampler -> report.samples
            report -> decode.samples
            report:2 -> json.source
            vae -> decode.vae
            decode -> video.images
            video -> save.video"""),
    }


def wan_t2v_svg() -> dict:
    return wan_t2v(SVG, "wan_t2v_svg", "Wan 2.1 text to video with Sparse VideoGen (SVG)", "which heads look around in space and which along time",
                   OF_SPARSITY.format("0.60 here; the large one has 0.70"), "how often heads are classified anew; -1 is every step, as in the paper.", sparsity=-1)


def wan_t2v_adaspa() -> dict:
    return wan_t2v(ADASPA, "wan_t2v_adaspa", "Wan 2.1 text to video with AdaSpa", "how much of each head's attention the kept blocks hold",
                   OF_SPARSITY.format("0.70 here; the large one has 0.80"), "how often blocks are searched anew; -1 is once more later in the run, as in the paper.", sparsity=-1)


def wan_t2v_auto() -> dict:
    return wan_t2v(AUTO, "wan_t2v_auto", "Wan 2.1 text to video with a fidelity (Auto)", "how far each layer was off from dense attention",
                   "**fidelity**: how close each layer's attention stays to dense attention; 0.9 means off by at most about a tenth. Up: closer, less is skipped. Down: faster.",
                   "when blocks are searched anew; -1 is where the measured error has grown.")


def wan_probe() -> dict:
    return {
        "name": "wan_probe",
        "stacks": [
            [notes(note("Read me", read_me(
                "Which layers may be sparse, and how sparse: measured",
                "**Sparse Attention Probe** stands behind the patch. In three of the run's sparse steps it computes attention both ways, sparse and dense, at 70, 60 and 50 percent "
                "skipped, and **Sparse Attention Probe Results** tells how far each layer and head is off. The video is one with 70 percent skipped; the run takes longer than usual.",
                SMALL, UMT5, WAN_VAE)),
                note("What to expect, and the knobs", "## What to expect\n\nThe results node ends with a suggestion: **dense_layers** and **sparsity**. The table beside it has the errors by "
                     f"layer and head, worst first: 0.1 is off by a tenth of what dense attention gives. {LONGER_WARMUP}\n\n## Use the suggestion\n\n"
                     "1. Type its **dense_layers** and **sparsity** into the patch.\n"
                     "2. Bypass the probe and its results (select them, Ctrl+B), or delete them, and run again: that is the video with the suggestion.\n"
                     "3. Do not wire it into the patch that is measured: that would be a circle. To have it wired, take the blueprint *Probe, then Sparse Sampling (SVG)*.\n\n"
                     "## The knobs\n\n- **max_error** of the results down: closer to the dense video, less skipped. It needs no new run.\n"
                     "- **steps** of the probe down: a faster run, and less sure. **most_layers**: only so many layers.\n"
                     "- **dense_layers** of the patch is empty here, since what is dense is not measured.\n\n"
                     "Measure at the size and length that you mean to use. It is an error of attention, not of pixels: let your eye have the last word.\n")),
             group("1. Model, patch and probe", column(400, unet("model", SMALL)), column(220, shift("shift", 8)), column(400, patch("patch", SVG, sparsity=0.7, dense_layers="")),
                   column(330, ["probe", PROBE, {}])), prompt(size_of())],
            [group("3. Sample once", column(330, sampler("sampler", *SMALL_SAMPLING)))],
            [group("4. The suggestion", column(360, ["results", RESULTS, {}, {"room": 100}]), column(560, ["table", "PreviewAny", {}, {"title": "Errors by layer and head", "height": 560}]))],
            saving("wan_probe", 16),
        ],
        "links": links("""clip -> positive.clip, negative.clip
            model -> shift.model
            shift -> patch.model
            patch -> probe.model
            probe -> sampler.model, results.model
            positive -> sampler.positive
            negative -> sampler.negative
            latent -> sampler.latent_image
            sampler -> results.samples
            results:0 -> decode.samples
            results:1 -> table.source
            vae -> decode.vae
            decode -> video.images
            video -> save.video"""),
    }


def wan_pattern() -> dict:
    return {
        "name": "wan_pattern",
        "stacks": [
            [notes(note("Read me", read_me(
                "A pattern: searched once, used again",
                "The first run makes a video with **AdaSpa Patch**, and **Save Sparse Pattern** keeps the blocks that it found in a file. The second run, of another seed, gets "
                "that file from **Load Sparse Pattern** and does not search. So the first queue takes the time of two runs.",
                SMALL, UMT5, WAN_VAE)),
                note("What to expect, and the knobs", "## What to expect\n\nThe second patch says that it started from the file, and its report counts no search. "
                     f"{LONGER_WARMUP} That holds in both runs: what a pattern saves is the search, so the gain over a run that searches itself is small at 30 steps, larger in a run of few.\n\n"
                     "## Make more videos\n\nChange the seed of the **second** sampler and queue again: the first run is not computed again. A pattern was found on one video, so "
                     "another seed or prompt can look worse with it; to compare, bypass **Load Sparse Pattern** (Ctrl+B).\n\n"
                     "## Later, without the first run\n\nPress R, choose the file in **file** of Load Sparse Pattern, take the wire off its **path**, and mute the first run (Ctrl+M). "
                     "Files lie in output/sparse_patterns and can be shared. One fits one method, model, size and length; any other is refused in words.\n\n"
                     "## The knobs\n\n- **sparsity** belongs to the pattern: set it in the first patch; the second takes what was found.\n"
                     "- **warmup_steps** of the second patch may be 0, since it has nothing to search. Its composition then drifts further from the dense video.\n"
                     "- **filename_prefix**: how the file's name starts.\n")),
             group("1. Model, and the patch of the first run", column(400, unet("model", SMALL)), column(220, shift("shift", 8)),
                   column(400, patch("first_patch", ADASPA, "First run: sparse attention", sparsity=-1))), prompt(size_of())],
            [group("3. First run: its pattern is saved", column(330, sampler("first", *SMALL_SAMPLING, title="First run: sampler")), column(330, ["keep", SAVE, {}, {"room": 120}]))],
            [group("4. Second run: another seed, the same pattern", column(330, ["load", LOAD, {}, {"room": 100}]), column(400, patch("patch", ADASPA, "Second run: sparse attention", sparsity=-1)),
                   column(330, sampler("sampler", *SMALL_SAMPLING, title="Second run: sampler", seed=SEED + 1)), column(600, report()))],
            saving("wan_pattern", 16),
        ],
        "links": links("""clip -> positive.clip, negative.clip
            model -> shift.model
            shift -> first_patch.model, load.model
            first_patch -> first.model, keep.model
            positive -> first.positive, sampler.positive
            negative -> first.negative, sampler.negative
            latent -> first.latent_image, sampler.latent_image
            first -> keep.samples
            keep:1 -> load.path
            load -> patch.model
            patch -> sampler.model, report.model
            sampler -> report.samples
            report -> decode.samples
            vae -> decode.vae
            decode -> video.images
            video -> save.video"""),
    }


def wan_dense_and_sparse() -> dict:
    model, settings = SMALL, SMALL_SAMPLING
    return {
        "name": "wan_dense_and_sparse",
        "stacks": [
            [notes(note("Read me", read_me(
                "Dense against sparse, side by side",
                "The same video twice, from the same seed: once as the model is (left), once with **Sparse Attention Patch (SVG)** (right). "
                "The saved video shows both next to one another, so it takes the time of two runs. It is the quickest way to see what a sparsity costs.",
                model, UMT5, WAN_VAE)),
                note("What to expect, and the knobs", expect(
                    "Look for the same composition and motion on both sides; small details may differ. On the right the first third of the steps is dense on purpose: "
                    "this small model needs a longer warm-up. The report tells how much was skipped, by layer and step, and how many milliseconds a sparse and a dense call took.",
                    "- **sparsity** -1 and **dense_layers** auto: what suits this model, gentler for this small one than for a large one. Set 0.5 or 0.8 to see how far it "
                    "goes; only the right side is computed anew.\n- **warmup_steps** up: the right side comes closer to the left, with less gain.\n"))),
             group("1. Model and patch", column(400, unet("model", model)), column(220, shift("shift", 8)), column(400, patch("patch", SVG, **AUTOMATIC))), prompt(size_of())],
            [group("3. Sample", column(330, sampler("dense", *settings, title="Dense"), sampler("sparse", *settings, title="Sparse: keep all values as in Dense")))],
            [group("4. Report", column(600, report()))],
            saving("wan_dense_and_sparse", 16, column(230, ["decode_dense", "VAEDecode", {}, {"title": "Decode: dense"}], ["decode_sparse", "VAEDecode", {}, {"title": "Decode: sparse"}]),
                   column(270, ["side", "ImageStitch", {"direction": "right", "spacing_width": 8, "spacing_color": "white"}, {"title": "Dense left, sparse right"}])),
        ],
        "links": links("""clip -> positive.clip, negative.clip
            model -> shift.model
            shift -> dense.model, patch.model
            patch -> sparse.model, report.model
            positive -> dense.positive, sparse.positive
            negative -> dense.negative, sparse.negative
            latent -> dense.latent_image, sparse.latent_image
            sparse -> report.samples
            dense -> decode_dense.samples
            report -> decode_sparse.samples
            vae -> decode_dense.vae, decode_sparse.vae
            decode_dense -> side.image1
            decode_sparse -> side.image2
            side -> video.images
            video -> save.video"""),
    }


def custom(steps: list, method: str, guider: list) -> list:
    """SamplerCustomAdvanced, and what it needs beside a latent."""
    parts = [["noise", "RandomNoise", {"noise_seed": SEED, "control_after_generate": "fixed"}], ["method", "KSamplerSelect", {"sampler_name": method}], steps, guider]
    return [group("3. Sample", column(330, *parts), column(260, ["sampler", "SamplerCustomAdvanced"]))]


CUSTOM = """noise -> sampler.noise
            method -> sampler.sampler
            sigmas -> sampler.sigmas
            guider -> sampler.guider
            """
SCHEDULE = {"scheduler": "simple", "steps": 20, "denoise": 1}


def hunyuan15_t2v() -> dict:
    model = file(HUNYUAN, "diffusion_models", "hunyuanvideo1.5_720p_t2v_fp16.safetensors")
    texts = [file(HUNYUAN, "text_encoders", name) for name in ("qwen_2.5_vl_7b_fp8_scaled.safetensors", "byt5_small_glyphxl_fp16.safetensors")]
    decoder = file(HUNYUAN, "vae", "hunyuanvideo15_vae_fp16.safetensors")
    return {
        "name": "hunyuan15_t2v",
        "stacks": [
            [notes(note("Read me", read_me(
                "HunyuanVideo 1.5 text to video with AdaSpa",
                "**AdaSpa Patch** stands between the model and the sampler and skips most of the attention. At 1280 x 720 and 121 frames that is where "
                f"most of the time goes. To compare, {BYPASS}", model, *texts, decoder)),
                note("What to expect, and the knobs", expect(
                    "While it samples, a line on **AdaSpa Patch** tells the step, the share skipped, and why calls stayed dense. The first 4 of the 20 steps are dense "
                    "on purpose: they fix the composition. The prompt's words are always kept.",
                    ADASPA_KNOBS.format(refresh="; -1 is once more later in the run, as in the paper")))),
             group("1. Model and patch", column(400, unet("model", model)), column(220, shift("shift", 7)), column(400, patch("patch", ADASPA))),
             prompt(size_of("EmptyHunyuanVideo15Latent", 1280, 720, 121), negative="", decoder=vae(decoder),
                    words="A paper airplane glides between skyscrapers at sunset, the camera follows close behind, golden light, traffic far below",
                    text_encoder=["clip", "DualCLIPLoader", {"clip_name1": texts[0]["name"], "clip_name2": texts[1]["name"], "type": "hunyuan_video_15"}, {"models": texts}])],
            custom(["sigmas", "BasicScheduler", SCHEDULE], "euler", ["guider", "CFGGuider", {"cfg": 6}]),
            [group("4. Report", column(600, report()))],
            saving("hunyuan15_sparse", 24),
        ],
        "links": links("""clip -> positive.clip, negative.clip
            model -> shift.model
            shift -> patch.model
            patch -> guider.model, sigmas.model, report.model
            positive -> guider.positive
            negative -> guider.negative
            latent -> sampler.latent_image
            """ + CUSTOM + """sampler -> report.samples
            report -> decode.samples
            vae -> decode.vae
            decode -> video.images
            video -> save.video"""),
    }


def wan_vace() -> dict:
    model = file(WAN21, "diffusion_models", "wan2.1_vace_14B_fp16.safetensors")
    return {
        "name": "wan_vace",
        "stacks": [
            [notes(note("Read me", read_me(
                "Wan VACE with a reference image, sparse",
                "VACE makes a video of what a reference image shows: choose yours in **Reference image**. **Sparse Attention Patch (SVG)** makes both of its stacks of "
                f"layers sparse, Wan's own and VACE's. To compare, {BYPASS}", model, UMT5, WAN_VAE)),
                note("What to expect, and the knobs", expect(
                    "While it samples, a line on the patch tells the step, the share skipped, and why calls stayed dense. The first 5 of the 20 steps are dense on purpose: "
                    "they fix the composition. The report lists VACE's layers after Wan's own.",
                    SVG_KNOBS + "- For a control video (pose, depth, a part to fill) connect it to control_video of **Reference and video size**; nothing else changes.\n",
                    "The small file wan2.1_vace_1.3B_fp16.safetensors works too: set sparsity to -1 then, which is gentler for it."))),
             group("1. Model and patch", column(400, unet("model", model)), column(220, shift("shift", 8)), column(400, patch("patch", SVG))),
             prompt(column(300, ["vace", "WanVaceToVideo", {"width": 832, "height": 480, "length": 81, "batch_size": 1, "strength": 1}, {"title": "Reference and video size"}]),
                    first=(["image", "LoadImage", {"image": "example.png"}, {"height": 300, "title": "Reference image"}],),
                    words="the subject walks through a sunlit forest, the camera circles slowly")],
            [group("3. Sample", column(330, sampler("sampler", 20, 6, "uni_pc")))],
            [group("4. Report", column(600, report()))],
            saving("wan_vace_sparse", 16, column(270, ["trim", "TrimVideoLatent", {}, {"title": "Cuts the reference's frame off"}]), column(230, ["decode", "VAEDecode"])),
        ],
        "links": links("""clip -> positive.clip, negative.clip
            model -> shift.model
            shift -> patch.model
            patch -> sampler.model, report.model
            positive -> vace.positive
            negative -> vace.negative
            vae -> vace.vae, decode.vae
            image -> vace.reference_image
            vace:0 -> sampler.positive
            vace:1 -> sampler.negative
            vace:2 -> sampler.latent_image
            vace:3 -> trim.trim_amount
            sampler -> report.samples
            report -> trim.samples
            trim -> decode.samples
            decode -> video.images
            video -> save.video"""),
    }


def ltx2_t2v() -> dict:
    model = file(LTX2, "checkpoints", "ltx-2-19b-dev-fp8.safetensors", folder="")
    gemma = file(LTX2_COMFY, "text_encoders", "gemma_3_12B_it_fp4_mixed.safetensors")
    return {
        "name": "ltx2_t2v",
        "stacks": [
            [notes(note("Read me", read_me(
                "LTX-2: video with sound, sparse",
                "One stage at full size, with **Sparse Attention Patch (SVG)** between the model and the sampler. The video's attention is made sparse; that of the sound, and "
                f"between sound and picture, is left as it is. To compare, {BYPASS}", model, gemma)),
                note("What to expect, and the knobs", expect(
                    "While it samples, a line on the patch tells the step, the share skipped, and why calls stayed dense. The first 4 of the 20 steps are dense on purpose: "
                    "they fix the composition. LTX-2 packs a video into few tokens, so at this size there is less to gain; at 1920 x 1088 there is more.",
                    SVG_KNOBS.replace("less gain.", "less gain. 4 here: LTX-2 spends many steps near full noise, so -1 would keep 7 dense."),
                    "Width and height are multiples of 32, the length is a multiple of 8, plus 1. In a two-stage graph with the upscaler, "
                    "patch the model of the second stage: the first one's video is too small to gain."))),
             group("1. Model and patch", column(400, ["model", "CheckpointLoaderSimple", {"ckpt_name": model["name"]}, {"models": [model]}]), column(400, patch("patch", SVG, warmup_steps=4))),
             prompt(column(300, ["rate", "LTXVConditioning", {"frame_rate": 24}],
                           ["latent", "EmptyLTXVLatentVideo", {"width": 1280, "height": 704, "length": 121, "batch_size": 1}, {"title": "Video size"}],
                           ["sound", "LTXVEmptyLatentAudio", {"frames_number": 121, "frame_rate": 24, "batch_size": 1}, {"title": "Sound: same length and rate"}]),
                    column(230, ["both", "LTXVConcatAVLatent"]),
                    words="A close-up of a street musician playing the violin in light rain at night, neon reflections on wet stone. "
                    "The melody is slow and clear, rain patters softly, the camera holds steady.",
                    negative="blurry, low quality, still frame, watermark, overlay, titles, subtitles",
                    text_encoder=["clip", "LTXAVTextEncoderLoader", {"text_encoder": gemma["name"], "ckpt_name": model["name"]}, {"models": [model, gemma]}],
                    decoder=["audio_vae", "LTXVAudioVAELoader", {"ckpt_name": model["name"]}, {"models": [model]}])],
            custom(["sigmas", "LTXVScheduler", {"steps": 20, "max_shift": 2.05, "base_shift": 0.95, "stretch": True, "terminal": 0.1}], "euler_ancestral", ["guider", "CFGGuider", {"cfg": 4}]),
            [group("4. Report", column(600, report()))],
            saving("ltx2_sparse", 24, column(230, ["apart", "LTXVSeparateAVLatent"]),
                   column(270, ["decode", "VAEDecodeTiled", {"tile_size": 512, "overlap": 64, "temporal_size": 4096, "temporal_overlap": 8}], ["decode_sound", "LTXVAudioVAEDecode"])),
        ],
        "links": links("""clip -> positive.clip, negative.clip
            positive -> rate.positive
            negative -> rate.negative
            audio_vae -> sound.audio_vae, decode_sound.audio_vae
            latent -> both.video_latent
            sound -> both.audio_latent
            model -> patch.model
            patch -> guider.model, report.model
            rate:0 -> guider.positive
            rate:1 -> guider.negative
            both -> sampler.latent_image, sigmas.latent
            """ + CUSTOM + """sampler -> report.samples
            report -> apart.av_latent
            apart:0 -> decode.samples
            apart:1 -> decode_sound.samples
            model:2 -> decode.vae
            decode -> video.images
            decode_sound -> video.audio
            video -> save.video"""),
    }


def minimax_h3_t2v() -> dict:
    model = file(H3, "diffusion_models", "minimax_h3_fl2va_pruned_int8_convrot.safetensors")
    qwen = file(H3, "text_encoders", "qwen3vl_32b_minimax_h3_nvfp4_awq.safetensors")
    picture, sound = (file(H3, "vae", f"minimax_h3_{name}.safetensors") for name in ("video_vae_fp16", "audio_vae_fp32"))
    return {
        "name": "minimax_h3_t2v",
        "stacks": [
            [notes(note("Read me", read_me(
                "MiniMax H3: video with sound, sparse",
                "**Needs ComfyUI 0.33 or later**: older ones have no MiniMax H3. **Sparse Attention Patch (SVG)** stands between the model and the sampler. Prompt and sound are "
                f"always kept, only the video's own attention is made sparse. To compare, {BYPASS}", model, qwen, picture, sound)),
                note("What to expect, and the knobs", expect(
                    "While it samples, a line on the patch tells the step, the share skipped, and why calls stayed dense. The first 4 of the 20 steps are dense on purpose: "
                    "they fix the composition. There are no published settings for this model; these are the node's own.",
                    SVG_KNOBS, "The full size of the model, 1344 x 768, has more to gain. Give first_frame an image to start from it."))),
             group("1. Model and patch", column(400, unet("model", model)), column(400, patch("patch", SVG))),
             group("2. Prompt and size", column(420, clip(qwen, "minimax"), vae(picture, "vae", "Video VAE"), vae(sound, "audio_vae", "Audio VAE")),
                   column(430, ["prompt", "MiniMaxH3ImageToVideo", {
                       "prompt": "Live-action film look. [0s-2s] A lighthouse on a cliff in a storm, waves break below. [2s-5s] The camera climbs to the lamp, which turns slowly. "
                       "Audio: wind, surf, a distant fog horn, no music. No text or subtitles.", "width": 864, "height": 480, "length": 124,
                   }, {"title": "Prompt and video size", "height": 420}]))],
            custom(["sigmas", "BasicScheduler", SCHEDULE], "res_multistep", ["guider", "BasicGuider"]),
            [group("4. Report", column(600, report()))],
            saving("minimax_h3_sparse", 24, column(230, ["decode", "VAEDecode"], ["decode_sound", "VAEDecodeAudio"])),
        ],
        "links": links("""clip -> prompt.clip
            vae -> prompt.vae, decode.vae
            audio_vae -> decode_sound.vae
            model -> patch.model
            patch -> guider.model, sigmas.model, report.model
            prompt:0 -> guider.conditioning
            prompt:1 -> sampler.latent_image
            """ + CUSTOM + """sampler -> report.samples
            report -> decode.samples, decode_sound.samples
            decode -> video.images
            decode_sound -> video.audio
            video -> save.video"""),
    }


SPECS = (wan_t2v_svg, wan_t2v_adaspa, wan_t2v_auto, wan_probe, wan_pattern, wan22_t2v, wan22_i2v, wan_dense_and_sparse, hunyuan15_t2v, wan_vace, wan22_t2v_4_steps, ltx2_t2v, minimax_h3_t2v)


# ---- the subgraph blueprints: ComfyUI lists them in its node library ----

SAMPLING = {"seed": 0, "control_after_generate": "randomize", "steps": 20, "cfg": 6, "sampler_name": "euler", "scheduler": "simple", "denoise": 1}


def blueprint(name: str, description: str, columns: list[dict], inside: str, inputs: str, outputs: str, shown: tuple[str, ...]) -> dict:
    """One subgraph: its nodes and their links, then its own inputs and outputs as "name: node.slot, node.slot" lines.

    shown: the nodes within whose pictures it shows on its outside.
    """
    def ends(text: str) -> list:
        return [[name.strip(), [end.strip().split(".", 1) for end in ends.split(",")]] for name, _, ends in (line.partition(":") for line in text.strip().splitlines())]

    return {
        "name": name, "description": description, "category": "Video generation and editing/Sparse attention", "stacks": [[one] for one in columns], "links": links(inside),
        "inputs": ends(inputs), "outputs": ends(outputs), "shown": shown, "blueprint": True,
    }


def sparse_sampling(kind: str, short: str) -> dict:
    return blueprint(
        f"Sparse Sampling with Report ({short})",
        f"Samples a video with sparse attention: the {short} patch, a KSampler and the report in one, in place of a KSampler. sparsity -1 is what suits the model.",
        [group("Patch", column(400, patch("patch", kind, **AUTOMATIC))), group("Sample", column(340, ["sampler", "KSampler", SAMPLING])), group("Report", column(420, report()))],
        """patch -> sampler.model, report.model
        sampler -> report.samples""",
        """model: patch.model
        positive: sampler.positive
        negative: sampler.negative
        latent_image: sampler.latent_image
        seed: sampler.seed
        steps: sampler.steps
        cfg: sampler.cfg
        sampler_name: sampler.sampler_name
        scheduler: sampler.scheduler
        denoise: sampler.denoise
        sparsity: patch.sparsity
        warmup_steps: patch.warmup_steps""",
        """samples: report.samples
        picture: report.picture
        json: report.json""",
        ("sampler", "report"),
    )


def sparse_svg() -> dict:
    return sparse_sampling(SVG, "SVG")


def sparse_adaspa() -> dict:
    return sparse_sampling(ADASPA, "AdaSpa")


def sparse_two_stages() -> dict:
    def sampling(name: str, first: bool) -> list:
        return [name, "KSamplerAdvanced", {
            "add_noise": "enable" if first else "disable", "noise_seed": 0, "control_after_generate": "randomize" if first else "fixed", "steps": 20, "cfg": 3.5,
            "sampler_name": "euler", "scheduler": "simple", "start_at_step": 0 if first else 10, "end_at_step": 10 if first else 10_000,
            "return_with_leftover_noise": "enable" if first else "disable",
        }, {"title": f"{'High' if first else 'Low'} noise: sampler"}]

    return blueprint(
        "Sparse Two-Stage Sampling (Wan 2.2)",
        "Samples a video in two stages with sparse attention: for each of Wan 2.2's networks, high and low noise, an SVG patch, a sampler and a report. "
        "switch_at_step is the first step of the low-noise network. sparsity -1 is what suits the model.",
        [
            group("High noise: patch", column(400, patch("high_patch", SVG, "High noise: sparse attention", **AUTOMATIC))),
            group("High noise: first steps", column(340, sampling("high", True), report("high_report", "High noise: report"))),
            group("Low noise: patch", column(400, patch("low_patch", SVG, "Low noise: sparse attention", **AUTOMATIC))),
            group("Low noise: last steps", column(340, sampling("low", False), report("low_report", "Low noise: report"))),
        ],
        """high_patch -> high.model, high_report.model
        low_patch -> low.model, low_report.model
        high -> high_report.samples
        high_report -> low.latent_image
        low -> low_report.samples""",
        """high_noise_model: high_patch.model
        low_noise_model: low_patch.model
        positive: high.positive, low.positive
        negative: high.negative, low.negative
        latent_image: high.latent_image
        seed: high.noise_seed
        steps: high.steps, low.steps
        switch_at_step: high.end_at_step, low.start_at_step
        cfg: high.cfg, low.cfg
        sampler_name: high.sampler_name, low.sampler_name
        scheduler: high.scheduler, low.scheduler
        sparsity: high_patch.sparsity, low_patch.sparsity""",
        """samples: low_report.samples
        high_noise_picture: high_report.picture
        low_noise_picture: low_report.picture
        high_noise_json: high_report.json
        low_noise_json: low_report.json""",
        ("high", "low", "high_report", "low_report"),
    )


def probe_then_sparse() -> dict:
    return blueprint(
        "Probe, then Sparse Sampling (SVG)",
        "Finds out for a model how sparse it may be, then samples with that: one run measures the error of each layer at 80, 70 and 60 percent skipped, and a second one "
        "takes the sparsity and the dense layers that keep it below max_error. Another seed does not measure again.",
        [
            group("1. Measure", column(400, patch("patch", SVG, "Sparse attention to be measured", sparsity=0.8, dense_layers=""), ["probe", PROBE, {}])),
            group("2. Sample once", column(340, ["probing", "KSampler", {**SAMPLING, "control_after_generate": "fixed"}, {"title": "Sampler of the measured run"}], ["results", RESULTS])),
            group("3. Sparse as suggested", column(400, patch("suggested", SVG, "Sparse attention as suggested"))),
            group("4. Sample", column(340, ["sampler", "KSampler", SAMPLING], report())),
        ],
        """patch -> probe.model
        probe -> probing.model, results.model
        probing -> results.samples
        results:3 -> suggested.dense_layers
        results:4 -> suggested.sparsity
        suggested -> sampler.model, report.model
        sampler -> report.samples""",
        """model: patch.model, suggested.model
        positive: sampler.positive, probing.positive
        negative: sampler.negative, probing.negative
        latent_image: sampler.latent_image, probing.latent_image
        seed: sampler.seed
        steps: sampler.steps, probing.steps
        cfg: sampler.cfg, probing.cfg
        sampler_name: sampler.sampler_name, probing.sampler_name
        scheduler: sampler.scheduler, probing.scheduler
        max_error: results.max_error""",
        """samples: report.samples
        picture: report.picture
        table: results.table
        json: report.json
        dense_layers: results.dense_layers
        sparsity: results.sparsity""",
        ("sampler", "report"),
    )


BLUEPRINTS = (sparse_svg, sparse_adaspa, sparse_two_stages, probe_then_sparse)


def saved(path: Path) -> dict:
    """A file as a spec: loaded, and saved again with the inputs that its nodes have now."""
    return {"name": path.stem, "graph": json.loads(path.read_text(encoding="utf-8"))}


def nodes_of(spec: dict) -> list[list]:
    """In the order in which they are made."""
    return [node for stack in spec["stacks"] for one in stack for part in one["columns"] for node in part["nodes"]]


def model_files(spec: dict) -> list[dict]:
    if "graph" in spec:
        return [model for node in spec["graph"]["nodes"] for model in node["properties"].get("models", ())]
    return [model for node in nodes_of(spec) if len(node) > 3 for model in node[3].get("models", ())]


def main(names: list[str]) -> int:
    comfyui, out = Path(os.environ["COMFYUI_PATH"]).expanduser(), Path(os.environ.get("OUT", ROOT))
    folder_of = out / "workflows"
    check = "--check" in names
    names = [name for name in names if name != "--check"]
    made = [] if check else [make() for make in (*SPECS, *BLUEPRINTS)]
    drawn = [path for path in sorted(folder_of.glob("*.json")) if path.stem not in {spec["name"] for spec in made}]
    for spec in made:  # the same each time, so that the frontend keeps files apart, and saves of one file together
        spec["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"sparse-video-attention/workflows/{spec['name']}"))
        spec["names"] = [node[0] for node in nodes_of(spec)]
    specs = [spec for spec in (*made, *(saved(path) for path in drawn)) if not names or spec["name"] in names]
    for room in ("workflows", "subgraphs"):
        (out / room).mkdir(parents=True, exist_ok=True)
    arguments = ("--front-end-root", os.environ["FRONTEND"]) if "FRONTEND" in os.environ else ()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        for spec in specs:
            for model in model_files(spec):
                path = base / "models" / model["directory"] / model["name"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
        (base / "input").mkdir()
        shutil.copy(comfyui / "input" / "example.png", base / "input")
        (base / "specs.json").write_text(json.dumps(specs))
        with ComfyServer(comfyui, base, folder="SparseVideoAttention", arguments=arguments) as server:
            failed = 0
            for design in (False, True) if check else (False,):
                server.post("/settings", {
                    "Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": design, "Comfy.Minimap.Visible": False, "LiteGraph.Canvas.MinFontSizeForLOD": 0,
                })
                failed |= subprocess.run([
                    "node", str(Path(__file__).with_suffix(".js")), os.environ["PLAYWRIGHT_CORE"], str(server.port), str(base / "specs.json"),
                    str(out), "check" if check else "write",
                ]).returncode
            return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

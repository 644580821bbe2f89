"""The demo's command: python demo/run.py --help says what it does. It needs what requirements-dev.txt lists."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Instead of this folder, whose modules belong to the package `pack.demo`.
sys.path[0] = str(ROOT / "tools")

from load_pack import load_pack  # noqa: E402

load_pack()

import torch  # noqa: E402
from pack.demo import attention_call, measures, pictures  # noqa: E402
from pack.demo.clips import ORDER, load_clips, to_pixels  # noqa: E402
from pack.demo.comfy_host import ComfyHost, NoComfyUIError, find_comfyui  # noqa: E402
from pack.demo.embedded import EmbeddedHost  # noqa: E402
from pack.demo.other_work import MUCH, OtherWork  # noqa: E402
from pack.demo.runs import RUNS, Host, Job, Outcome, Run  # noqa: E402
from tqdm import tqdm  # noqa: E402

_DESCRIPTION = """Generates the same short video four times with a small trained Wan image-to-video model on the CPU: dense, with SVG, with AdaSpa
and with Auto. Prints how much attention was skipped, the seconds and how near each is to the dense video; times one longer attention
call; and writes a video for each run, a side-by-side picture and report.json."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; ends the program with a message where they are wrong."""
    parser = argparse.ArgumentParser(prog="python demo/run.py", description=_DESCRIPTION)
    parser.add_argument(
        "--host", choices=["auto", "embedded", "comfyui"], default="auto",
        help="what runs the model. embedded: the diffusers library. comfyui: the ComfyUI at COMFYUI_PATH, or the one whose custom_nodes this "
        "folder lies in, started without a window by COMFYUI_PYTHON or by the venv in its folder. auto: comfyui where there is one, else embedded",
    )
    parser.add_argument("--steps", type=int, default=20, help="sampling steps, 2 or more (default 20, what the model is judged at)")
    parser.add_argument("--clips", type=int, default=1, help=f"how many real clips to continue, 1 to {len(ORDER)}, in one batch (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the starting noise and of SVG's sampled rows (default 0)")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "demo", metavar="DIR", help="where to write (default output/demo)")
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error(f"--steps {options.steps}: AdaSpa searches in one step and uses it in the next, so 2 is the least")
    if not 1 <= options.clips <= len(ORDER):
        parser.error(f"--clips {options.clips}: there are {len(ORDER)} clips")
    if not 0 <= options.seed < 2**63:
        parser.error(f"--seed {options.seed}: seeds are from 0 up")
    return options


def make_folder(folder: Path) -> None:
    """Makes the output folder; ends the program with a sentence where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        sys.exit(f"--output {folder}: cannot write there ({error.strerror})")


def open_host(choice: str, stack: ExitStack) -> Host:
    """The host asked for. "auto" falls back to the embedded one, saying why; "comfyui" raises NoComfyUIError instead."""
    comfyui = find_comfyui() if choice != "embedded" else None
    if comfyui is None:
        if choice == "comfyui":
            raise NoComfyUIError("no ComfyUI: COMFYUI_PATH is not set, and this folder does not lie in a custom_nodes")
        return EmbeddedHost()
    try:
        print(f"Starting ComfyUI at {comfyui} ...", flush=True)
        return stack.enter_context(ComfyHost(comfyui))
    except NoComfyUIError as error:
        if choice == "comfyui":
            raise
        print(f"ComfyUI is not used: {error}. Going on with the embedded host instead.", flush=True)
        return EmbeddedHost()


def sample(host: Host, run: Run, job: Job) -> Outcome:
    """One run under a progress bar with its sparsity so far."""
    with tqdm(total=job.steps, desc=f"{run.title:>6}", unit="step") as bar:

        def on_step(done: int, sparsity: float) -> None:
            bar.set_postfix_str(f"{sparsity:.0%} of attention skipped so far", refresh=False)
            bar.update(done - bar.n)
            bar.refresh()

        return host.run(run, job, on_step)


def report_of(run: Run, outcome: Outcome, dense: Outcome, job: Job) -> dict:
    """One entry of "runs": the record, and what was measured beside it."""
    video, reference, real = (to_pixels(latents) for latents in (outcome.latents, dense.latents, job.clips.latents))
    return {
        **outcome.record, "density": round(1 - outcome.record["achieved_sparsity"], 6), "seconds": round(outcome.seconds, 3),
        "psnr_db": measures.psnr_db(reference, video), "ssim": measures.ssim(reference, video),
        "psnr_db_by_clip": [measures.psnr_db(*pair) for pair in zip(reference.split(1), video.split(1), strict=True)],
        "psnr_db_to_real_clip": measures.psnr_db(real, video), "frames": video.shape[1], "video": f"{run.name}.mp4",
    }


def write_files(folder: Path, job: Job, outcomes: dict[str, Outcome], report: dict) -> list[Path]:
    """All files of the demo, newly written."""
    videos = {name: to_pixels(outcome.latents) for name, outcome in outcomes.items()}
    files = [folder / f"{run.name}.mp4" for run in RUNS]
    for run, path in zip(RUNS, files, strict=True):
        pictures.write_video(path, videos[run.name])
    real, blocks = to_pixels(job.clips.latents), []
    for number, name in enumerate(job.clips.names):
        rows = [("real clip\n(the model is given\nits first frame only)", real[number])]
        for run, entry in zip(RUNS, report["runs"], strict=True):
            near = entry["psnr_db_by_clip"][number]
            figures = "" if run.method is None else f"\n{entry['achieved_sparsity']:.0%} skipped\n" + (
                "equal to dense" if near is None else f"{near:.1f} dB to dense"
            )
            rows.append((run.title + figures, videos[run.name][number]))
        blocks.append((name, rows))
    files += [folder / "side_by_side.png", folder / "report.json"]
    pictures.write_side_by_side(files[-2], blocks)
    files[-1].write_text(json.dumps(report, indent=1) + "\n")
    return files


def print_runs(report: dict, job: Job) -> None:
    """The table of the four runs, and what to make of it."""
    rows = []
    for run, entry in zip(RUNS, report["runs"], strict=True):
        rows.append([
            run.title, _asked(entry), f"{entry['achieved_sparsity']:.3f}", f"{entry['run_sparsity']:.3f}",
            f"{entry['seconds']:.1f}", "-" if entry["psnr_db"] is None else f"{entry['psnr_db']:.2f}", f"{entry['ssim']:.3f}", f"{entry['frames']}",
        ])
    heads = ["run", "asked", "achieved", "whole run", "seconds", "PSNR dB", "SSIM", "frames"]
    names, tokens = job.clips.names, job.layout.seq_len
    print(f"\n{len(names)} clip{'s' if len(names) > 1 else ''} ({', '.join(names)}), {job.layout} = {tokens} tokens each, {job.steps} steps\n")
    print(measures.table(heads, rows))
    print(
        "\nachieved: skipped share of query-key pairs, mean over the calls that ran sparse; whole run: over all, with the dense warm-up."
        "\nPSNR and SSIM: against the dense run's frames. Auto is asked for an error of attention, and skips what that leaves."
        f"\n{gain(report['runs'])} The dense warm-up, finding what to keep and all"
        "\nwork that is not attention take what they take: a short video has less to gain than a longer one, which the next table is about."
    )
    for note in dict.fromkeys(note for entry in report["runs"] for note in entry["notes"]):
        print(f"Note: {note}.")


def _asked(entry: dict) -> str:
    """What a run was asked for: a share to skip, or the most that it may be off."""
    return f"off {entry['asked_error']:.2f}" if entry["asked_sparsity"] is None else f"{entry['asked_sparsity']:.2f}"


def gain(runs: list[dict]) -> str:
    """How the sparse runs' seconds compare with the dense run's, in a sentence."""
    dense, *sparse = (entry["seconds"] for entry in runs)
    parts = []
    for run, seconds in zip(RUNS[1:], sparse, strict=True):
        change = round(100 * (seconds / dense - 1))
        parts.append(f"{run.title} took " + (f"{abs(change)}% {'less' if change < 0 else 'more'} time" if change else "as long"))
    return f"Against the dense run, {', '.join(parts[:-1])} and {parts[-1]}."


def print_call(call: dict) -> None:
    """The table of the attention call, and what is gained."""
    rows = [["dense", "0.000", f"{call['dense_seconds']:.2f}", "1.00x", "-", "-", "-"]]
    titles = {run.name: run.title for run in RUNS}
    for name, entry in call["methods"].items():
        rows.append([
            titles[name], f"{entry['sparsity']:.3f}", f"{entry['seconds']:.2f}", f"{entry['speed_up']:.2f}x", f"{entry['planning_seconds']:.2f}",
            f"{entry['planning_steps']} of {entry['run_steps']}", f"{entry['run_speed_up']:.2f}x",
        ])
    print(f"\nOne attention call: {call['layout']} = {call['tokens']} tokens, {call['heads']} heads of {call['head_dim']}, {call['dtype']}\n")
    print(measures.table(["run", "sparsity", "seconds", "speed-up", "planning", "in steps", "in a run"], rows))
    adaspa, auto = call["methods"]["adaspa"], call["methods"]["auto"]
    counts = [entry["searching_steps"] for entry in (adaspa, auto)]
    adaspa_steps, auto_steps = ("the last warm-up step" if count == 1 else f"the last {count} warm-up steps" for count in counts)
    print(
        f"\nseconds: median of {call['repeats']}, dense and sparse in turns. planning: seconds to choose what to keep, apart from that; for Auto to"
        "\ncheck what came out."
        f"\nin a run: this layer's speed-up over {call['steps']} steps, with the dense warm-up and all planning."
        f"\nAdaSpa's first search takes {adaspa['searching_seconds']:.2f} s in {adaspa_steps}, Auto's {auto['searching_seconds']:.2f} s in"
        f"\n{auto_steps}, the dense outputs of these steps included."
    )


def device() -> str:
    """Where it ran."""
    return f"cpu, {torch.get_num_threads()} threads, torch {torch.__version__}"


def main(options: argparse.Namespace) -> None:
    """The whole demo."""
    job = Job(load_clips(options.clips), options.steps, options.seed)
    outcomes: dict[str, Outcome] = {}
    make_folder(options.output)
    with ExitStack() as stack:
        host = open_host(options.host, stack)
        print(f"Host: {host.name}. Device: {device()}.", flush=True)
        host.warm_up(job)
        during_runs = OtherWork(host.process_ids())
        for run in RUNS:
            outcomes[run.name] = sample(host, run, job)
        others = during_runs.share()
    runs = [report_of(run, outcomes[run.name], outcomes["dense"], job) for run in RUNS]
    report = {"host": host.name, "device": device(), "clips": list(job.clips.names), "runs": runs}
    print_runs(report, job)
    during_call = OtherWork((os.getpid(),))
    with tqdm(total=attention_call.count_ticks(), desc="  call", leave=False) as bar:
        report["attention_call"] = attention_call.measure(steps=job.steps, tick=bar.update)
    others = max((share for share in (others, during_call.share()) if share is not None), default=None)
    report["other_work"] = None if others is None else round(others, 2)
    print_call(report["attention_call"])
    if others is not None and others > MUCH:
        print(f"\nOther programs took {others:.0%} of this machine's processors meanwhile: the seconds are not to be relied on.")
    files = write_files(options.output, job, outcomes, report)
    print("\nWritten:\n" + "\n".join(f"  {path}" for path in files))


if __name__ == "__main__":
    try:
        main(parse())
    except NoComfyUIError as error:
        sys.exit(f"ComfyUI cannot be used: {error}")

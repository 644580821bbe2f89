"""Trains the small Wan model: python -m training.train --output FOLDER. A second call with the same folder goes on where the first ended."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pack.demo.clips import first_frames, model_input
from safetensors.torch import load_file
from torch import Tensor

from .clips import CURRICULUM, Clips, NoClipsError, Phase, draw, load_clips, phase_at
from .model import Size, WanVideo, initialise, place_heads
from .optimiser import Optimiser

# Of the timesteps' density: the sampler's own shift.
_SHIFT = 3.0


@dataclass(frozen=True)
class Settings:
    """What a run is; kept in its checkpoint. When a run goes on, only `steps` may be others.

    start: the name of the weights that it began with, "" for fresh ones. places: how strong the heads' first sense of place is.
    sharpen: a factor on the first gains of the queries, so on all scores. batch: a factor on the curriculum's clips a step. ema: decay of
    the moving average that is exported, shorter at first.
    """

    seed: int = 0
    steps: int = 20_000
    muon_rate: float = 0.01
    adam_rate: float = 1e-3
    warmup: int = 20
    start: str = ""
    places: float = 1.5
    sharpen: float = 1.0
    batch: int = 1
    cooldown: float = 0.2
    ema: float = 0.998
    size: Size = field(default_factory=Size)
    curriculum: tuple[Phase, ...] = CURRICULUM


class Trainer:
    """A model, its moving average and its optimiser. Every step is a pure function of the state, the seed and the step's number.

    begin: weights to begin with, by ComfyUI's names. workers: threads that share a step's clips; they change nothing but the time. One
    thread a clip waits for the others once a step; threads within each product would do so a thousand times.
    """

    def __init__(self, settings: Settings, clips: Clips, device: str = "cpu", begin: dict[str, Tensor] | None = None, workers: int = 1):
        self.settings, self.clips, self.device = settings, clips, torch.device(device)
        self.workers = ThreadPoolExecutor(workers)
        self.model = WanVideo(settings.size)
        initialise(self.model, settings.seed)
        if begin:
            self.model.load_state_dict({name: weight.float() for name, weight in begin.items()})
        place_heads(self.model, settings.places, settings.sharpen)
        self.model.to(self.device)
        self.ema = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        self.optimiser = Optimiser(self.model)
        self.done = 0
        self.losses: list[tuple[int, float]] = []  # step, running mean

    def step(self) -> Tensor:
        """One step; its loss, a scalar on the device."""
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + self.done)
        latents, text = draw(self.clips, phase_at(self.done / settings.steps, settings.curriculum), generator, settings.batch)
        sigma = draw_sigmas(len(latents), generator)
        noise = torch.randn(latents.shape, generator=generator)
        batch = [part.to(self.device) for part in (latents, text, sigma, noise)]
        # A GPU takes all clips at once.
        parts = [batch] if self.device.type != "cpu" else zip(*(part.split(1) for part in batch), strict=True)
        losses, gradients = zip(*self.workers.map(lambda part: self._gradients(*part), parts), strict=True)
        for weight, *shares in zip(self.model.parameters(), *gradients, strict=True):
            weight.grad = torch.stack(shares).mean(0) if len(shares) > 1 else shares[0]
        rate = learning_rate(self.done, settings)
        self.optimiser.step(settings.muon_rate * rate, settings.adam_rate * rate, self.workers.map)
        self.done += 1
        self._average()
        return torch.stack(losses).mean()

    def _gradients(self, latents: Tensor, text: Tensor, sigma: Tensor, noise: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = self.loss(latents, text, sigma, noise)
        return loss.detach(), torch.autograd.grad(loss, list(self.model.parameters()))

    def loss(self, latents: Tensor, text: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """Flow matching (arXiv 2210.02747): the squared error of noise - x0 at x = (1 - sigma) x0 + sigma noise."""
        part = sigma[:, None, None, None, None]
        with torch.autocast(self.device.type, torch.bfloat16):
            predicted = self.model(model_input((1 - part) * latents + part * noise, first_frames(latents)), sigma, text)
        return (predicted - (noise - latents)).square().mean()

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.settings.ema, (1 + self.done) / (10 + self.done))
        torch._foreach_lerp_(list(self.ema.values()), [weight.detach() for weight in self.model.parameters()], 1 - decay)

    def save(self, path: Path) -> None:
        """Writes the whole state, in one move: an interrupted call leaves the last one whole."""
        state = {
            "settings": dataclasses.asdict(self.settings), "done": self.done, "model": self.model.state_dict(), "ema": self.ema,
            "optimiser": self.optimiser.state_dict(), "losses": self.losses,
        }
        unfinished = path.with_suffix(".unfinished")
        torch.save(state, unfinished)
        os.replace(unfinished, path)

    def load(self, path: Path) -> None:
        """The state of a file of `save`. Raises ValueError where it is of other settings (`steps` apart)."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        mine, theirs = (_plain(settings) for settings in (dataclasses.asdict(self.settings), dataclasses.asdict(Settings()) | state["settings"]))
        other = {name: theirs[name] for name in mine if name != "steps" and mine[name] != theirs[name]}
        if other:
            raise ValueError(f"{path} was trained with other settings: {other}")
        self.model.load_state_dict(state["model"])
        for name, weight in self.ema.items():
            weight.copy_(state["ema"][name])
        self.optimiser.load_state_dict(state["optimiser"])
        self.done, self.losses = state["done"], state["losses"]


def _plain(settings: dict) -> dict:
    """With lists for tuples, as a checkpoint may have either."""
    return json.loads(json.dumps(settings))


def draw_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """As the sampler visits them: times evenly over the run, one in each of `count` equal parts of it, then shifted; float32 [count].

    The logit-normal density of SD3 (arXiv 2403.03206, section 3.1) has little near 1, where a first frame's motion is decided.
    """
    time = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return _SHIFT * time / (1 + (_SHIFT - 1) * time)


def learning_rate(step: int, settings: Settings) -> float:
    """0 to 1: a linear warm-up, constant, then down to 0 along a straight line over the last `cooldown` of the steps."""
    left = (settings.steps - step) / max(1, settings.cooldown * settings.steps)
    return min(1.0, (step + 1) / settings.warmup, max(left, 0.0))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for checkpoint.pt and log.txt; outside the repository")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--workers", type=int, default=2, help="threads of the CPU, of which each computes a clip of a step (default 2)")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="of the whole run; the learning rate falls over the last fifth of them")
    parser.add_argument("--start-from", type=Path, metavar="FILE", help="weights of this architecture to begin with (safetensors, ComfyUI's names)")
    parser.add_argument("--places", type=float, default=Settings.places, help="strength of the heads' first sense of place (default 1.5)")
    parser.add_argument("--sharpen", type=float, default=Settings.sharpen, help="a factor on all attention scores at the beginning (default 1)")
    parser.add_argument("--batch", type=int, default=Settings.batch, help="a factor on the clips of a step (default 1; more is quicker on a GPU)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-seconds", type=float, default=180, help="between checkpoints (default 180)")
    arguments = parser.parse_args()
    settings = Settings(
        seed=arguments.seed, steps=arguments.steps, start=arguments.start_from.name if arguments.start_from else "", places=arguments.places,
        sharpen=arguments.sharpen, batch=arguments.batch,
    )
    torch.set_num_threads(1)
    begin = load_file(arguments.start_from) if arguments.start_from else None
    try:
        trainer = Trainer(settings, load_clips(settings.size.text), arguments.device, begin, arguments.workers)
    except NoClipsError as error:
        parser.exit(1, f"{error}\n")
    arguments.output.mkdir(parents=True, exist_ok=True)
    run(trainer, arguments.output, arguments.save_seconds)


def run(trainer: Trainer, folder: Path, save_seconds: float) -> None:
    """Steps until all are done or SIGTERM or SIGINT comes; the checkpoint is up to date at the end."""
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.is_file():
        trainer.load(checkpoint)
    stop = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.append(1))
    mean, saved, start, since = None, time.monotonic(), time.monotonic(), trainer.done
    with open(folder / "log.txt", "a", buffering=1, encoding="utf-8") as log:
        while trainer.done < trainer.settings.steps and not stop:
            loss = float(trainer.step())
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss of step {trainer.done} is {loss}; the checkpoint of before is kept")
            mean = loss if mean is None else mean + (loss - mean) * 0.02
            if trainer.done % 25 == 0:
                seconds = (time.monotonic() - start) / (trainer.done - since)
                log.write(f"step {trainer.done}/{trainer.settings.steps} loss {mean:.4f} seconds/step {seconds:.2f}\n")
                trainer.losses.append((trainer.done, round(mean, 5)))
            if time.monotonic() - saved > save_seconds:
                trainer.save(checkpoint)
                saved = time.monotonic()
    trainer.save(checkpoint)


if __name__ == "__main__":
    main()

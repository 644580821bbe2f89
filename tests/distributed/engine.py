"""A small sequence-parallel engine, and what one of its processes does: run by test_ulysses.py.

The tiny Wan of host_double.py with 4 heads, its tokens split over the processes, as xDiT and the packs on it do:
- "ulysses": queries, keys and values are exchanged before attention, so that a process has a share of the heads and the whole
  sequence, and the outputs are exchanged back;
- "gathered": each process attends with its part of the queries to all keys;
- "ring": each process attends to one part of the keys after the other, and joins the results by their LSE.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent.parent / "tools")]

import host_double  # noqa: E402
from load_pack import load_pack  # noqa: E402

HEADS, STEPS, FRAMES, SIZE = 4, 4, 9, (16, 16)
SETTINGS = {"sparsity": 0.4, "dense_layers": "", "min_tokens": 0}
RUNS = {
    "svg": ("svg", {}),
    "adaspa": ("adaspa", {"head_adaptive": False}),
    "adaspa, raster, two searches": ("adaspa", {"head_adaptive": False, "token_order": "raster", "cache_refresh": 2}),
    "adaspa, head_adaptive": ("adaspa", {"head_adaptive": True}),
}


def to_heads(tensor):
    """[B, S/W, H*D] of all heads to [B, S, H*D/W] of this process's."""
    parts = torch.stack(tensor.chunk(dist.get_world_size(), -1)).contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts)
    return torch.cat(list(received), 1)


def to_sequence(tensor):
    """The inverse."""
    parts = torch.stack(tensor.chunk(dist.get_world_size(), 1)).contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts)
    return torch.cat(list(received), -1)


def gathered(tensor):
    """[B, S/W, X] of every process, in their order."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts


def alone(q, k, v, options):
    return host_double.optimized_attention(q, k, v, heads=HEADS, transformer_options=options)


def ulysses(q, k, v, options):
    heads = HEADS // dist.get_world_size()
    return to_sequence(host_double.optimized_attention(*map(to_heads, (q, k, v)), heads=heads, transformer_options=options))


def to_all_keys(q, k, v, options):
    return alone(q, *(torch.cat(gathered(tensor), 1) for tensor in (k, v)), options)


def ring(q, k, v, options):
    def by_head(tensor):
        return tensor.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    outputs, sums = [], []
    for part_k, part_v in zip(gathered(k), gathered(v), strict=True):
        outputs.append(by_head(alone(q, part_k, part_v, options)))
        scores = by_head(q) @ by_head(part_k).transpose(-1, -2) * (q.shape[-1] // HEADS) ** -0.5
        sums.append(scores.logsumexp(-1, keepdim=True))
    shares = torch.stack(sums).softmax(0)
    return sum(share * output for share, output in zip(shares, outputs, strict=True)).transpose(1, 2).flatten(2)


class WanModel(host_double.WanModel):
    """Named as the host's: the pack finds its row by that. attend: one of the ways above; split: whether tokens are."""

    attend, split = staticmethod(alone), False

    def run(self, tokens, text, grid, options, **kwargs):
        if self.split:
            tokens = tokens.chunk(dist.get_world_size(), 1)[dist.get_rank()]
        options.update(grid_sizes=torch.Size(grid), total_blocks=self.layers, block_type="double")
        for layer in range(self.layers):
            options["block_index"] = layer
            tokens = tokens + self.attend(*self.split_qkv(layer, tokens), options)
            tokens = tokens + self.cross_attention(layer, tokens, text, heads=HEADS, transformer_options=options)
        return torch.cat(gathered(tokens), 1) if self.split else tokens


def sample(attend, split, run=None):
    """(the latent, the record as JSON, the closing lines) of one video with guidance; run: one of RUNS, None for the unpatched model."""
    from pack.attention.methods import METHODS
    from pack.nodes import host, patch

    torch.manual_seed(0)
    network = WanModel(16, 32).requires_grad_(False)
    network.attend, network.split = attend, split
    model, lines = host_double.ModelPatcher(host_double.BaseModel(network)), []
    host.show_text = lambda text, *_: lines.append(text)
    if run is not None:
        name, settings = RUNS[run]
        method = next(method for method in METHODS.values() if name == method.NAME.lower())
        model = patch.install(model, method, method.CONFIG(**{**SETTINGS, **settings}), "5")
    guider = host_double.CFGGuider(model)
    guider.set_conds(*([[torch.randn(1, 32, 32), {}]] for _ in range(2)))
    guider.set_cfg(5.0)
    noise = torch.randn(1, 16, FRAMES, *SIZE)
    with torch.no_grad():
        out = guider.sample(noise, torch.zeros_like(noise), host_double.sampler("euler"), host_double.sigmas(model, STEPS), seed=3)
    if run is None:
        return out, None, lines
    return out, model.get_attachment(host.KEY).runs[-1].to_json(), lines


def work(rank, world, folder):
    """One process: every run of RUNS in every way, written to a file."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine's name need not resolve
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    load_pack()
    with host_double.installed(Path(folder)):
        from pack.nodes import outlook

        outlook.at_the_node = outlook.at_the_start = lambda *_, **__: None
        found = {("ulysses", run): sample(ulysses, True, run) for run in RUNS}
        found |= {(way, run): sample(attend, True, run) for way, attend in (("gathered", to_all_keys), ("ring", ring)) for run in ("svg", "adaspa")}
        if rank == 0:
            found |= {("alone", run): sample(alone, False, run) for run in (None, *RUNS)}
        torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()

"""Starts a ComfyUI checkout on a torch build without CUDA: python comfy_cpu.py COMFYUI [ComfyUI's arguments].

The published torchvision and torchaudio wheels expect a CUDA build of torch. They import on any build once two gaps are
filled: the two torchvision operators that it registers shapes for are declared, and torchaudio's compiled extension is
said to be absent. On a torch with CUDA nothing is changed.
"""

import runpy
import sys
import types
from pathlib import Path

_LIBRARIES = []  # a torch.library is undone when it is collected


def fill_gaps() -> None:
    """Lets torchvision and torchaudio import beside a CPU build of torch."""
    import torch

    if torch.version.cuda or torch.version.hip:
        return
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARIES.append(library)
    extension = types.ModuleType("torchaudio._extension")
    extension._IS_TORCHAUDIO_EXT_AVAILABLE = extension._IS_ALIGN_AVAILABLE = False
    extension.fail_if_no_align = lambda function: function
    sys.modules["torchaudio._extension"] = extension


if __name__ == "__main__":
    checkout = Path(sys.argv[1]).resolve()
    fill_gaps()
    sys.argv = [str(checkout / "main.py"), *sys.argv[2:]]
    sys.path[0] = str(checkout)  # instead of this file's folder
    runpy.run_path(sys.argv[0], run_name="__main__")

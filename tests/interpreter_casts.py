"""A fixture for tests in Triton's interpreter: its own casts to and from e4m3 round wrongly."""

import numpy as np
import pytest
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter


@pytest.fixture
def right_casts(monkeypatch):
    """torch's casts in place of the interpreter's, which lose a carry out of the mantissa."""
    kinds = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e4b8: torch.float8_e4m3fnuz}
    convert = interpreter._convert_float

    def cast(values, source, target, rounding):
        if target in kinds:
            assert source == tl.float32
            return torch.from_numpy(values.copy()).to(kinds[target]).view(torch.uint8).numpy()
        if source in kinds:
            wide, plain = {tl.float32: (torch.float32, np.uint32), tl.float16: (torch.float16, np.uint16)}[target]
            return torch.from_numpy(values.copy()).view(kinds[source]).to(wide).numpy().view(plain)
        return convert(values, source, target, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", cast)

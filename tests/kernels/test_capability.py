"""Why a backend cannot take a call, in words that help: the machine is made up, the sentences are read."""

import builtins
import importlib.metadata
import sys
import types

import pytest
import torch
from pack import kernels
from pack.kernels import BlockMask, capability

Q = torch.zeros(1, 1, 64, 64)


@pytest.fixture(autouse=True)
def fresh_answers():
    """What is found out once a process is found out anew for each test, and forgotten after it."""
    capability._why_no_triton.cache_clear()
    capability._fitting_version.cache_clear()
    yield
    capability._why_no_triton.cache_clear()
    capability._fitting_version.cache_clear()


@pytest.fixture
def torch_of(monkeypatch):
    """Makes torch a release, with or without metadata that names its Triton."""

    def pretend(version, requirements=()):
        monkeypatch.setattr(torch, "__version__", version)
        monkeypatch.setattr(importlib.metadata, "requires", lambda name: list(requirements))

    return pretend


@pytest.fixture
def triton_of(monkeypatch):
    """Makes Triton a release, or absent."""

    def pretend(version):
        if version is None:
            real = builtins.__import__

            def refuse(name, *args, **kwargs):
                if name.split(".")[0] == "triton":
                    raise ModuleNotFoundError(f"No module named {name!r}")
                return real(name, *args, **kwargs)

            monkeypatch.setattr(builtins, "__import__", refuse)
            return
        package = types.ModuleType("triton")
        package.__version__, package.language = version, types.ModuleType("triton.language")
        monkeypatch.setitem(sys.modules, "triton", package)
        monkeypatch.setitem(sys.modules, "triton.language", package.language)

    return pretend


@pytest.mark.parametrize("system, torch_version, requirements, package", [
    ("Windows", "2.9.1+cu130", (), '"triton-windows<3.6"'),
    ("Windows", "2.10.0", (), '"triton-windows<3.7"'),
    ("Windows", "9.9.0", (), "the triton-windows release that its page names for this torch"),
    ("Linux", "2.13.0", ('triton==3.7.1; platform_system == "Linux"',), '"triton==3.7.*"'),
    ("Linux", "2.8.0+rocm6.4", ("pytorch-triton-rocm==3.4.0",), '"triton==3.4.*"'),
    ("Linux", "9.9.0", (), "the triton release that came with this torch"),
])
def test_the_package_that_fits_is_named(monkeypatch, torch_of, triton_of, system, torch_version, requirements, package):
    monkeypatch.setattr("platform.system", lambda: system)
    torch_of(torch_version, requirements)
    triton_of(None)
    reason = kernels.why_not("triton", Q, Q, Q)
    assert reason.startswith("Triton cannot be imported (ModuleNotFoundError") and reason.endswith(f"install {package}")
    assert kernels.choose_backend("auto", Q, Q, Q) == "torch"
    with pytest.raises(ValueError, match="Triton cannot be imported"):
        kernels.choose_backend("triton", Q, Q, Q)


def test_an_old_triton_is_told_from_a_fitting_one(torch_of, triton_of):
    torch_of("2.10.0")
    triton_of("3.4.0")
    assert kernels.why_not("triton", Q, Q, Q).startswith("Triton 3.4.0 is too old for torch 2.10.0; install ")
    capability._why_no_triton.cache_clear()
    triton_of("3.6.2")
    assert "too old" not in kernels.why_not("triton", Q, Q, Q)


def test_what_the_kernels_do_not_take_is_named(torch_of, triton_of):
    triton_of("3.7.1")
    double = Q.double()
    assert "not float64" in kernels.why_not("triton", double, double, double)
    wide = torch.zeros(1, 1, 64, 512)
    assert "head_dim up to 256, not 512" in kernels.why_not("triton", wide, wide, wide)
    odd = BlockMask.from_blocks(torch.ones(1, 1, 2, 2, dtype=torch.bool), 48, 48, 64, 64)
    assert "not 48 by 48" in kernels.why_not("triton", Q, Q, Q, odd)
    assert "these tensors are on cpu" in kernels.why_not("triton", Q, Q, Q)


@pytest.mark.parametrize("name, capability_of, arch, dtype, int8, fp8", [
    ("A100", (8, 0), None, torch.bfloat16, None, "fp8 takes compute capability 8.9, and A100 is older"),
    ("RTX 4090", (8, 9), None, torch.bfloat16, None, None),
    ("H200", (9, 0), None, torch.float16, None, None),
    ("H200", (9, 0), None, torch.float32, *["8 bits are offered for tensors of 16, and these are float32"] * 2),
    ("T4", (7, 5), None, torch.float16, *["Triton uses no matrix instructions below compute capability 8.0, and T4 is older"] * 2),
    ("MI300X", (9, 4), "gfx942", torch.bfloat16, None, None),
    ("RX 7900", (11, 0), "gfx1100", torch.bfloat16, None, "gfx1100 has no matrix instructions in e4m3: that takes gfx942, gfx950 or gfx12"),
    ("RX 9070", (12, 0), "gfx1201", torch.bfloat16, None, None),
])
def test_which_gpu_has_which_8_bits(monkeypatch, triton_of, name, capability_of, arch, dtype, int8, fp8):
    triton_of("3.7.1")
    monkeypatch.setattr(capability, "interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "hip", arch and "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability_of)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: types.SimpleNamespace(gcnArchName=f"{arch}:sramecc+"))
    q = types.SimpleNamespace(dtype=dtype, shape=(1, 1, 64, 64), device=torch.device("cuda", 0))
    assert kernels.why_not("triton", q, q, q, precision="int8") == int8
    assert kernels.why_not("triton", q, q, q, precision="fp8") == fp8


def test_torch_and_reference_take_everything():
    for backend in ("torch", "reference"):
        assert kernels.why_not(backend, Q, Q, Q) is None and kernels.choose_backend(backend, Q, Q, Q) == backend

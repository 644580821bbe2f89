"""More than one device in a run: the host's own split of conditions over GPUs, and threads that call at the same time.

One CPU plays both GPUs, under two names ("cpu" and "cpu:0"), so what is shown is the host's own path (clones for each device, a thread
each, one condition each) and that a run's state stands calls at the same time. That tensors stay on their device is shown call by
call on pretended devices. What takes two GPUs to see, such as copies between them, is not shown.
"""

import importlib
import threading

import pytest
import torch
from oracle import assert_same_figures, relative_error
from pretend_device import pretended

METHODS = ("svg", "adaspa", "auto")
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def on_two(host, monkeypatch):
    """on_two(model): the model as "MultiGPU CFG Split" hands it on, for a machine with two devices; and the names of threads that evaluated it."""
    threads = set()

    def split_real(model):
        management, multigpu = importlib.import_module("comfy.model_management"), importlib.import_module("comfy.multigpu")
        devices = [torch.device("cpu"), torch.device("cpu", 0)]
        monkeypatch.setattr(management, "get_all_torch_devices", lambda exclude_current=False: devices)
        return multigpu.create_multigpu_deepclones(model, 2)

    def split_double(model):
        double = importlib.import_module("host_double")
        each = double._each_condition

        def apart(patcher, conds, x, sigma, options):
            outputs, errors = [None] * len(conds), []

            def one(number):
                try:
                    with torch.no_grad():
                        outputs[number] = each(patcher, [conds[number]], x, sigma, options)[0]
                except Exception as error:
                    errors.append(error)

            workers = [threading.Thread(target=one, args=(number,)) for number in range(len(conds))]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(60)
            if errors:
                raise errors[0]
            return outputs

        monkeypatch.setattr(double, "_each_condition", apart)
        return model

    def watch(executor, *args, **kwargs):
        threads.add(threading.get_ident())
        return executor(*args, **kwargs)

    return lambda model: ((split_real if host.name == "real" else split_double)(host.wrap(model, "APPLY_MODEL", watch)), threads)


@every_method
@pytest.mark.parametrize("order", ["split after the patch", "split before the patch"])
@pytest.mark.fault("More than one device", "ComfyUI splits the prompt and its negative over two GPUs (MultiGPU CFG Split)", "the video of one GPU")
def test_the_hosts_split_of_conditions(host, method, order, on_two, monkeypatch, seen):
    from pack import kernels

    plain = host.patch(method, host.load("wan"), sparsity=0.4)
    expected = host.sample(plain, "wan", cfg=5.0)
    alone = host.record(plain).to_json()

    # Calls of both threads meet in the sparse kernel, so they do overlap.
    meet, right = threading.Barrier(2, timeout=60), kernels.block_sparse_attention
    monkeypatch.setattr(kernels, "block_sparse_attention", lambda *args, **kwargs: (meet.wait(), right(*args, **kwargs))[1])
    model, threads = on_two(host.load("wan") if order == "split before the patch" else host.patch(method, host.load("wan"), sparsity=0.4))
    if order == "split before the patch":
        model = host.patch(method, model, sparsity=0.4)
    assert relative_error(host.sample(model, "wan", cfg=5.0), expected) < 1e-6
    assert len(threads) >= 2 and threading.get_ident() not in threads
    record = host.record(model)
    data = record.to_json()
    assert record.sparse_calls == 12 and record.outcome == "finished" and host.shown[-1].text.startswith(f"{record.method} · done")
    assert_same_figures(data, alone)  # two threads add up in their own order
    seen("")


@every_method
@pytest.mark.fault("More than one device", "one of two GPUs fails in a run", "the host's own error; the run's state is freed on both")
def test_an_error_on_one_device_ends_the_run(host, method, on_two, seen):
    def fails(executor, *args, **kwargs):
        if len(calls) == 5:
            raise ValueError("planted")
        calls.append(None)
        return executor(*args, **kwargs)

    calls = []
    model, _ = on_two(host.patch(method, host.wrap(host.load("wan"), "DIFFUSION_MODEL", fails), sparsity=0.4))
    with pytest.raises(ValueError, match="planted"):
        host.sample(model, "wan", cfg=5.0)
    record = host.record(model)
    assert record.outcome == "failed (ValueError)" and host.shown[-1].text.startswith(f"{record.method} · failed (ValueError)")
    seen(f"{record.method} · {record.outcome}")
    calls.clear()
    calls.extend([None] * 6)
    host.sample(model, "wan", cfg=5.0)
    assert host.record(model).outcome == "finished" and host.record(model).sparse_calls == 12


@every_method
def test_each_device_of_a_run_has_plans_of_its_own(method):
    """One layer and condition on two devices at once: each finds what it finds alone, and its tensors never meet the other's."""
    from pack.attention.call import Dense
    from pack.attention.dispatch import sparse_attention
    from pack.attention.layout import VideoLayout
    from pack.attention.methods import METHODS as MODULES
    from video_oracle import make_call, make_session, random_qkv

    module = next(each for each in MODULES.values() if each.NAME.lower() == method)
    layout, devices = VideoLayout(4, 7, 9), ("xpu:0", "xpu:1")
    videos = {device: random_qkv(layout, heads=2, seed=number) for number, device in enumerate(devices)}

    def play(session, device, meet=None):
        outputs = []
        with pretended():
            for step in (1, 2, 5):
                if meet is not None:
                    meet.wait()
                answer = sparse_attention(make_call(layout, [part.to(device) for part in videos[device]], step=step), session)
                outputs.append(answer.output if isinstance(answer, Dense) else answer)
        return [output.cpu().as_subclass(torch.Tensor) for output in outputs if output is not None]

    def new():
        return make_session(module, sparsity=0.3)

    alone = {device: play(new(), device) for device in devices}
    together, session, meet = {}, new(), threading.Barrier(2, timeout=60)
    threads = [threading.Thread(target=lambda device=device: together.update({device: play(session, device, meet)})) for device in devices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for device in devices:
        assert len(together[device]) == len(alone[device]) == (2 if method == "svg" else 3)
        assert all(torch.equal(a, b) for a, b in zip(together[device], alone[device], strict=True))
    assert len(session._states) == 2
    assert not torch.equal(alone[devices[0]][-1], alone[devices[1]][-1])


def test_a_pretended_device_holds_to_itself():
    """What the tests on pretended devices rest on."""
    with pretended():
        a, b = torch.ones(2, 3).to("xpu:0"), torch.ones(2, 3).to("xpu:1")
        here = torch.ones(3, 3)
        for mixed in (lambda: a + b, lambda: a @ here, lambda: torch.cat([a, here]), lambda: a.index_select(0, torch.arange(1))):
            with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
                mixed()
        assert torch.zeros(2, device="xpu:1").device == b.device == (b[0] * 2).device == torch.device("xpu:1") and a.cpu().device.type == "cpu"
        with pytest.raises(TypeError, match="float64"):
            torch.ones(2).to("mps").double()

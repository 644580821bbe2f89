"""Settings of a wrong kind, too many and too few, through a running ComfyUI's own API."""

import urllib.error

import pytest

pytestmark = pytest.mark.host
SVG = "SparseAttentionPatchSVG"


@pytest.mark.parametrize("settings", [{}, {"keep_ratio": 0.3, "": 1}], ids=["only the model", "inputs that there never were"])
@pytest.mark.fault("Bad input", "an API prompt with inputs of another version of the node", "a video; what the node does not know is left out")
def test_prompts_of_other_versions_run(graphs, settings, seen):
    _, data, _ = graphs.run(graphs.graph("wan", SVG, settings, steps=1))
    assert data["outcome"] == "finished" and data["asked_sparsity"] == 0.7
    seen("")


@pytest.mark.parametrize("settings, name", [
    ({"sparsity": float("nan")}, "sparsity"), ({"sparsity": "abc"}, "sparsity"), ({"sparsity": 7.0}, "sparsity"),
    ({"warmup_steps": -2}, "warmup_steps"), ({"backend": "cuda"}, "backend"), ({"dense_layers": "0, \u2603"}, "dense_layers"),
    ({"strict": []}, "strict"),
], ids=str)
def test_a_setting_that_is_none_is_refused_by_name(graphs, settings, name):
    """By ComfyUI when the prompt is queued, or by the node; never a run with something else."""
    try:
        graphs.run(graphs.graph("wan", SVG, settings, steps=1))
    except urllib.error.HTTPError as error:
        assert error.code == 400
    except RuntimeError as error:
        assert name in str(error)
    else:
        pytest.fail("it ran")

"""Every redirected rotary function on the emulated device: right, and one kernel."""

from __future__ import annotations

import pytest
import torch

import mindiesd
from mindiesd.emulator import trace
from mindiesd.patches.rope.kept import RANGE
from tests import oracles
from tests.emulator.tiny_models import MODELS, first_tensor, move, without_torch_npu
from tests.patches.rope_cases import CASES, Sizes, one_a_convention
from tests.patches.rope_models import ALLEGRO, ENCODERS
from tests.patches.rope_pair import Pair, listed

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

# Where x's dtype has a kernel of its own, that is all; float32 tables widen half precision, which
# is a cast before and after.
CASTS = 2
COMPLEX = 1
# Launches beside the kernel and the casts, per rotated tensor.
MORE = {
    # The channels that are rotated are taken out of the rows, those that stay concatenated.
    "minimax_h3_rope": 2,
    "minimax_music3_rope": 2,
    "stable_audio3_rope": 2,
    "autoencoder_same_rope": 2,
    "phi3_rope": 2,
    "glm_rope": 2,
    "allegro_rope": 1,  # a view of thirds, of heads that are not in one piece
}


def there(value):
    return move(value, lambda tensor: tensor.to("npu"))


@pytest.mark.parametrize("per_batch", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", one_a_convention())
def test_right_and_one_kernel(name, dtype, per_batch):
    case, both = CASES[name], Pair(name)
    sizes = Sizes(per_batch=per_batch)
    args = case.make(sizes, dtype)
    on_device = there(args)
    both.ours(*on_device)  # makes the tables
    with trace() as counted:
        ours = both.ours(*on_device)
    taken = both.counts()[0]
    # Nothing on this device computes in float64 for anyflow, unlike on the host.
    assert taken == (0 if "anyflow" in name and dtype is torch.float32 else 2), both.counts()
    for mine, oracle in zip(listed(ours), case.expect(*args), strict=True):
        assert mine.device.type == "npu" and mine.dtype is dtype
        oracles.assert_close(mine.cpu(), oracle)
    if not taken:
        return
    kernels = counted.launches["npu::npu_rotary_mul"]
    assert kernels == len(case.inputs)
    assert not counted.transfers
    others = counted.total - kernels
    allowed = (MORE.get(name, 0) + (CASTS if dtype is not torch.float32 else 0)) * kernels
    assert others <= allowed, counted


@pytest.mark.parametrize("name", one_a_convention())
def test_fewer_launches_than_the_original(name):
    case, both = CASES[name], Pair(name)
    args = there(case.make(Sizes(), torch.bfloat16))
    both.ours(*args)
    with trace() as ours:
        both.ours(*args)
    with trace() as theirs:
        both.original(*args)
    # A complex product is one launch as well; what is gained there is that it is not complex.
    level = COMPLEX if isinstance(args[1], torch.Tensor) and args[1].is_complex() else 0
    assert ours.total < theirs.total + level, (ours.total, theirs.total)


def test_scaled_tables_stay_with_the_original():
    """OmniGen and YaRN scale their tables; the kernel documents numbers in [-1, 1]."""
    both = Pair("diffusers_rope")
    x, angles = torch.randn(1, 2, 5, 8).npu(), torch.randn(5, 8).npu()
    good = angles.cos(), angles.sin()
    scaled = good[0] * 1.2, good[1] * 1.2
    for tables, kernels in ((good, 1), (scaled, 0)):
        with trace() as counted:
            both.ours(x, tables, use_real_unbind_dim=-2)
        assert counted.launches["npu::npu_rotary_mul"] == kernels
        with trace() as counted:
            out = both.ours(x, tables, use_real_unbind_dim=-2)
        assert not counted.transfers, "the tables are looked at once"
        oracle = oracles.rope(x.cpu(), tables[0].cpu(), tables[1].cpu(), False)
        oracles.assert_close(out.cpu(), oracle)
    redirected, _, fell_back = both.counts()
    assert (redirected, fell_back) == (2, {RANGE: 2})
    # Written to, they are looked at again.
    scaled[0].clamp_(-1, 1), scaled[1].clamp_(-1, 1)
    both.ours(x, scaled, use_real_unbind_dim=-2)
    assert both.counts()[0] == 3


def test_tables_of_inference_mode_are_looked_at_once():
    both = Pair("llama_rope")
    with torch.inference_mode():
        q, k, cos, sin = there(CASES["llama_rope"].make(Sizes(), torch.bfloat16))
        both.ours(q, k, cos, sin)
        with trace() as counted:
            both.ours(q, k, cos, sin)
    assert not counted.transfers
    assert counted.launches["npu::npu_rotary_mul"] == 2


def test_tables_on_the_host_are_brought_over_once():
    both = Pair("diffusers_rope")
    x, angles = torch.randn(1, 5, 2, 8).npu(), torch.randn(5, 8)
    tables = angles.cos(), angles.sin()
    both.ours(x, tables, sequence_dim=1)
    with trace() as counted:
        out = both.ours(x, tables, sequence_dim=1)
    assert not counted.transfers and counted.total == 1
    oracle = oracles.rope(x.cpu(), tables[0][:, None], tables[1][:, None], True)
    oracles.assert_close(out.cpu(), oracle)


NAMES = ("qwenimage", "ltx", "hidream", "prx", "joyimage", "lumina2", "stable_audio3")
ROPE = {
    **{name: MODELS[name] for name in NAMES},
    "allegro": ALLEGRO,
    **{name: ENCODERS[name] for name in ("llama", "phi3", "glm", "qwen2_5_vl")},
}
# Launches that make and look at complex tables, once a table; these models have two layers.
TABLES = {"lumina2": 12, "qwenimage": 4}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in ROPE] + [("ltx", torch.float32), ("glm", torch.float32)],
)
def test_whole_models(name, dtype):
    tiny = ROPE[name]
    model, inputs = tiny.build(), tiny.make_inputs()
    with torch.no_grad(), without_torch_npu():
        expected = first_tensor(model(**inputs))
    model = model.to("npu", dtype)
    inputs = move(inputs, lambda t: t.to("npu", dtype if t.is_floating_point() else None))
    with torch.no_grad():
        with trace() as before:
            plain = first_tensor(model(**inputs))
        migration = mindiesd.patch_all(only="rope")
        try:
            with trace() as after:
                ours = first_tensor(model(**inputs))
        finally:
            mindiesd.unpatch_all()
    report = migration.report()
    assert ours.dtype is plain.dtype
    assert report.redirected and not report.fell_back, report
    assert after.launches["npu::npu_rotary_mul"]
    assert after.total <= before.total + TABLES.get(name, 0), (before.total, after.total)
    mine, other = ((out.cpu().float() - expected).abs().mean() for out in (ours, plain))
    assert mine <= 1.1 * other + 2e-6, (mine, other)

"""The doors on the emulated device: one fused kernel where one can express the call."""

from __future__ import annotations

import json

import pytest
import torch

from mindiesd.emulator import trace
from mindiesd.patches.front_doors import attn_bias as ab
from mindiesd.patches.front_doors import bert_padding, rotary
from mindiesd.patches.front_doors import flash_attn as fa
from mindiesd.patches.front_doors import sageattention as sage
from mindiesd.patches.front_doors import xformers as xf
from tests import oracles
from tests.processes import run_python

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def random(*shape, dtype=torch.float16):
    return torch.randn(*shape).to(dtype).npu()


def on_host(*tensors):
    return [tensor.cpu().transpose(1, 2) for tensor in tensors]


def fused(counted) -> int:
    return sum(n for name, n in counted.launches.items() if "npu_fusion_attention" in name)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("more", "window"),
    [
        ({}, (-1, -1)),
        ({"causal": True}, (-1, 0)),
        ({"window_size": (3, 1)}, (3, 1)),
        ({"window_size": (3, 1), "causal": True}, (3, 0)),
    ],
)
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (5, 9), (9, 5), (1, 8)])
def test_one_kernel_and_no_copy(dtype, more, window, queries, keys) -> None:
    q, k, v = random(2, queries, 4, 16), random(2, keys, 2, 16), random(2, keys, 2, 16)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    with trace() as counted:
        out = fa.flash_attn_func(q, k, v, **more)
    assert fused(counted) == 1 and not counted.layout_copies
    # The compressed mask is made once for a device; else there is nothing but the kernel.
    with trace() as counted:
        fa.flash_attn_func(q, k, v, **more)
    assert sum(counted.launches.values()) == 1, counted.launches
    keep = oracles.window(queries, keys, *window)
    want = oracles.attention(*on_host(q, k, v), keep).transpose(1, 2)
    assert out.is_contiguous() and out.dtype is dtype
    oracles.assert_close(out.cpu(), want)


def test_packed_tensors_are_one_kernel() -> None:
    qkv = random(2, 6, 3, 4, 16)
    fa.flash_attn_qkvpacked_func(qkv, causal=True)
    with trace() as counted:
        out = fa.flash_attn_qkvpacked_func(qkv, causal=True)
    # We copy nothing; the kernel itself has to bring the three out of one memory.
    assert fused(counted) == sum(counted.launches.values()) == 1
    parts = on_host(*qkv.unbind(2))
    want = oracles.attention(*parts, oracles.bottom_right(6, 6)).transpose(1, 2)
    oracles.assert_close(out.cpu(), want)


@pytest.mark.parametrize("shape", [(4,), (2, 4)])
def test_alibi_is_a_bias_of_the_kernel(shape) -> None:
    q, k, slopes = random(2, 5, 4, 16), random(2, 9, 2, 16), torch.rand(shape).npu()
    with trace() as counted:
        out = fa.flash_attn_func(q, k, k, causal=True, alibi_slopes=slopes)
    assert fused(counted) == 1
    bias = oracles.alibi(slopes.cpu(), 2, 4, 5, 9)
    want = oracles.attention(*on_host(q, k, k), oracles.bottom_right(5, 9), bias)
    oracles.assert_close(out.cpu(), want.transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("slopes", [False, True])
def test_what_is_composed(dtype, slopes) -> None:
    q, k = random(2, 9, 4, 16, dtype=dtype), random(2, 5, 2, 16, dtype=dtype)
    alibi = torch.rand(4).npu() if slopes else None
    with trace() as counted:
        out, lse, weights = fa.flash_attn_func(
            q, k, k, causal=True, softcap=2.0, alibi_slopes=alibi, return_attn_probs=True
        )
    assert fused(counted) == 0
    keep = oracles.bottom_right(9, 5)
    bias = None if alibi is None else oracles.alibi(alibi.cpu(), 2, 4, 9, 5)
    one = on_host(q, k, k)
    oracles.assert_close(
        out.cpu(), oracles.attention(*one, keep, bias, softcap=2.0).transpose(1, 2)
    )
    want = oracles.log_sum_exp(*one[:2], keep, bias, softcap=2.0)
    torch.testing.assert_close(lse.cpu().double(), want, rtol=1e-5, atol=1e-5)
    assert weights.numel() == 0 and out.device.type == lse.device.type == "npu"


def test_gradients_on_the_device() -> None:
    base = [torch.randn(1, length, heads, 8) for length, heads in ((6, 4), (4, 2), (4, 2))]
    grads = []
    for device in ("npu", "cpu"):
        q, k, v = (t.to(device).requires_grad_() for t in base)
        out = fa.flash_attn_func(q, k, v, causal=True, window_size=(2, 0))
        out.square().sum().backward()
        grads.append([t.grad.cpu() for t in (q, k, v)])
    for mine, theirs in zip(*grads, strict=True):
        assert mine.abs().sum() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_dropout_on_the_device() -> None:
    q = random(1, 6, 2, 8, dtype=torch.float32)
    out, _, weights = fa.flash_attn_func(q, q, q, dropout_p=0.5, return_attn_probs=True)
    again = torch.einsum("bnij,bjnd->bind", weights.cpu().clamp(min=0) / 0.5, q.cpu())
    torch.testing.assert_close(out.cpu(), again)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 1)])
def test_varlen_is_one_kernel(window) -> None:
    lengths_q, lengths_k = [3, 0, 5, 1], [4, 0, 5, 7]
    q, k = random(9, 4, 16), random(16, 2, 16)
    cu_q, cu_k = (
        torch.tensor([0, *lengths]).cumsum(0).int().npu() for lengths in (lengths_q, lengths_k)
    )
    with trace() as counted:
        out = fa.flash_attn_varlen_func(q, k, k, cu_q, cu_k, 5, 7, window_size=window)
    assert counted.launches["npu::npu_fusion_attention"] == 1
    want = oracles.attention_varlen(
        q.cpu(), k.cpu(), k.cpu(), lengths_q, lengths_k, lambda n, m: oracles.window(n, m, *window)
    )
    oracles.assert_close(out.cpu(), want)


@pytest.mark.parametrize("lengths", [[5, 5], [7, 3]])
def test_kvcache_is_one_kernel(lengths) -> None:
    q, new = random(2, 1, 4, 16), random(2, 1, 2, 16)
    caches = [torch.full((2, 12, 2, 16), float("nan"), dtype=torch.float16).npu() for _ in "kv"]
    for cache in caches:
        for row, length in enumerate(lengths):
            cache[row, :length] = random(length, 2, 16)
    seqlens = torch.tensor(lengths, dtype=torch.int32).npu()
    with trace() as counted:
        out = fa.flash_attn_with_kvcache(q, *caches, new, new, cache_seqlens=seqlens, causal=True)
    assert fused(counted) == 1
    for row, length in enumerate(lengths):
        assert torch.equal(caches[0][row, length], new[row, 0])
        held = [cache[row : row + 1, : length + 1] for cache in caches]
        want = oracles.attention(*on_host(q[row : row + 1], *held)).transpose(1, 2)
        oracles.assert_close(out[row : row + 1].cpu(), want)


def test_rotary_and_padding_on_the_device() -> None:
    x, cos, sin = random(2, 5, 4, 16), random(9, 8), random(9, 8)
    out = rotary.apply_rotary_emb(x, cos, sin, interleaved=True, seqlen_offsets=2)
    steps = [[2, 3, 4, 5, 6]] * 2
    want = oracles.rotary_half_tables(x.cpu(), cos.cpu(), sin.cpu(), steps, True)
    oracles.assert_close(out.cpu(), want)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).npu()
    tokens, indices, starts, longest, _ = bert_padding.unpad_input(x, mask)
    assert (starts.tolist(), longest) == ([0, 3, 8], 5)
    back = bert_padding.pad_input(tokens, indices, 2, 5)
    assert torch.equal(back.cpu(), (x * mask[:, :, None, None]).cpu())


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_sageattn_is_one_kernel_without_a_copy(layout) -> None:
    q, k = random(2, 4, 6, 16), random(2, 2, 6, 16)
    if layout == "NHD":
        q, k = random(2, 6, 4, 16), random(2, 6, 2, 16)
    with trace() as counted:
        out = sage.sageattn(q, k, k, layout, is_causal=True)
    assert fused(counted) == 1 and not counted.layout_copies
    one = [q.cpu(), k.cpu(), k.cpu()] if layout == "HND" else on_host(q, k, k)
    want = oracles.attention(*one, oracles.top_left(6, 6))
    oracles.assert_close(out.cpu(), want if layout == "HND" else want.transpose(1, 2))


@pytest.mark.parametrize(
    "bias",
    [
        None,
        ab.LowerTriangularMask(),
        ab.LowerTriangularFromBottomRightMask(),
        ab.LocalAttentionFromBottomRightMask(2, 1),
    ],
)
def test_xformers_is_one_kernel_without_a_copy(bias) -> None:
    q, k = random(2, 5, 4, 16), random(2, 8, 4, 16)
    with trace() as counted:
        out = xf.memory_efficient_attention(q, k, k, attn_bias=bias)
    assert fused(counted) == 1 and not counted.layout_copies
    keep = None if bias is None else bias.materialize((5, 8)) == 0
    want = oracles.attention(*on_host(q, k, k), keep).transpose(1, 2)
    oracles.assert_close(out.cpu(), want)


def test_xformers_blocks_and_groups_are_one_kernel() -> None:
    row = random(1, 9, 4, 16)
    bias = ab.BlockDiagonalMask.from_seqlens([2, 3, 4]).make_causal()
    with trace() as counted:
        out = xf.memory_efficient_attention(row, row, row, attn_bias=bias)
    assert fused(counted) == 1
    keep = bias.materialize((9, 9)) == 0
    oracles.assert_close(
        out.cpu(), oracles.attention(*on_host(row, row, row), keep).transpose(1, 2)
    )
    q, k = random(2, 4, 2, 3, 16), random(2, 5, 2, 1, 16).expand(2, 5, 2, 3, 16)
    with trace() as counted:
        out = xf.memory_efficient_attention(q, k, k)
    assert fused(counted) == 1 and not counted.layout_copies
    want = oracles.attention(*on_host(*(t.flatten(2, 3) for t in (q, k, k)))).transpose(1, 2)
    oracles.assert_close(out.cpu().flatten(2, 3), want)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph(backend) -> None:
    torch.compiler.reset()
    q = random(1, 6, 2, 16)

    @torch.compile(backend=backend, fullgraph=True)
    def run(q):
        return fa.flash_attn_func(q, q, q, causal=True)

    want = oracles.attention(*on_host(q, q, q), oracles.top_left(6, 6)).transpose(1, 2)
    oracles.assert_close(run(q).cpu(), want)


@pytest.mark.slow
def test_libraries_beside_torch_npu_are_told_the_same_and_run_the_same() -> None:
    """transformers has its own flash_attention_2 on the NPU; we are not in it."""
    code = """
        import json, sys
        from mindiesd import emulator
        emulator.start()
        {patch}
        import torch, transformers, diffusers.utils.import_utils as du
        import diffusers.models.attention_dispatch as dispatch
        import transformers.utils.import_utils as tu
        import accelerate.utils.imports as au
        {use}
        found = {{}}
        for space in (du, tu, au):
            for name in ("flash_attn", "flash_attn_interface", "xformers", "sageattention"):
                space.importlib = __import__("importlib.util")
                found[space.__name__ + name] = eval(
                    f"repr(importlib.util.find_spec({{name!r}}))", vars(space))
        for name in sorted(vars(tu)):
            if name.startswith("is_flash"):
                try:
                    found[name] = repr(getattr(tu, name)())
                except TypeError as error:
                    found[name] = str(error)
        found["dispatch"] = [dispatch._CAN_USE_FLASH_ATTN, dispatch._CAN_USE_XFORMERS_ATTN]
        torch.manual_seed(0)
        config = transformers.LlamaConfig(hidden_size=16, intermediate_size=16,
            num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
        try:
            model = transformers.LlamaForCausalLM._from_config(
                config, attn_implementation="flash_attention_2", torch_dtype=torch.float16)
            ids = torch.tensor([[1, 2, 3, 4]])
            with torch.no_grad():
                out = model.eval().npu()(ids.npu(), use_cache=False).logits
            found["logits"] = out.float().cpu().tolist()
        except Exception as error:
            found["logits"] = f"{{type(error).__name__}}: {{error}}"
        print(json.dumps(found))
    """

    def run(patch="", use=""):
        done = run_python(
            code.format(patch=patch, use=use), TORCH_DEVICE_BACKEND_AUTOLOAD="0", HF_HUB_OFFLINE="1"
        )
        return json.loads(done.stdout.splitlines()[-1])

    plain = run()
    assert isinstance(plain["logits"], list), plain["logits"]
    only = "import mindiesd; mindiesd.patch_all(only='flash_attn,xformers,sageattention')"
    use = "import flash_attn, xformers.ops, sageattention"
    assert run(only, use) == plain
    assert run("", f"{only}; {use}") == plain

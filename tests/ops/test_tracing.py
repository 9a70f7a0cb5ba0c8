"""Every operator under torch.compile, inference mode, FakeTensor and meta, and on its own."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mindiesd
from mindiesd.ops import attention, norm
from mindiesd.ops.rope import rotate
from tests import oracles


def tensor(*shape, **options):
    return torch.randn(*shape, **options)


def attention_case(device, **extras):
    q, kv = tensor(2, 5, 4, 8, device=device), tensor(2, 6, 2, 8, device=device)
    return lambda q, kv: mindiesd.attention_forward(q, kv, kv, **extras), (q, kv)


def masked_case(device, fused=True, is_causal=True):
    q, kv = tensor(2, 4, 5, 8, device=device), tensor(2, 4, 6, 8, device=device)
    mask = torch.zeros(2, 1, 1, 6, device=device)

    def call(q, kv, mask):
        return mindiesd.attention_forward(
            q, kv, kv, mask, 0.5, fused, True, is_causal=is_causal, window_size=(2, 2)
        )

    return call, (q, kv, mask)


def redirected_case(device):
    def call(q, mask):
        assert attention.refusal(q, q, q, mask, False, False) is None
        return attention.attend(q, q, q, mask)

    return call, (tensor(2, 4, 5, 8, device=device), torch.zeros(5, 5, device=device))


def varlen_case(device, form="list", lengths=((0, 2, 6), (0, 3, 6)), **extras):
    q = tensor(6, 4, 8, device=device)
    if form == "list":
        return lambda q: mindiesd.attention_forward_varlen(q, q, q, *lengths, **extras), (q,)
    cu = [torch.tensor(values, dtype=torch.int32, device=device) for values in lengths]

    def call(q, cu_q, cu_k):
        return mindiesd.attention_forward_varlen(q, q, q, cu_q, cu_k, 6, 6, **extras)

    return call, (q, *cu)


def sparse_case(device):
    q = tensor(2, 4, 5, 8, device=device)
    return lambda q: mindiesd.sparse_attention(q, q, q, is_causal=True, head_num=4), (q,)


def sparse_blocks_case(device, sparse_type, **extras):
    q, kv = tensor(1, 2, 300, 8, device=device), tensor(1, 1, 300, 8, device=device)

    def call(q, kv):
        return mindiesd.sparse_attention(
            q, kv, kv, sparse_type=sparse_type, sparsity=0.5, latent_shape_q=(3, 10, 10), **extras
        )

    return call, (q, kv)


def rope_case(device, mode):
    x, cos, sin = tensor(2, 5, 4, 8, device=device), *tensor(2, 5, 8, device=device)
    return (
        lambda x, cos, sin: mindiesd.rotary_position_embedding(x, cos, sin, mode),
        (x.half(), cos, sin),
    )


def norm_case(device, kind):
    x, weight = tensor(2, 5, 8, device=device), tensor(8, device=device)
    if kind == "rms":
        return lambda x, w: norm.rms_norm(x, w, 1e-6), (x.half(), weight)
    with torch.device(device):
        module = mindiesd.RMSNorm(8) if kind == "module" else nn.LayerNorm(8)
    module.requires_grad_(False)
    if kind == "module":
        return module, (x,)
    if kind == "layer":
        return lambda x: mindiesd.fast_layernorm(module, x), (x.bfloat16(),)
    scale = tensor(2, 8, device=device)
    return (
        lambda x, scale: mindiesd.layernorm_scale_shift(module, x, scale, scale[:, None]),
        (x.half(), scale),
    )


def activation_case(device):
    return mindiesd.get_activation_layer("gelu-fast"), (tensor(3, 4, device=device).half(),)


CASES = {
    "attention": attention_case,
    "attention manual": lambda d: attention_case(d, opt_mode="manual", is_causal=True),
    "attention unfused": lambda d: attention_case(d, fused=False),
    "attention masked": masked_case,
    "attention masked unfused": lambda d: masked_case(d, fused=False),
    "redirected": redirected_case,
    "varlen ints": varlen_case,
    "varlen tensors": lambda d: varlen_case(d, "tensors", causal=True, softcap=3.0),
    "varlen equal": lambda d: varlen_case(d, "tensors", ((0, 3, 6), (0, 3, 6)), causal=True),
    "sparse": sparse_case,
    "rf_v2": lambda d: sparse_blocks_case(d, "rf_v2"),
    "ada_bsa": lambda d: sparse_blocks_case(d, "ada_bsa", is_causal=True),
    "rope half": lambda d: rope_case(d, "rotated_half"),
    "rope interleaved": lambda d: rope_case(d, "rotated_interleaved"),
    "rms_norm": lambda d: norm_case(d, "rms"),
    "RMSNorm": lambda d: norm_case(d, "module"),
    "fast_layernorm": lambda d: norm_case(d, "layer"),
    "layernorm_scale_shift": lambda d: norm_case(d, "ada"),
    "activation": activation_case,
}


@pytest.mark.parametrize("case", CASES)
def test_compiled_whole(case):
    call, arguments = CASES[case]("cpu")
    torch._dynamo.reset()
    with torch.no_grad():
        expected = call(*arguments)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        out = compiled(*arguments)
    assert out.dtype is expected.dtype
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("case", CASES)
def test_exported(case):
    call, arguments = CASES[case]("cpu")

    class Module(nn.Module):
        def forward(self, *arguments):
            return call(*arguments)

    with torch.no_grad():
        exported = torch.export.export(Module(), arguments)
        torch.testing.assert_close(exported.module()(*arguments), call(*arguments))


@pytest.mark.parametrize("case", CASES)
def test_under_autocast(case):
    """A result, in the dtype of the inputs or of autocast, close to the one without."""
    call, arguments = CASES[case]("cpu")
    with torch.no_grad():
        expected = call(*arguments)
        with torch.autocast("cpu", torch.bfloat16):
            out = call(*arguments)
    assert out.dtype in (expected.dtype, torch.bfloat16)
    if "ada_bsa" not in case and "rf_v2" not in case:
        # Which blocks are best may change with the rounding.
        torch.testing.assert_close(out.float(), expected.float(), rtol=0.05, atol=0.05)


def test_compiled_with_dynamic_shapes():
    torch._dynamo.reset()

    def call(q, kv, cos, sin):
        q = mindiesd.rotary_position_embedding(q, cos, sin)
        return mindiesd.attention_forward(q, kv, kv, is_causal=True, window_size=(3, -1))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for length in (5, 7, 11):
            q, kv = tensor(2, length, 4, 8), tensor(2, length + 2, 4, 8)
            tables = tensor(2, length, 8)
            torch.testing.assert_close(compiled(q, kv, *tables), call(q, kv, *tables))


@pytest.mark.parametrize("case", CASES)
def test_inference_mode(case):
    call, arguments = CASES[case]("cpu")
    with torch.no_grad():
        expected = call(*arguments)
    with torch.inference_mode():
        assert torch.equal(call(*arguments), expected)


@pytest.mark.parametrize("kind", ["fake", "meta"])
@pytest.mark.parametrize("case", CASES)
def test_without_data(case, kind):
    expected = CASES[case]("cpu")[0](*CASES[case]("cpu")[1])
    if kind == "meta":
        call, arguments = CASES[case]("meta")
        out = call(*arguments)
        assert out.is_meta
    else:
        with FakeTensorMode():
            call, arguments = CASES[case]("cpu")
            out = call(*arguments)
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    if "varlen" in case:
        assert out.stride() == expected.stride()


def test_the_names_that_are_patched_are_never_called(monkeypatch):
    """The patch engine puts shims there that call in here."""

    def never(*_, **__):
        raise AssertionError("called a patched name")

    arranged = {name: CASES[name]("cpu") for name in CASES}
    for name in ("scaled_dot_product_attention", "rms_norm", "layer_norm"):
        monkeypatch.setattr(F, name, never)
    monkeypatch.setattr(nn.LayerNorm, "forward", never)
    monkeypatch.setattr(nn.RMSNorm, "forward", never)
    for call, arguments in arranged.values():
        call(*arguments)


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for make in CASES.values():
            call, arguments = make("cpu")
            call(*arguments)


def test_unchecked_rotate_compiles_bit_for_bit():
    torch._dynamo.reset()
    x, cos, sin = tensor(2, 4, 5, 8).half(), *tensor(2, 5, 8)
    compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager")
    for interleaved in (True, False):
        out = compiled(x, cos, sin, interleaved)
        assert torch.equal(out, rotate(x, cos, sin, interleaved))
        oracles.assert_close(out, oracles.rope(x, cos, sin, interleaved))

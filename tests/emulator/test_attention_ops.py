"""The attention operators: their formulas, their masks and layouts, and every documented limit."""

from __future__ import annotations

import pytest
import torch

from . import oracle

H, BF, FULL = torch.float16, torch.bfloat16, torch.float32
TOLERANCE = {H: 2e-3, BF: 2e-2, FULL: 2e-6}
B, N, SQ, SKV, D = 2, 4, 12, 16, 32
SCALE = 0.3


def qkv(dtype=H, n=N, nkv=N, sq=SQ, skv=SKV, d=D, dv=None, b=B):
    return (
        torch.randn(b, n, sq, d, dtype=dtype),
        torch.randn(b, nkv, skv, d, dtype=dtype),
        torch.randn(b, nkv, skv, dv or d, dtype=dtype),
    )


def to_layout(x, layout):
    """[B, N, S, D] in another layout, contiguous."""
    x = {
        "BNSD": lambda t: t,
        "BSND": lambda t: t.transpose(1, 2),
        "BSH": lambda t: t.transpose(1, 2).flatten(2),
        "SBH": lambda t: t.permute(2, 0, 1, 3).flatten(2),
        "NBSD": lambda t: t.transpose(0, 1),
    }[layout](x)
    return x.contiguous()


def close(got, expected, dtype=H):
    assert got.device.type == "npu"
    assert got.dtype == dtype
    torch.testing.assert_close(
        got.cpu().double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


def npu(*tensors):
    return [tensor.npu() for tensor in tensors]


def triangle(rows=2048, columns=2048):
    return torch.ones(rows, columns, dtype=torch.bool).triu(1).npu()


@pytest.fixture
def ops(npu):
    import torch_npu

    return torch_npu


@pytest.fixture(params=["v1", "v2", "v3"])
def fa(request, ops):
    """One of the fusion attentions, under v1's names and returning the output."""
    version = request.param

    def call(q, k, v, n=N, layout="BNSD", **kwargs):
        if version == "v2":
            for old, new in (("pre_tockens", "pre_tokens"), ("next_tockens", "next_tokens")):
                if old in kwargs:
                    kwargs[new] = kwargs.pop(old)
        if version == "v3":
            for key in ("actual_seq_qlen", "actual_seq_kvlen"):
                if key in kwargs:
                    kwargs[key] = torch.tensor(kwargs[key])
        name = "npu_fusion_attention" + {"v1": "", "v2": "_v2", "v3": "_v3"}[version]
        return getattr(ops, name)(q, k, v, n, layout, scale=SCALE, **kwargs)

    call.version = version
    return call


class TestFusionAttention:
    @pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH", "SBH", "bnsd"])
    @pytest.mark.parametrize("dtype", [H, BF, FULL])
    def test_layouts_and_dtypes(self, fa, layout, dtype):
        q, k, v = qkv(dtype)
        expected = oracle.attention(q, k, v, SCALE)
        there = npu(*(to_layout(x, layout.upper()) for x in (q, k, v)))
        got = fa(*there, layout=layout)[0]
        close(got, to_layout(expected, layout.upper()), dtype)

    def test_strides_do_not_matter(self, fa):
        q, k, v = (x.transpose(1, 2) for x in qkv(sq=N, skv=N))
        close(fa(*npu(q, k, v))[0], oracle.attention(q, k, v, SCALE))

    def test_grouped_heads_and_narrow_values(self, fa):
        q, k, v = qkv(nkv=2, dv=16)
        close(fa(*npu(q, k, v))[0], oracle.attention(q, k, v, SCALE))

    def test_statistics(self, fa):
        q, k, v = qkv(FULL)
        out = fa(*npu(q, k, v))
        assert out[1].shape == out[2].shape == (B, N, SQ, 8)
        assert out[1].dtype == out[2].dtype == FULL
        lse = (out[1] + out[2].log()).cpu().double()
        expected = oracle.lse(q, k, SCALE)[..., None].expand(B, N, SQ, 8)
        torch.testing.assert_close(lse, expected, atol=1e-5, rtol=1e-5)
        assert out[3].shape == (0,)

    @pytest.mark.parametrize(
        "shape", [(B, N, SQ, SKV), (B, 1, SQ, SKV), (1, 1, SQ, SKV), (SQ, SKV)]
    )
    @pytest.mark.parametrize("mode", [0, 1])
    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
    def test_full_masks(self, fa, shape, mode, dtype):
        q, k, v = qkv()
        out = torch.rand(shape) < 0.4
        out[..., 0] = False
        got = fa(*npu(q, k, v), atten_mask=out.to(dtype).npu(), sparse_mode=mode)[0]
        close(got, oracle.attention(q, k, v, SCALE, keep=~out))

    @pytest.mark.parametrize(
        "shape",
        [
            (B, 1, 1, SKV),
            (1, N, SQ, SKV),
            (1, SQ, SKV),
            (B, SQ, SKV),
            (SKV,),
            (1, 1, 1, SKV),
            (1, SKV),
        ],
    )
    def test_masks_are_not_broadcast(self, fa, shape):
        mask = torch.zeros(shape, dtype=torch.bool).npu()
        with pytest.raises(RuntimeError, match="unsupported atten_mask shape"):
            fa(*npu(*qkv()), atten_mask=mask)

    @pytest.mark.parametrize("dtype", [H, torch.int8, torch.int32])
    def test_mask_dtypes(self, fa, dtype):
        mask = torch.zeros(SQ, SKV, dtype=dtype).npu()
        with pytest.raises(RuntimeError, match="atten_mask has dtype"):
            fa(*npu(*qkv()), atten_mask=mask)

    @pytest.mark.parametrize("mode", [2, 3, 4])
    @pytest.mark.parametrize(("sq", "skv"), [(12, 16), (16, 16), (16, 12)])
    def test_compressed_masks(self, fa, mode, sq, skv):
        q, k, v = qkv(sq=sq, skv=skv)
        windows = {"pre_tockens": 3, "next_tockens": 1} if mode == 4 else {}
        keep = {
            2: lambda: oracle.top_left(sq, skv),
            3: lambda: oracle.bottom_right(sq, skv),
            4: lambda: oracle.band(sq, skv, 3, 1, skv - sq),
        }[mode]()
        got = fa(*npu(q, k, v), atten_mask=triangle(), sparse_mode=mode, **windows)[0]
        # mode 3 with Sq > Skv gives 0 for rows without columns by itself
        empty = "zero" if mode == 3 and sq > skv else "mean"
        close(got, oracle.attention(q, k, v, SCALE, keep=keep, empty=empty))

    @pytest.mark.parametrize("mode", [2, 3, 4])
    def test_compressed_masks_must_be_the_triangle(self, fa, mode):
        there = npu(*qkv())
        for wrong in (
            triangle(SQ, SKV),
            triangle(1, 2048),
            torch.zeros(1, 1, 2048, 2048).bool().npu(),
        ):
            with pytest.raises(RuntimeError, match="unsupported atten_mask shape"):
                fa(*there, atten_mask=wrong, sparse_mode=mode)
        for wrong in (~triangle(), triangle().t(), torch.zeros(2048, 2048).bool().npu()):
            with pytest.raises(RuntimeError, match="triu"):
                fa(*there, atten_mask=wrong.contiguous(), sparse_mode=mode)

    @pytest.mark.parametrize("mode", [0, 1, 2, 3, 4])
    def test_without_a_mask_the_mode_says_nothing(self, fa, mode):
        q, k, v = qkv()
        got = fa(*npu(q, k, v), sparse_mode=mode, pre_tockens=1, next_tockens=0)[0]
        close(got, oracle.attention(q, k, v, SCALE))

    def test_windows_join_a_mask_in_mode_0_from_the_top_left(self, fa):
        q, k, v = qkv()
        mask = torch.zeros(SQ, SKV, dtype=torch.bool).npu()
        keep = oracle.band(SQ, SKV, 2, 1, 0)
        got = fa(*npu(q, k, v), atten_mask=mask, pre_tockens=2, next_tockens=1)[0]
        close(got, oracle.attention(q, k, v, SCALE, keep=keep))
        got = fa(*npu(q, k, v), atten_mask=mask, pre_tockens=2, next_tockens=1, sparse_mode=1)[0]
        close(got, oracle.attention(q, k, v, SCALE))

    @pytest.mark.parametrize(("precise", "empty"), [(0, "mean"), (1, "mean"), (2, "zero")])
    def test_rows_without_columns(self, fa, precise, empty):
        q, k, v = qkv()
        out = torch.rand(SQ, SKV) < 0.4
        out[3] = True
        got = fa(*npu(q, k, v), atten_mask=out.npu(), inner_precise=precise)[0]
        close(got, oracle.attention(q, k, v, SCALE, keep=~out, empty=empty))

    @pytest.mark.parametrize("shape", [(B, N, SQ, SKV), (1, N, SQ, SKV), (B, N, 1, SKV)])
    def test_pse_is_added_before_the_scale(self, fa, shape):
        q, k, v = qkv(FULL)
        pse = torch.randn(shape)
        close(
            fa(*npu(q, k, v), pse=pse.npu())[0],
            oracle.attention(q, k, v, SCALE, before=pse),
            FULL,
        )

    def test_pse_shapes_dtypes_and_infinities(self, fa):
        q, k, v = npu(*qkv())
        for shape in ((B, 1, SQ, SKV), (SQ, SKV), (1, 1, SQ, SKV), (1, N, 1, SKV)):
            with pytest.raises(RuntimeError, match="unsupported pse shape"):
                fa(q, k, v, pse=torch.zeros(shape, dtype=H).npu())
        with pytest.raises(RuntimeError, match="dtype"):
            fa(q, k, v, pse=torch.zeros(B, N, SQ, SKV).npu())
        pse = torch.zeros(B, N, SQ, SKV, dtype=H)
        pse[:, :, 2, 3] = -torch.inf
        out = fa(q, k, v, pse=pse.npu())[0].cpu()
        assert out[:, :, 2].isnan().all()
        assert not out[:, :, 3].isnan().any()

    def test_sink(self, fa):
        q, k, v = qkv(FULL)
        sink = torch.randn(N)
        scores = (q.double() @ k.double().transpose(-1, -2)) * SCALE
        weights = torch.cat([scores, sink.double()[:, None, None].expand(B, N, SQ, 1)], -1)
        expected = weights.softmax(-1)[..., :-1] @ v.double()
        close(fa(*npu(q, k, v), sink=sink.npu())[0], expected, FULL)
        with pytest.raises(RuntimeError, match="sink"):
            fa(*npu(q, k, v), sink=sink.half().npu())

    def test_prefix(self, fa):
        if fa.version == "v2":
            with pytest.raises(RuntimeError, match="sparse_mode 5"):
                fa(*npu(*qkv()), sparse_mode=5)
            return
        q, k, v = qkv()
        prefix = [6, 9]
        keep = torch.stack([oracle.bottom_right(SQ, SKV)] * B)
        for b, number in enumerate(prefix):
            keep[b, :, :number] = True
        keep = keep[:, None]
        there = npu(q, k, v)
        expected = oracle.attention(q, k, v, SCALE, keep=keep)
        got = fa(*there, atten_mask=(~keep).npu(), prefix=prefix, sparse_mode=5)[0]
        close(got, expected)
        right = torch.zeros(1024, 2048, dtype=torch.bool)
        right[:, 1024:] = True
        mask = torch.cat([triangle().cpu(), right]).npu()
        close(fa(*there, atten_mask=mask, prefix=prefix, sparse_mode=6)[0], expected)
        for wrong in ([6], [6, 17], [3, 6], None):
            with pytest.raises(RuntimeError, match="prefix"):
                fa(*there, atten_mask=mask, prefix=wrong, sparse_mode=6)
        with pytest.raises(RuntimeError, match="agree"):
            fa(*there, atten_mask=keep.npu(), prefix=prefix, sparse_mode=5)

    @pytest.mark.parametrize("mode", [None, 0, 2, 3, 4])
    def test_varlen(self, fa, mode):
        q_ends, kv_ends = [3, 3, 10], [5, 9, 16]
        q, k, v = torch.randn(10, N, D, dtype=H), *torch.randn(2, 16, 2, D, dtype=H)
        out = torch.zeros(7, 7, dtype=torch.bool)
        out[:, 1] = True
        kwargs = {}
        if mode is not None:
            kwargs = {"sparse_mode": mode, "atten_mask": triangle() if mode else out.npu()}
        if mode == 4:
            kwargs.update(pre_tockens=2, next_tockens=0)
        expected = torch.zeros(10, N, D, dtype=torch.double)
        q_at = kv_at = 0
        for q_end, kv_end in zip(q_ends, kv_ends, strict=True):
            sq, skv = q_end - q_at, kv_end - kv_at
            if sq:
                keep = {
                    None: lambda a, b: torch.ones(a, b).bool(),
                    0: lambda a, b: ~out[:a, :b],
                    2: oracle.top_left,
                    3: oracle.bottom_right,
                    4: lambda a, b: oracle.band(a, b, 2, 0, b - a),
                }[mode](sq, skv)
                one = oracle.attention(
                    q[q_at:q_end].transpose(0, 1)[None],
                    k[kv_at:kv_end].transpose(0, 1)[None],
                    v[kv_at:kv_end].transpose(0, 1)[None],
                    SCALE,
                    keep=keep,
                )
                expected[q_at:q_end] = one[0].transpose(0, 1)
            q_at, kv_at = q_end, kv_end
        got = fa(
            *npu(q, k, v), layout="TND", actual_seq_qlen=q_ends, actual_seq_kvlen=kv_ends, **kwargs
        )
        close(got[0], expected)
        assert got[1].shape == (10, N, 8)

    def test_varlen_statistics_order(self, ops):
        q, k = torch.randn(10, N, D), torch.randn(10, N, D)
        lengths = {"actual_seq_qlen": [10], "actual_seq_kvlen": [10]}
        expected = oracle.lse(q.transpose(0, 1)[None], k.transpose(0, 1)[None], SCALE)[0]
        call = ops.npu_fusion_attention
        args = (*npu(q, k, k), N, "TND")
        out = call(*args, scale=SCALE, softmax_layout="TND", **lengths)
        lse = (out[1] + out[2].log())[..., 0].cpu().double()
        torch.testing.assert_close(lse, expected.t(), atol=1e-5, rtol=1e-5)
        out = call(*args, scale=SCALE, **lengths)
        lse = (out[1] + out[2].log()).reshape(N, 10, 8)[..., 0].cpu().double()
        torch.testing.assert_close(lse, expected, atol=1e-5, rtol=1e-5)

    def test_varlen_limits(self, fa):
        q = torch.zeros(10, N, D, dtype=H).npu()

        def refused(q_ends, kv_ends, match, **kwargs):
            with pytest.raises(RuntimeError, match=match):
                fa(
                    q,
                    q,
                    q,
                    layout="TND",
                    actual_seq_qlen=q_ends,
                    actual_seq_kvlen=kv_ends,
                    **kwargs,
                )

        refused([5], [10], "ends at 5")
        refused([0, 5, 10, 8], [10], "cumulative")
        refused([4, 10], [10], "sequences")
        mask = torch.zeros(1, 1, 10, 10, dtype=torch.bool).npu()
        refused([10], [10], "unsupported atten_mask shape", atten_mask=mask)
        with pytest.raises(RuntimeError, match="needs actual_seq_qlen"):
            fa(q, q, q, layout="TND")

    def test_trailing_zero_lengths_are_ignored(self, ops):
        q = torch.randn(10, N, D, dtype=H).npu()
        args = (q, q, q, N, "TND")
        one = ops.npu_fusion_attention(*args, actual_seq_qlen=[4, 10], actual_seq_kvlen=[4, 10])[0]
        two = ops.npu_fusion_attention(
            *args, actual_seq_qlen=[4, 10, 0], actual_seq_kvlen=[4, 10, 0]
        )[0]
        assert torch.equal(one, two)

    def test_limits(self, fa):
        good = npu(*qkv())

        def refused(match, *tensors, **kwargs):
            with pytest.raises(RuntimeError, match=match):
                fa(*(tensors or good), **kwargs)

        refused("head number", n=3)
        refused("head_num|head number", n=0)
        refused("dimensions", layout="BSH")
        refused("input_layout", layout="NSD")
        refused("keep_prob", keep_prob=0.0)
        refused("keep_prob", keep_prob=1.5)
        refused("padding_mask", padding_mask=good[0])
        refused("sparse_mode", sparse_mode=9)
        refused("inner_precise", inner_precise=3)
        q, k, v = qkv()
        refused("one dtype", *npu(q, k.float(), v))
        refused("dtype", *npu(q.double(), k.double(), v.double()))
        refused("dtype", *npu(q.char(), k.char(), v.char()))
        refused("one head_dim", *npu(q, k[..., :16], v))
        refused("head_dim of value", *npu(q[..., :16], k[..., :16], v))
        refused("multiple", *npu(q, k[:, :3], v[:, :3]))
        refused("batch", *npu(q, k[:1], v[:1]))
        refused("differ", *npu(q, k, v[:, :, :4]))
        wide = torch.zeros(1, 1, 4, 776, dtype=H).npu()
        refused("768", wide, wide, wide, n=1)
        many = torch.zeros(1, 257, 4, 8, dtype=H).npu()
        refused("1..256", many, many, many, n=257)
        refused("lengths", *npu(q, k[:, :, :0], v[:, :, :0]))

    def test_dropout_is_not_emulated(self, fa):
        with pytest.raises(NotImplementedError, match="not emulated"):
            fa(*npu(*qkv()), keep_prob=0.9)

    def test_lengths_as_tensors(self, ops):
        q = torch.zeros(10, N, D, dtype=H).npu()
        lengths = torch.tensor([10])
        for name in ("npu_fusion_attention", "npu_fusion_attention_v2"):
            with pytest.raises(RuntimeError, match=r"List\[int\]"):
                getattr(ops, name)(
                    q, q, q, N, "TND", actual_seq_qlen=lengths, actual_seq_kvlen=lengths
                )
        v3 = ops.npu_fusion_attention_v3
        with pytest.raises(RuntimeError, match="must be on CPU"):
            there = lengths.npu()
            v3(q, q, q, N, "TND", actual_seq_qlen=there, actual_seq_kvlen=there)
        with pytest.raises(RuntimeError, match="int64"):
            v3(q, q, q, N, "TND", actual_seq_qlen=lengths.int(), actual_seq_kvlen=lengths.int())

    @pytest.mark.parametrize("kind", [0, 1, 2, 3])
    def test_kinds_of_pse_of_v2(self, ops, kind):
        q, k, v = qkv(FULL, sq=SKV)
        i, j = torch.arange(SKV)[:, None], torch.arange(SKV)[None]
        kwargs = {}
        if kind < 2:
            pse = torch.randn(B, N, SKV, SKV)
            expected = {"after" if kind == 0 else "before": pse}
        else:
            pse = torch.rand(N)
            distance = (j + 3 - i - 1).abs().double()
            bias = -pse[:, None, None] * (distance.sqrt() if kind == 3 else distance)
            expected = {"after": bias}
            kwargs = {"q_start_idx": [1], "kv_start_idx": [3]}
        got = ops.npu_fusion_attention_v2(
            *npu(q, k, v), N, "BNSD", scale=SCALE, pse=pse.npu(), pse_type=kind, **kwargs
        )
        close(got[0], oracle.attention(q, k, v, SCALE, **expected), FULL)
        with pytest.raises(RuntimeError, match="pse_type"):
            ops.npu_fusion_attention_v2(*npu(q, k, v), N, "BNSD", pse=pse.npu(), pse_type=4)

    @pytest.mark.parametrize("masked", [False, True])
    def test_gradients(self, ops, masked):
        q, k, v = (x.requires_grad_() for x in qkv(FULL, nkv=2))
        out = torch.rand(SQ, SKV) < 0.3
        keep = ~out if masked else None
        there = [x.detach().npu().requires_grad_() for x in (q, k, v)]
        weight = torch.randn(B, N, SQ, D)
        (oracle.attention(q, k, v, SCALE, keep=keep) * weight).sum().backward()
        kwargs = {"atten_mask": out.npu()} if masked else {}
        got = ops.npu_fusion_attention(*there, N, "BNSD", scale=SCALE, **kwargs)[0]
        (got * weight.npu()).sum().backward()
        for one, other in zip(there, (q, k, v), strict=True):
            torch.testing.assert_close(one.grad.cpu(), other.grad, atol=1e-5, rtol=1e-5)


class TestPromptFlashAttention:
    def call(self, ops, q, k, v, layout="BNSD", n=N, **kwargs):
        kwargs.setdefault("num_heads", n)
        kwargs.setdefault("scale_value", SCALE)
        return ops.npu_prompt_flash_attention(*npu(q, k, v), input_layout=layout, **kwargs)

    @pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH", "BNSD_BSND"])
    @pytest.mark.parametrize("dtype", [H, BF])
    def test_layouts(self, ops, layout, dtype):
        q, k, v = qkv(dtype, nkv=2)
        there, back = layout.partition("_")[0], layout.rpartition("_")[2]
        got = self.call(
            ops, *(to_layout(x, there) for x in (q, k, v)), layout=layout, num_key_value_heads=2
        )
        close(got, to_layout(oracle.attention(q, k, v, SCALE), back), dtype)

    @pytest.mark.parametrize(
        "shape", [(SQ, SKV), (1, SQ, SKV), (B, SQ, SKV), (1, 1, SQ, SKV), (B, 1, SQ, SKV)]
    )
    @pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.uint8])
    def test_masks(self, ops, shape, dtype):
        q, k, v = qkv()
        out = torch.rand(shape) < 0.4
        out[..., 0] = False
        keep = ~(out if len(shape) != 3 else out[:, None])
        mask = out.to(dtype).npu()
        got = self.call(ops, q, k, v, atten_mask=mask, next_tokens=2147483647)
        close(got, oracle.attention(q, k, v, SCALE, keep=keep))
        # the default of next_tokens is 0: a mask turns the call causal
        got = self.call(ops, q, k, v, atten_mask=mask)
        close(got, oracle.attention(q, k, v, SCALE, keep=keep & oracle.top_left(SQ, SKV)))
        got = self.call(ops, q, k, v, atten_mask=mask, sparse_mode=1)
        close(got, oracle.attention(q, k, v, SCALE, keep=keep))

    @pytest.mark.parametrize("shape", [(B, N, SQ, SKV), (1, N, SQ, SKV), (B, 1, 1, SKV), (SKV,)])
    def test_mask_shapes(self, ops, shape):
        with pytest.raises(RuntimeError, match="unsupported atten_mask shape"):
            self.call(ops, *qkv(), atten_mask=torch.zeros(shape, dtype=torch.bool).npu())

    @pytest.mark.parametrize("mode", [2, 3, 4, 12, 13])
    @pytest.mark.parametrize("leading", [(), (1,), (1, 1)])
    def test_compressed(self, ops, mode, leading):
        q, k, v = qkv()
        mask = triangle().reshape(*leading, 2048, 2048)
        kwargs = {"pre_tokens": 2, "next_tokens": 1} if mode == 4 else {}
        keep = {
            2: oracle.top_left(SQ, SKV),
            3: oracle.bottom_right(SQ, SKV),
            4: oracle.band(SQ, SKV, 2, 1, SKV - SQ),
        }[mode % 10]
        got = self.call(ops, q, k, v, atten_mask=mask, sparse_mode=mode, **kwargs)
        close(got, oracle.attention(q, k, v, SCALE, keep=keep))

    def test_without_mask_it_is_full(self, ops):
        q, k, v = qkv()
        close(self.call(ops, q, k, v, sparse_mode=3), oracle.attention(q, k, v, SCALE))

    def test_defaults_are_traps(self, ops):
        q, k, v = qkv()
        there = npu(*(to_layout(x, "BSH") for x in (q, k, v)))
        got = ops.npu_prompt_flash_attention(*there)
        one_head = [to_layout(x, "BSH")[:, None] for x in (q, k, v)]
        close(got, oracle.attention(*one_head, 1.0)[:, 0])

    def test_masked_rows_come_out_as_the_mean(self, ops):
        q, k, v = qkv()
        out = torch.zeros(SQ, SKV, dtype=torch.bool)
        out[2] = True
        got = self.call(ops, q, k, v, atten_mask=out.npu(), sparse_mode=1)
        close(got, oracle.attention(q, k, v, SCALE, keep=~out, empty="mean"))

    def test_shift_is_added_after_the_scale(self, ops):
        q, k, v = qkv()
        shift = torch.randn(1, N, SQ, SKV, dtype=H)
        got = self.call(ops, q, k, v, pse_shift=shift.npu())
        close(got, oracle.attention(q, k, v, SCALE, after=shift))
        with pytest.raises(RuntimeError, match="pse_shift shape"):
            self.call(ops, q, k, v, pse_shift=shift[:, :1].contiguous().npu())

    def test_lengths_are_per_batch(self, ops):
        q, k, v = qkv()
        got = self.call(ops, q, k, v, actual_seq_lengths=[5, 12], actual_seq_lengths_kv=[16, 0])
        expected = oracle.attention(q, k, v, SCALE)
        expected[0, :, 5:] = 0
        expected[1] = 0
        close(got, expected)
        for wrong in ([5], [5, 17], [-1, 5]):
            with pytest.raises(RuntimeError, match="actual_seq_lengths_kv"):
                self.call(ops, q, k, v, actual_seq_lengths_kv=wrong)

    def test_limits(self, ops):
        q, k, v = qkv()

        def refused(match, *tensors, **kwargs):
            with pytest.raises(RuntimeError, match=match):
                self.call(ops, *(tensors or (q, k, v)), **kwargs)

        refused("contiguous", q.transpose(1, 2), k, v)
        refused("dtype", q.float(), k.float(), v.float())
        refused("one dtype", q, k.bfloat16(), v)
        refused("head number", n=2)
        refused("num_key_value_heads|head number", num_key_value_heads=3)
        refused("one shape", q, k, v[..., :16].contiguous())
        refused("head number", q, k[:, :2].contiguous(), v[:, :2].contiguous())
        refused("sparse_mode", sparse_mode=5)
        refused("sparse_mode", sparse_mode=7)
        refused("input_layout", layout="SBH")
        wide = torch.zeros(1, 1, 4, 528, dtype=H)
        refused("512", wide, wide, wide, n=1)
        broad = torch.zeros(1, 2, 256, 256, dtype=H)
        refused("65535", broad, broad, broad, layout="BSND", n=256)
        refused("contiguous", atten_mask=torch.zeros(SKV, SQ, dtype=torch.bool).npu().t())

    def test_quantised_forms_are_not_emulated(self, ops):
        q = torch.zeros(1, 1, 4, 32, dtype=torch.int8)
        with pytest.raises(NotImplementedError, match="int8"):
            self.call(ops, q, q, q, n=1)
        with pytest.raises(NotImplementedError, match="quant_scale1"):
            self.call(ops, *qkv(), quant_scale1=torch.zeros(1).npu())


@pytest.fixture(params=["", "_v2"])
def fia(request, ops):
    """One of the inference attentions under v1's names."""
    names = {
        "actual_seq_lengths": "actual_seq_qlen",
        "actual_seq_lengths_kv": "actual_seq_kvlen",
        "num_heads": "num_query_heads",
        "scale": "softmax_scale",
        "softmax_lse_flag": "return_softmax_lse",
    }

    def call(q, k, v, layout="BNSD", **kwargs):
        kwargs = {"num_heads": N, "scale": SCALE, **kwargs}
        if request.param:
            kwargs = {names.get(key, key): value for key, value in kwargs.items()}
        op = getattr(ops, "npu_fused_infer_attention_score" + request.param)
        return op(*npu(q, k, v), input_layout=layout, **kwargs)

    return call


class TestFusedInferAttention:
    @pytest.mark.parametrize(
        "layout",
        ["BNSD", "BSND", "BSH", "BNSD_BSND", "BNSD_NBSD", "BSND_NBSD", "BSH_NBSD"],
    )
    @pytest.mark.parametrize("dtype", [H, BF])
    def test_layouts(self, fia, layout, dtype):
        q, k, v = qkv(dtype, nkv=2)
        there, back = layout.partition("_")[0], layout.rpartition("_")[2]
        got, lse = fia(
            *(to_layout(x, there) for x in (q, k, v)), layout=layout, num_key_value_heads=2
        )
        close(got, to_layout(oracle.attention(q, k, v, SCALE), back), dtype)
        assert lse.shape == (0,)

    def test_lse(self, fia):
        q, k, v = qkv()
        lse = fia(q, k, v, softmax_lse_flag=True)[1]
        assert lse.shape == (B, N, SQ, 1)
        expected = oracle.lse(q, k, SCALE)
        torch.testing.assert_close(lse[..., 0].cpu().double(), expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("layout", ["TND", "TND_NTD", "NTD_TND"])
    @pytest.mark.parametrize("mode", [0, 3])
    def test_varlen(self, fia, layout, mode):
        q, k, v = (torch.randn(10, N, 64, dtype=H) for _ in range(3))
        ends = [4, 10]
        expected = torch.zeros(10, N, 64, dtype=torch.double)
        for start, end in ((0, 4), (4, 10)):
            one = [x[start:end].transpose(0, 1)[None] for x in (q, k, v)]
            keep = oracle.bottom_right(end - start, end - start) if mode else None
            expected[start:end] = oracle.attention(*one, SCALE, keep=keep)[0].transpose(0, 1)
        if layout.startswith("NTD"):
            q, k, v = (x.transpose(0, 1).contiguous() for x in (q, k, v))
        kwargs = {"atten_mask": triangle(), "sparse_mode": 3} if mode else {}
        got, lse = fia(
            q,
            k,
            v,
            layout=layout,
            actual_seq_lengths=ends,
            actual_seq_lengths_kv=ends,
            softmax_lse_flag=True,
            **kwargs,
        )
        close(got, expected.transpose(0, 1) if layout.endswith("_NTD") else expected)
        assert lse.shape == (10, N, 1)
        with pytest.raises(RuntimeError, match="actual_seq"):
            fia(q, k, v, layout=layout)

    @pytest.mark.parametrize(
        "shape", [(SQ, SKV), (1, SQ, SKV), (B, SQ, SKV), (1, 1, SQ, SKV), (B, 1, SQ, SKV)]
    )
    @pytest.mark.parametrize(
        ("precise", "empty"), [(0, "mean"), (1, "mean"), (2, "zero"), (3, "zero")]
    )
    def test_masks(self, fia, shape, precise, empty):
        q, k, v = qkv()
        out = torch.rand(shape) < 0.4
        out[..., 2, :] = True
        keep = ~(out if len(shape) != 3 else out[:, None])
        got = fia(q, k, v, atten_mask=out.npu(), inner_precise=precise)[0]
        close(got, oracle.attention(q, k, v, SCALE, keep=keep, empty=empty))

    def test_one_query_row(self, fia):
        q, k, v = qkv(sq=1)
        out = torch.rand(B, SKV) < 0.4
        out[:, 0] = False
        got = fia(q, k, v, atten_mask=out.npu())[0]
        close(got, oracle.attention(q, k, v, SCALE, keep=~out[:, None, None]))
        got = fia(q, k, v, atten_mask=triangle(), sparse_mode=3)[0]
        close(got, oracle.attention(q, k, v, SCALE))

    @pytest.mark.parametrize("mode", [2, 3, 4])
    def test_compressed(self, fia, mode):
        q, k, v = qkv()
        kwargs = {"pre_tokens": 2, "next_tokens": 1} if mode == 4 else {}
        keep = {
            2: oracle.top_left(SQ, SKV),
            3: oracle.bottom_right(SQ, SKV),
            4: oracle.band(SQ, SKV, 2, 1, SKV - SQ),
        }[mode]
        got = fia(q, k, v, atten_mask=triangle(), sparse_mode=mode, **kwargs)[0]
        close(got, oracle.attention(q, k, v, SCALE, keep=keep))

    def test_shift_and_lengths(self, fia):
        q, k, v = qkv()
        shift = torch.randn(B, N, SQ, SKV, dtype=H)
        got = fia(q, k, v, pse_shift=shift.npu(), actual_seq_lengths_kv=[7, 16])[0]
        keep = torch.ones(B, 1, SQ, SKV, dtype=torch.bool)
        keep[0, :, :, 7:] = False
        close(got, oracle.attention(q, k, v, SCALE, after=shift, keep=keep))

    def test_limits(self, fia):
        q, k, v = qkv()

        def refused(match, *tensors, **kwargs):
            with pytest.raises(RuntimeError, match=match):
                fia(*(tensors or (q, k, v)), **kwargs)

        refused("contiguous", q.transpose(1, 2), k, v)
        refused("dtype", q.float(), k.float(), v.float())
        refused("head number", num_heads=3)
        refused("multiple of 16", *(x[..., :24].contiguous() for x in (q, k, v)))
        refused("inner_precise", inner_precise=4)
        refused("sparse_mode", sparse_mode=5)
        refused("input_layout", layout="SBH")
        refused("Sq > 1", q[:, :, :1].contiguous(), k, v, layout="BNSD_BSND")
        long = torch.zeros(1, N, 17, D, dtype=H)
        refused("16", long, long, long, layout="BNSD_NBSD")
        refused("unsupported atten_mask", atten_mask=torch.zeros(B, N, SQ, SKV).bool().npu())
        refused("unsupported atten_mask", atten_mask=torch.zeros(B, 1, 1, SKV).bool().npu())
        refused("pse_shift", pse_shift=torch.zeros(1, 1, SQ, SKV, dtype=H).npu())
        t = torch.zeros(4, N, 32, dtype=H)
        lengths = {"actual_seq_lengths": [4], "actual_seq_lengths_kv": [4]}
        refused("64, 128", t, t, t, layout="TND", **lengths)
        wide = torch.zeros(1, 65, 2, 16, dtype=H)
        one = wide[:, :1].contiguous()
        refused("64 times", wide, one, one, num_heads=65, num_key_value_heads=1)


class TestBlockSparseAttention:
    def call(self, ops, q, k, v, mask, **kwargs):
        kwargs = {
            "q_input_layout": "BNSD",
            "kv_input_layout": "BNSD",
            "num_key_value_heads": k.shape[1],
            "scale_value": SCALE,
            "inner_precise": 0,
            **kwargs,
        }
        shape = kwargs.pop("block_shape", [64, 128])
        return ops.npu_block_sparse_attention(*npu(q, k, v, mask), shape, **kwargs)

    @staticmethod
    def example(dtype=H, sq=150, skv=300, d=64):
        q, k, v = qkv(dtype, n=4, nkv=2, sq=sq, skv=skv, d=d)
        mask = (torch.rand(B, 4, 3, 3) < 0.5).to(torch.int8)
        mask[..., 0] = 1
        keep = mask.bool().repeat_interleave(64, 2)[:, :, :sq]
        return q, k, v, mask, keep.repeat_interleave(128, 3)[..., :skv]

    @pytest.mark.parametrize(("dtype", "precise"), [(H, 0), (H, 1), (BF, 0)])
    @pytest.mark.parametrize("d", [64, 128])
    def test_one_means_compute(self, ops, dtype, precise, d):
        q, k, v, mask, keep = self.example(dtype, d=d)
        got, _ = self.call(ops, q, k, v, mask, inner_precise=precise)
        close(got, oracle.attention(q, k, v, SCALE, keep=keep), dtype)

    def test_lse(self, ops):
        q, k, v, mask, _ = self.example()
        assert self.call(ops, q, k, v, mask)[1].isnan().all()
        lse = self.call(ops, q, k, v, torch.ones_like(mask), softmax_lse_flag=1)[1]
        assert lse.shape == (B, 4, 150, 1)
        expected = oracle.lse(q, k, SCALE)
        torch.testing.assert_close(lse[..., 0].cpu().double(), expected, atol=1e-5, rtol=1e-5)

    def test_default_scale_is_zero(self, ops):
        q, k, v, mask, keep = self.example()
        got, _ = ops.npu_block_sparse_attention(
            *npu(q, k, v, mask),
            [64, 128],
            q_input_layout="BNSD",
            kv_input_layout="BNSD",
            num_key_value_heads=2,
        )
        close(got, oracle.attention(q, k, v, 0.0, keep=keep))

    def test_varlen_lengths_are_per_batch(self, ops):
        q, k, v, mask, keep = self.example()
        lengths = {"actual_seq_lengths": [150, 100], "actual_seq_lengths_kv": [200, 300]}
        expected = oracle.attention(
            q[:1], k[:1, :, :200], v[:1, :, :200], SCALE, keep=keep[:1, :, :, :200]
        )
        second = oracle.attention(q[1:, :, :100], k[1:], v[1:], SCALE, keep=keep[1:, :, :100])
        packed = [
            torch.cat([x[0, :, :a], x[1, :, :b]], 1).transpose(0, 1).contiguous()
            for x, a, b in ((q, 150, 100), (k, 200, 300), (v, 200, 300))
        ]
        tnd = {"q_input_layout": "TND", "kv_input_layout": "TND", "num_key_value_heads": 2}
        got, _ = self.call(ops, *packed, mask, **tnd, **lengths)
        close(got, torch.cat([expected[0], second[0]], 1).transpose(0, 1))
        with pytest.raises(RuntimeError, match="lengths"):
            self.call(ops, *packed, mask, **tnd)

    def test_rows_without_blocks_are_seen(self, ops):
        q, k, v, mask, _ = self.example()
        mask[0, 0, 1] = 0
        got = self.call(ops, q, k, v, mask)[0].cpu()
        assert got[0, 0, 64:128].isnan().all()
        assert not got[0, 0, :64].isnan().any()

    def test_limits(self, ops):
        q, k, v, mask, _ = self.example()

        def refused(match, *tensors, **kwargs):
            with pytest.raises(RuntimeError, match=match):
                self.call(ops, *(tensors or (q, k, v, mask)), **kwargs)

        refused("dtype", q, k, v, mask.bool())
        refused("shape", q, k, v, mask[:, :1])
        refused("other than 0 and 1", q, k, v, mask * 2)
        refused("64 or 128", *(x[..., :32] for x in (q, k, v)), mask)
        refused("dtype", *(x.float() for x in (q, k, v)), mask)
        refused("multiple of 128", block_shape=[64, 64])
        refused("block_shape", block_shape=[0, 128])
        refused("heads|head number", num_key_value_heads=1)
        refused("inner_precise", inner_precise=2)
        refused("float16 only", *(x.bfloat16() for x in (q, k, v)), mask, inner_precise=1)
        refused("both", actual_seq_lengths=[150, 150])
        refused("layouts", q_input_layout="BSND", kv_input_layout="BSND")


def test_unknown_operators_say_so(ops):
    x = torch.zeros(2, 2, device="npu")
    with pytest.raises(NotImplementedError, match="not emulated: npu::npu_iou"):
        ops.npu_iou(x, x)

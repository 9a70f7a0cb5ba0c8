"""The specification of the attention functions, a statement a test.

The docstring of each test is the statement; ``docs/specification.md`` is made from them.
"""

import gc
import inspect
import math
import weakref
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

import mindiesd
from mindiesd import (
    ParametersInvalid,
    attention_forward,
    attention_forward_varlen,
    sparse_attention,
)
from mindiesd.ops import varlen
from tests import oracles


def rejects(argument, call, *arguments, **options):
    with pytest.raises(ParametersInvalid) as caught:
        call(*arguments, **options)
    assert caught.value.argument.split("[")[0] == argument


def close(out, expected):
    oracles.assert_close(out, expected)


def bsnd(batch=2, length=12, heads=4, dim=8, dtype=torch.float32):
    return tuple(torch.randn(3, batch, length, heads, dim).to(dtype))


def turned(*tensors):
    return tuple(t.transpose(1, 2) for t in tensors)


class TestOverview:
    """Interface overview"""

    NAMES = (
        "attention_forward",
        "attention_forward_varlen",
        "sparse_attention",
        "rotary_position_embedding",
        "RMSNorm",
        "fast_layernorm",
        "layernorm_scale_shift",
        "get_activation_layer",
    )

    @pytest.mark.parametrize("name", NAMES)
    def test_import_from_the_package(self, name):
        """All interfaces can be imported directly via `from mindiesd import <interface_name>`."""
        assert getattr(mindiesd, name) is not None and name in mindiesd.__all__

    @pytest.mark.parametrize("name", [n for n in NAMES if n != "RMSNorm"])
    def test_functions(self, name):
        """The interfaces are functions, except RMSNorm."""
        assert inspect.isfunction(getattr(mindiesd, name))

    def test_class(self):
        """RMSNorm is a class."""
        assert issubclass(mindiesd.RMSNorm, torch.nn.Module)


class TestAttentionForward:
    """attention_forward"""

    def test_default_layout(self):
        """`head_first=False` (default): the tensors are [B,S,N,D]."""
        q, k, v = bsnd()
        expected = oracles.attention(*turned(q, k, v)).transpose(1, 2)
        close(attention_forward(q, k, v), expected)
        close(attention_forward(q, k, v, head_first=False), expected)

    def test_head_first(self):
        """`head_first=True`: the tensors are [B,N,S,D]."""
        q, k, v = turned(*bsnd())
        close(attention_forward(q, k, v, head_first=True), oracles.attention(q, k, v))

    @pytest.mark.parametrize("name", ["query", "key", "value"])
    @pytest.mark.parametrize("rank", [3, 5])
    def test_four_dimensions(self, name, rank):
        """query, key and value are 4D tensors."""
        given = dict(zip(("query", "key", "value"), bsnd(), strict=True))
        given[name] = given[name][0] if rank == 3 else given[name][None]
        rejects(name, attention_forward, **given)

    @pytest.mark.parametrize("head_first", [False, True])
    def test_key_in_the_layout_of_query(self, head_first):
        """key and value have the same layout as query."""
        q, k, v = bsnd(length=12, heads=4)
        if head_first:
            q, k, v = turned(q, k, v)
        with pytest.raises(ParametersInvalid):
            attention_forward(q, *turned(k, v), head_first=head_first)

    def test_no_mask(self):
        """`attn_mask` is optional and None by default."""
        q, k, v = bsnd()
        assert torch.equal(attention_forward(q, k, v), attention_forward(q, k, v, None))

    @pytest.mark.parametrize("shape", [(12, 12), (1, 1, 12, 12), (2, 1, 1, 12), (2, 4, 12, 12)])
    @pytest.mark.parametrize("fused", [True, False])
    def test_bool_mask(self, shape, fused):
        """`attn_mask`: attention mask; of bool, True takes part."""
        q, k, v = turned(*bsnd())
        mask = torch.rand(shape) < 0.6
        out = attention_forward(q, k, v, mask, fused=fused, head_first=True)
        close(out, oracles.attention(q, k, v, keep=mask))

    @pytest.mark.parametrize("fused", [True, False])
    def test_additive_mask(self, fused):
        """`attn_mask`: attention mask; of floating numbers, it is added to the scores."""
        q, k, v = turned(*bsnd())
        mask = torch.randn(2, 1, 12, 12)
        out = attention_forward(q, k, v, mask, fused=fused, head_first=True)
        close(out, oracles.attention(q, k, v, bias=mask))

    def test_scale(self):
        """`scale`: scale factor."""
        q, k, v = turned(*bsnd())
        close(
            attention_forward(q, k, v, scale=0.7, head_first=True),
            oracles.attention(q, k, v, scale=0.7),
        )

    def test_default_scale(self):
        """`scale` defaults to head_dim ** -0.5 when None."""
        q, k, v = bsnd()
        assert torch.equal(attention_forward(q, k, v), attention_forward(q, k, v, scale=8**-0.5))

    @pytest.mark.parametrize("head_first", [False, True])
    def test_unfused(self, head_first, monkeypatch):
        """`fused=False` falls back to native computation."""
        q, k, v = bsnd()
        given = turned(q, k, v) if head_first else (q, k, v)

        def never(*_, **__):
            raise AssertionError("a fused kernel was called")

        monkeypatch.setattr("mindiesd.ops.backends.native._sdpa", never)
        out = attention_forward(*given, fused=False, head_first=head_first)
        expected = oracles.attention(*turned(q, k, v))
        close(out if head_first else out.transpose(1, 2), expected)

    @pytest.mark.parametrize("mode", ["runtime", "static", "manual"])
    def test_modes(self, mode):
        """`opt_mode` is "runtime", "static" or "manual"; each computes the same."""
        q, k, v = bsnd()
        close(
            attention_forward(q, k, v, opt_mode=mode),
            oracles.attention(*turned(q, k, v)).transpose(1, 2),
        )

    def test_default_mode(self):
        """`opt_mode` defaults to "runtime"; another value is an error."""
        q, k, v = bsnd()
        expected = attention_forward(q, k, v, opt_mode="runtime")
        assert torch.equal(attention_forward(q, k, v), expected)
        rejects("opt_mode", attention_forward, q, k, v, opt_mode="auto")

    @pytest.mark.parametrize(
        "operator", ["prompt_flash_attn", "fused_attn_score", "ascend_laser_attention"]
    )
    @pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH"])
    def test_manual(self, operator, layout):
        """In manual mode `op_type` and `layout` name the operator and its layout."""
        q, k, v = bsnd()
        out = attention_forward(q, k, v, opt_mode="manual", op_type=operator, layout=layout)
        close(out, oracles.attention(*turned(q, k, v)).transpose(1, 2))

    def test_other_operators(self):
        """`op_type` supports three names and `layout` three; others are errors."""
        q, k, v = bsnd()
        rejects("op_type", attention_forward, q, k, v, opt_mode="manual", op_type="flash")
        rejects("layout", attention_forward, q, k, v, opt_mode="manual", layout="SBH")

    @pytest.mark.parametrize("mode", ["runtime", "static"])
    def test_only_effective_in_manual_mode(self, mode):
        """`op_type` and `layout` are only effective when opt_mode="manual"."""
        from mindiesd.ops.dispatch import requested

        assert requested(mode, "prompt_flash_attn", "BSH") is None
        assert requested("manual", "prompt_flash_attn", "BSH") == ("prompt_flash_attn", "BSH")

    @pytest.mark.parametrize("head_first", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_result(self, head_first, dtype):
        """Returns the attention result in the same layout as the input."""
        q, k, v = bsnd(dtype=dtype)
        given = turned(q, k, v) if head_first else (q, k, v)
        out = attention_forward(*given, head_first=head_first)
        assert (out.shape, out.dtype) == (given[0].shape, dtype)

    def test_migration_from_sdpa(self):
        """Migrating from SDPA: adjust [B,N,S,D] to [B,S,N,D] and remove transposes."""
        q, k, v = bsnd()
        theirs = F.scaled_dot_product_attention(*turned(q, k, v)).transpose(1, 2)
        assert torch.equal(attention_forward(q, k, v), theirs)

    def test_migration_from_flash_attention(self):
        """Migrating from flash_attn_func: the layout is [B,S,N,D] already."""
        q, k, v = bsnd(length=9)
        out = attention_forward(q, k, v, window_size=(3, 0))
        keep = oracles.window(9, 9, 3, 0)
        close(out, oracles.attention(*turned(q, k, v), keep=keep).transpose(1, 2))

    @pytest.mark.parametrize("at", [0, 1, 2])
    def test_no_backward(self, at):
        """Forward inference only: a call that needs gradients is an error."""
        tensors = bsnd()
        tensors[at].requires_grad_()
        rejects(("query", "key", "value")[at], attention_forward, *tensors)
        with torch.no_grad():
            attention_forward(*tensors)

    def test_no_dropout(self):
        """Dropout is to be removed when migrating: it is no argument."""
        rejects("dropout_p", attention_forward, *bsnd(), dropout_p=0.1)

    def test_example(self):
        """The example of the documentation, on this device."""
        q, k, v = bsnd(2, 64, 24, 128, torch.float16)
        assert attention_forward(q, k, v).shape == q.shape


def packed(lengths_q, lengths_k=None, heads=(4, 4), dims=(8, 8)):
    lengths_k = lengths_q if lengths_k is None else lengths_k
    q = torch.randn(sum(lengths_q), heads[0], dims[0])
    k = torch.randn(sum(lengths_k), heads[1], dims[0])
    v = torch.randn(sum(lengths_k), heads[1], dims[1])
    return q, k, v


def starts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def reference(q, k, v, lengths_q, lengths_k=None, rule=None, **options):
    lengths_k = lengths_q if lengths_k is None else lengths_k
    rule = rule or (lambda n, m: oracles.predicate(n, m, lambda i, j: True))
    return oracles.attention_varlen(q, k, v, lengths_q, lengths_k, rule, **options)


LENGTHS = [3, 0, 5, 1]
CU = starts(LENGTHS)


class TestVarlen:
    """attention_forward_varlen"""

    @pytest.mark.parametrize("at", [0, 1, 2])
    def test_three_dimensions(self, at):
        """q, k and v are 3D, [T,N,D], T the total token count across all sequences."""
        tensors = list(packed(LENGTHS))
        tensors[at] = tensors[at][None]
        rejects("qkv"[at], attention_forward_varlen, *tensors, CU, CU)

    FORMS: ClassVar = {
        "int32 tensor": lambda cu: cu,
        "int64 tensor": lambda cu: cu.long(),
        "list of ints": lambda cu: cu.tolist(),
        "list of tensors": lambda cu: list(cu),
    }

    @pytest.mark.parametrize("form", FORMS)
    def test_cumulative_lengths(self, form):
        """`cu_seqlens_q`, `cu_seqlens_k`: cumulative sequence lengths, (batch_size + 1,), int32."""
        tensors = packed(LENGTHS)
        cu = self.FORMS[form](CU)
        close(attention_forward_varlen(*tensors, cu, cu), reference(*tensors, LENGTHS))

    @pytest.mark.parametrize(
        "wrong",
        [
            torch.tensor([0, 3, 3, 8, 9]).float(),
            torch.tensor([[0, 9]]),
            torch.tensor([1, 9]),
            [0, 3, 8],
            [0, 5, 3, 9],
            [0, 3.0, 9],
            [],
            None,
        ],
        ids=lambda value: str(value)[:24],
    )
    def test_mismatched_lengths(self, wrong):
        """Lengths that do not describe the tokens are errors."""
        tensors = packed(LENGTHS)
        rejects("cu_seqlens_q", attention_forward_varlen, *tensors, wrong, CU)

    def test_as_many_sequences(self):
        """There are as many key sequences as query sequences."""
        tensors = packed(LENGTHS)
        rejects("cu_seqlens_k", attention_forward_varlen, *tensors, CU, [0, 9])

    def test_different_lengths(self):
        """Query and key sequences may differ in length, and be empty."""
        queries, keys = [3, 2, 0, 4], [1, 0, 6, 5]
        tensors = packed(queries, keys)
        out = attention_forward_varlen(*tensors, starts(queries), starts(keys))
        close(out, reference(*tensors, queries, keys))

    def test_host_copy_once(self):
        """Lengths on a device are read once per tensor, again after an in-place change."""
        reads = []

        cu = starts(LENGTHS)
        table_get = varlen._remembered
        real = torch.Tensor.tolist
        try:
            torch.Tensor.tolist = lambda self: reads.append(1) or real(self)
            assert table_get(cu) == table_get(cu) == [0, 3, 3, 8, 9]
            assert len(reads) == 1
            cu[-1] = 10
            assert table_get(cu) == [0, 3, 3, 8, 10]
            assert len(reads) == 2
        finally:
            torch.Tensor.tolist = real
        gone = weakref.ref(cu)
        del cu
        gc.collect()
        assert gone() is None

    @pytest.mark.parametrize("name", ["max_seqlen_q", "max_seqlen_k"])
    def test_longest(self, name):
        """`max_seqlen_q`, `max_seqlen_k`: reserved; None, or a true upper bound."""
        tensors = packed(LENGTHS)
        plain = attention_forward_varlen(*tensors, CU, CU)
        for bound in (None, 5, 100):
            assert torch.equal(attention_forward_varlen(*tensors, CU, CU, **{name: bound}), plain)
        rejects(name, attention_forward_varlen, *tensors, CU, CU, **{name: 4})

    def test_dropout(self):
        """`dropout_p`: currently only 0.0 is supported."""
        tensors = packed(LENGTHS)
        attention_forward_varlen(*tensors, CU, CU, dropout_p=0.0)
        rejects("dropout_p", attention_forward_varlen, *tensors, CU, CU, dropout_p=0.1)

    def test_scale(self):
        """`softmax_scale` defaults to head_dim ** -0.5 when None."""
        tensors = packed(LENGTHS)
        plain = attention_forward_varlen(*tensors, CU, CU)
        same = attention_forward_varlen(*tensors, CU, CU, softmax_scale=8**-0.5)
        assert torch.equal(plain, same)
        out = attention_forward_varlen(*tensors, CU, CU, softmax_scale=0.9)
        close(out, reference(*tensors, LENGTHS, scale=0.9))

    @pytest.mark.parametrize(("queries", "keys"), [([3, 5], [3, 5]), ([3, 5], [6, 2])])
    def test_causal(self, queries, keys):
        """`causal`: aligned at the bottom right of each sequence, as in flash-attention."""
        tensors = packed(queries, keys)
        out = attention_forward_varlen(*tensors, starts(queries), starts(keys), causal=True)
        close(out, reference(*tensors, queries, keys, oracles.bottom_right))

    def test_not_causal(self):
        """`causal` defaults to False."""
        assert inspect.signature(attention_forward_varlen).parameters["causal"].default is False

    def test_grouped_heads(self):
        """k and v may have fewer heads than q (grouped-query attention)."""
        tensors = packed(LENGTHS, heads=(4, 2))
        close(attention_forward_varlen(*tensors, CU, CU), reference(*tensors, LENGTHS))

    def test_window_size(self):
        """`window_size`: reserved; None, or (left, right), which is computed."""
        tensors = packed(LENGTHS)
        plain = attention_forward_varlen(*tensors, CU, CU, window_size=None)
        assert torch.equal(attention_forward_varlen(*tensors, CU, CU, window_size=(-1, -1)), plain)
        out = attention_forward_varlen(*tensors, CU, CU, window_size=(1, 2))
        rule = lambda n, m: oracles.window(n, m, 1, 2)  # noqa: E731
        close(out, reference(*tensors, LENGTHS, rule=rule))
        rejects("window_size", attention_forward_varlen, *tensors, CU, CU, window_size=3)

    def test_softcap(self):
        """`softcap`: reserved; None and 0.0 are off, another number is computed."""
        tensors = packed(LENGTHS)
        plain = attention_forward_varlen(*tensors, CU, CU)
        for off in (None, 0.0):
            out = attention_forward_varlen(*tensors, CU, CU, softcap=off)
            assert torch.equal(out, plain)
        out = attention_forward_varlen(*tensors, CU, CU, softcap=2.0)
        close(out, reference(*tensors, LENGTHS, softcap=2.0))
        rejects("softcap", attention_forward_varlen, *tensors, CU, CU, softcap=-1.0)

    @pytest.mark.parametrize("shape", [(4,), (4, 4)])
    def test_alibi_slopes(self, shape):
        """`alibi_slopes`: reserved; None, or [N] or [B,N], which is computed."""
        tensors, slopes = packed(LENGTHS), torch.rand(shape)
        out = attention_forward_varlen(*tensors, CU, CU, alibi_slopes=slopes)
        close(out, reference(*tensors, LENGTHS, slopes=slopes))
        wrong = torch.rand(3)
        rejects("alibi_slopes", attention_forward_varlen, *tensors, CU, CU, alibi_slopes=wrong)

    @pytest.mark.parametrize("flag", [None, True, False])
    def test_deterministic(self, flag):
        """`deterministic`: reserved; None, True and False give the same, which is deterministic."""
        tensors = packed(LENGTHS)
        plain = attention_forward_varlen(*tensors, CU, CU)
        assert torch.equal(attention_forward_varlen(*tensors, CU, CU, deterministic=flag), plain)
        rejects("deterministic", attention_forward_varlen, *tensors, CU, CU, deterministic=1)

    def test_return_attn_probs(self):
        """`return_attn_probs`: reserved; None and False; True is an error."""
        tensors = packed(LENGTHS)
        for off in (None, False):
            attention_forward_varlen(*tensors, CU, CU, return_attn_probs=off)
        rejects("return_attn_probs", attention_forward_varlen, *tensors, CU, CU,
                return_attn_probs=True)  # fmt: skip

    def test_block_table(self):
        """`block_table`: reserved; only None."""
        tensors = packed(LENGTHS)
        attention_forward_varlen(*tensors, CU, CU, block_table=None)
        table = torch.zeros(1, 1, dtype=torch.int32)
        rejects("block_table", attention_forward_varlen, *tensors, CU, CU, block_table=table)

    def test_result(self):
        """Returns (total, nheads, headdim)."""
        tensors = packed(LENGTHS, dims=(8, 6))
        assert attention_forward_varlen(*tensors, CU, CU).shape == (9, 4, 6)

    def test_migration_from_flash_attention(self):
        """flash_attn_varlen_func's arguments can be given as they are."""
        tensors = packed(LENGTHS)
        out = attention_forward_varlen(
            *tensors, CU, CU, 5, 5, 0.0, None, True, (-1, -1), 0.0, None, False, False
        )
        close(out, reference(*tensors, LENGTHS, rule=oracles.bottom_right))

    @pytest.mark.parametrize("at", [0, 1, 2])
    def test_no_backward(self, at):
        """Forward only: a call that needs gradients is an error."""
        tensors = packed(LENGTHS)
        tensors[at].requires_grad_()
        rejects("qkv"[at], attention_forward_varlen, *tensors, CU, CU)


def bnsd(length=300, heads=2, dim=16):
    return tuple(torch.randn(3, 1, heads, length, dim))


class TestSparse:
    """sparse_attention"""

    @pytest.mark.parametrize("sparse_type", ["rf_v2", "ada_bsa"])
    def test_layouts(self, sparse_type):
        """`input_layout` supports "BNSD" (default) and "BSND"."""
        tensors = bnsd()
        options = {"sparse_type": sparse_type, "sparsity": 0.5, "latent_shape_q": [3, 10, 10]}
        first = sparse_attention(*tensors, **options)
        assert torch.equal(first, sparse_attention(*tensors, input_layout="BNSD", **options))
        other = sparse_attention(*turned(*tensors), input_layout="BSND", **options)
        torch.testing.assert_close(other.transpose(1, 2), first)
        rejects("input_layout", sparse_attention, *tensors, input_layout="SBH")

    def test_four_dimensions(self):
        """q, k and v are 4D tensors."""
        q, k, v = bnsd()
        rejects("q", sparse_attention, q[0], k, v)
        rejects("k", sparse_attention, q, k[0], v)
        rejects("v", sparse_attention, q, k, v[0])

    def test_mask(self):
        """`attn_mask`: reserved; only None."""
        tensors = bnsd()
        sparse_attention(*tensors, attn_mask=None)
        mask = torch.ones(300, 300, dtype=torch.bool)
        rejects("attn_mask", sparse_attention, *tensors, attn_mask=mask)

    @pytest.mark.parametrize("sparse_type", [None, "ada_bsa", "rf_v2"])
    def test_scale(self, sparse_type):
        """`scale` defaults to head_dim ** -0.5 when None."""
        tensors = bnsd()
        options = {"sparse_type": sparse_type, "sparsity": 0.5, "latent_shape_q": [3, 10, 10]}
        assert torch.equal(
            sparse_attention(*tensors, **options), sparse_attention(*tensors, scale=0.25, **options)
        )
        assert not torch.equal(
            sparse_attention(*tensors, **options), sparse_attention(*tensors, scale=0.5, **options)
        )

    @pytest.mark.parametrize("sparse_type", [None, "ada_bsa"])
    def test_causal(self, sparse_type):
        """`is_causal`: no query sees a later key."""
        q, k, v = bnsd()
        options = {"sparse_type": sparse_type, "sparsity": 0.4, "is_causal": True}
        out = sparse_attention(q, k, v, **options)
        v2 = v.clone()
        v2[:, :, 200:] = 1e3
        again = sparse_attention(q, k, v2, **options)
        assert torch.equal(out[:, :, :200], again[:, :, :200])
        if sparse_type is None:
            close(out, oracles.attention(q, k, v, keep=oracles.top_left(300, 300)))

    def test_head_num(self):
        """`head_num`: number of attention heads; 1 (default) leaves it to the tensors."""
        tensors = bnsd()
        plain = sparse_attention(*tensors)
        assert torch.equal(sparse_attention(*tensors, head_num=2), plain)
        rejects("head_num", sparse_attention, *tensors, head_num=3)

    @pytest.mark.parametrize("precise", [0, 1])
    def test_inner_precise(self, precise):
        """`inner_precise`: 0 for high precision, 1 for high performance."""
        tensors = bnsd()
        out = sparse_attention(*tensors, inner_precise=precise, sparse_type="ada_bsa", sparsity=0.1)
        close(out, oracles.attention(*tensors))
        rejects("inner_precise", sparse_attention, *tensors, inner_precise=2)

    @pytest.mark.parametrize("sparse_type", [None, "rf_v2", "ada_bsa"])
    def test_types(self, sparse_type):
        """`sparse_type`: None, "rf_v2" or "ada_bsa"."""
        tensors = bnsd()
        out = sparse_attention(
            *tensors, sparse_type=sparse_type, sparsity=0.5, latent_shape_q=[3, 10, 10]
        )
        assert out.shape == tensors[0].shape
        rejects("sparse_type", sparse_attention, *tensors, sparse_type="rf_v1")

    @pytest.mark.parametrize("sparse_type", [None, "rf_v2", "ada_bsa"])
    @pytest.mark.parametrize("causal", [False, True])
    def test_no_sparsity(self, sparse_type, causal):
        """`sparsity=0` disables the sparse algorithm: exactly the dense result."""
        tensors = bnsd()
        dense = attention_forward(*tensors, head_first=True, is_causal=causal)
        out = sparse_attention(*tensors, sparse_type=sparse_type, sparsity=0, is_causal=causal)
        assert torch.equal(out, dense)

    def test_no_type(self):
        """`sparse_type=None` (default) is exactly dense attention."""
        tensors = bnsd()
        dense = attention_forward(*tensors, head_first=True)
        assert torch.equal(sparse_attention(*tensors, sparsity=0.9), dense)

    def test_range_of_sparsity(self):
        """`sparsity`: range [0, 1]."""
        tensors = bnsd()
        for good in (0, 0.5, 1.0):
            sparse_attention(*tensors, sparse_type="ada_bsa", sparsity=good)
        for wrong in (-0.1, 1.1, math.nan, "0.5"):
            rejects("sparsity", sparse_attention, *tensors, sparsity=wrong)

    def test_block_size(self):
        """`block_size`: currently only 128 is supported."""
        tensors = bnsd()
        sparse_attention(*tensors, block_size=128)
        rejects("block_size", sparse_attention, *tensors, block_size=64)

    def test_text(self):
        """`txt_len`: text tokens of rf_v2 are always kept."""
        q, k, v = bnsd(256 + 128)
        v2 = v.clone()
        v2[:, :, :128] += 1.0
        options = {"sparse_type": "rf_v2", "sparsity": 1.0, "latent_shape_q": [1, 16, 16]}
        out, again = (sparse_attention(q, k, x, txt_len=128, **options) for x in (v, v2))
        assert ((out - again).abs().amax(-1) > 0).all()
        keep = torch.ones(128, 384, dtype=torch.bool)
        close(out[:, :, :128], oracles.attention(q[:, :, :128], k, v, keep=keep))

    @pytest.mark.parametrize("sparse_type", [None, "ada_bsa"])
    def test_text_elsewhere(self, sparse_type):
        """`txt_len` and the latent shapes are only effective when sparse_type="rf_v2"."""
        tensors = bnsd()
        options = {"sparse_type": sparse_type, "sparsity": 0.5}
        plain = sparse_attention(*tensors, **options)
        out = sparse_attention(
            *tensors, txt_len=7, latent_shape_q=[1, 2, 3], latent_shape_k=[4, 5, 6], **options
        )
        assert torch.equal(out, plain)

    @pytest.mark.parametrize("name", ["latent_shape_q", "latent_shape_k"])
    def test_latent_shapes(self, name):
        """`latent_shape_q`, `latent_shape_k`: [t, h, w] with t*h*w the sequence length."""
        tensors = bnsd()
        options = {"sparse_type": "rf_v2", "sparsity": 0.5, "latent_shape_q": [3, 10, 10]}
        assert sparse_attention(*tensors, **options | {"latent_shape_k": [2, 15, 10]}) is not None
        for wrong in ([3, 10, 9], [300], [3.0, 10, 10], "abc"):
            with pytest.raises(ParametersInvalid) as caught:
                sparse_attention(*tensors, **options | {name: wrong})
            assert caught.value.argument.startswith(name)

    def test_keep_sink(self):
        """`keep_sink`: whether to retain sink tokens, with ada_bsa."""
        q, k, v = bnsd(1280)
        k[:, :, :128] = -q.mean() - 5 * q.mean((2,), keepdim=True)
        v2 = v.clone()
        v2[:, :, :128] += 100.0
        options = {"sparse_type": "ada_bsa", "sparsity": 0.8}
        kept, changed = (sparse_attention(q, k, x, keep_sink=True, **options) for x in (v, v2))
        assert ((kept - changed).abs().amax(-1) > 0).all()

    def test_keep_recent(self):
        """`keep_recent`: whether to retain recent tokens, with ada_bsa."""
        q, k, v = bnsd(1280)
        v2 = v.clone()
        v2[:, :, -128:] += 100.0
        options = {"sparse_type": "ada_bsa", "sparsity": 0.8}
        kept, changed = (sparse_attention(q, k, x, keep_recent=True, **options) for x in (v, v2))
        assert ((kept - changed).abs().amax(-1) > 0).all()
        free, other = (sparse_attention(q, k, x, keep_recent=False, **options) for x in (v, v2))
        assert ((free - other).abs().amax(-1) == 0).any()

    def test_cdf_threshold(self):
        """`cdf_threshold`: with ada_bsa, the share of the estimated attention to keep."""
        from mindiesd.ops.sparse import adaptive

        q, k, _ = bnsd(1280)
        options = (0.25, False, False, False)
        counts = [
            adaptive.select(q, k, *options, threshold, 0.01).keep.sum().item()
            for threshold in (0.2, 0.5, 0.8, 1.0)
        ]
        assert counts == sorted(counts) and counts[0] < counts[-1]
        assert counts[-1] == 2 * 10 * 10
        rejects("cdf_threshold", sparse_attention, *bnsd(), cdf_threshold=1.1)

    def test_unknown_keyword(self):
        """`**kwargs`: an unknown keyword is an error, never ignored."""
        rejects("video_spans", sparse_attention, *bnsd(), video_spans=[])

    def test_example(self):
        """The example of the documentation, on this device."""
        q, k, v = torch.randn(3, 2, 24, 300, 16, dtype=torch.float16)
        out = sparse_attention(
            q, k, v, head_num=24, input_layout="BNSD", sparse_type="ada_bsa", sparsity=0.5
        )
        assert out.shape == q.shape

    @pytest.mark.parametrize("sparse_type", [None, "rf_v2", "ada_bsa"])
    def test_no_backward(self, sparse_type):
        """Forward only: a call that needs gradients is an error."""
        q, k, v = bnsd()
        k.requires_grad_()
        options = {"sparse_type": sparse_type, "sparsity": 0.5, "latent_shape_q": [3, 10, 10]}
        rejects("k", sparse_attention, q, k, v, **options)

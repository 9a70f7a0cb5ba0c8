"""Documented limits of the operators that mindiesd calls, beyond those tested with the operators.

Of one series each: the emulated operator raises where the documentation says so.
"""

from __future__ import annotations

import pytest
import torch

H, BF, FULL = torch.float16, torch.bfloat16, torch.float32
INT_MAX = 2147483647


@pytest.fixture
def ops(npu):
    import torch_npu

    return torch_npu


@pytest.fixture
def series(monkeypatch):
    """Become another series for one test."""
    from mindiesd.emulator.ops import soc

    return lambda number: monkeypatch.setattr(soc, "number", lambda: number)


def z(*shape, dtype=H):
    return torch.zeros(shape, dtype=dtype, device="npu")


def refuses(match, call, *args, **kwargs):
    with pytest.raises(RuntimeError, match=match) as caught:
        call(*args, **kwargs)
    assert not isinstance(caught.value, NotImplementedError)


SUFFIXES = ("", "_v2", "_v3")


@pytest.mark.parametrize("suffix", SUFFIXES)
class TestFusionAttention:
    def call(self, ops, suffix, q, n, layout, **kwargs):
        return getattr(torch.ops.npu, f"npu_fusion_attention{suffix}")(q, q, q, n, layout, **kwargs)

    def test_batch(self, ops, suffix):
        many = z((2 << 20) + 1, 1, 1, 1)
        refuses("at most 2M", self.call, ops, suffix, many, 1, "BNSD")

    def test_length(self, ops, suffix):
        long = z(1, 1, (1 << 20) + 1, 1)
        refuses("1..1M", self.call, ops, suffix, long, 1, "BNSD")

    @pytest.mark.parametrize("mode", [0, 1])
    def test_packed_rows_without_a_key(self, ops, suffix, mode):
        mask = torch.zeros(4, 4, dtype=torch.bool)
        mask[2] = True
        ends = torch.tensor([4]) if suffix == "_v3" else [4]
        refuses(
            "without a key",
            self.call,
            ops,
            suffix,
            z(4, 2, 16),
            2,
            "TND",
            atten_mask=mask.npu(),
            sparse_mode=mode,
            actual_seq_qlen=ends,
            actual_seq_kvlen=ends,
        )

    def test_packed_numbers(self, ops, suffix):
        ends = list(range(1, 2050))
        given = torch.tensor(ends) if suffix == "_v3" else ends
        refuses(
            "more than 2048",
            self.call,
            ops,
            suffix,
            z(2049, 1, 16),
            1,
            "TND",
            actual_seq_qlen=given,
            actual_seq_kvlen=given,
        )

    def test_not_on_the_310p(self, ops, suffix, series):
        series(202)
        refuses("310P", self.call, ops, suffix, z(1, 1, 4, 16), 1, "BNSD")

    def test_on_the_950(self, ops, suffix, series):
        series(260)
        if suffix == "_v3":
            refuses("950", self.call, ops, suffix, z(1, 1, 4, 16), 1, "BNSD")
        else:
            assert self.call(ops, suffix, z(1, 1, 4, 16), 1, "BNSD")[0].shape == (1, 1, 4, 16)


class TestPromptFlashAttention:
    def call(self, ops, q, k=None, **kwargs):
        k = q if k is None else k
        options = {"num_heads": q.shape[1], "num_key_value_heads": k.shape[1], **kwargs}
        return ops.npu_prompt_flash_attention(q, k, k, input_layout="BNSD", **options)

    @pytest.mark.parametrize(("batch", "dim"), [(129, 24), (65537, 16)])
    def test_batch(self, ops, batch, dim):
        refuses("too large", self.call, ops, z(batch, 1, 1, dim))
        assert self.call(ops, z(128, 1, 1, dim)).shape == (128, 1, 1, dim)

    def test_shared_heads(self, ops):
        refuses("1..64 times", self.call, ops, z(1, 65, 2, 16), z(1, 1, 2, 16))
        refuses("1..256", self.call, ops, z(1, 257, 2, 16))

    def test_not_on_the_950(self, ops, series):
        series(260)
        refuses("950", self.call, ops, z(1, 1, 4, 16))

    @pytest.mark.parametrize(
        ("match", "kwargs"),
        [
            ("pse_shift", {"pse_shift": (1, 2, 4, 4)}),
            ("actual_seq_lengths", {"actual_seq_lengths": [4]}),
            ("actual_seq_lengths", {"actual_seq_lengths_kv": [4]}),
            ("sparse_mode", {"sparse_mode": 1}),
            ("sparse_mode", {"sparse_mode": 12}),
            ("next_tokens", {"next_tokens": 5}),
        ],
    )
    def test_what_the_310p_does_not_take(self, ops, series, match, kwargs):
        series(202)
        q = z(1, 2, 4, 16)
        assert self.call(ops, q, next_tokens=INT_MAX).shape == q.shape
        if "pse_shift" in kwargs:
            kwargs = {"pse_shift": z(*kwargs["pse_shift"])}
        refuses(match, self.call, ops, q, **kwargs)

    def test_more_of_the_310p(self, ops, series):
        series(202)
        refuses("float16 only|bfloat16", self.call, ops, z(1, 2, 4, 16, dtype=BF))
        refuses("GQA", self.call, ops, z(1, 2, 4, 16), z(1, 1, 4, 16))
        refuses("128", self.call, ops, z(129, 1, 4, 16))
        refuses("65535", self.call, ops, z(1, 1, 65536, 1), z(1, 1, 1, 1))


class TestFusedInferAttention:
    @pytest.fixture(params=["", "_v2"])
    def call(self, request, ops):
        operator = getattr(ops, f"npu_fused_infer_attention_score{request.param}")
        name = "num_query_heads" if request.param else "num_heads"
        lengths = ("actual_seq_qlen", "actual_seq_kvlen")
        if not request.param:
            lengths = ("actual_seq_lengths", "actual_seq_lengths_kv")

        def made(q, layout="BNSD", heads=None, ends=None):
            kwargs = {name: heads or q.shape[1], "input_layout": layout}
            if ends is not None:
                kwargs.update(zip(lengths, (ends, ends), strict=True))
            return operator(q, q, q, **kwargs)

        return made

    def test_heads_and_dimensions(self, call):
        refuses("1..256", call, z(1, 257, 2, 16))
        refuses("at most 512", call, z(1, 1, 2, 528))

    def test_packed(self, call):
        many = z(4097, 1, 64)
        refuses("more than 4096", call, many, "TND", 1, list(range(1, 4098)))
        refuses("64, 128, 192", call, z(4, 1, 256), "TND", 1, [4])

    @pytest.mark.parametrize("number", [202, 260])
    def test_other_series(self, call, series, number):
        series(number)
        refuses("310P|A2 and A3", call, z(1, 1, 4, 16))


class TestNormsRotaryAndActivations:
    def test_dimensions_of_rms_norm(self, ops):
        refuses("2..8", ops.npu_rms_norm, z(32), z(32))
        refuses("2..8", ops.npu_rms_norm, z(*(1,) * 8, 32), z(32))

    def test_rms_norm_on_the_310p(self, ops, series):
        series(202)
        ops.npu_rms_norm(z(2, 16), z(16))
        refuses("not supported", ops.npu_rms_norm, z(2, 16), z(16, dtype=FULL))
        refuses("bfloat16", ops.npu_rms_norm, z(2, 16, dtype=BF), z(16, dtype=BF))
        refuses("32 bytes", ops.npu_rms_norm, z(2, 15), z(15))

    @pytest.mark.parametrize("mode", ["half", "interleave"])
    def test_rotary_on_the_310p(self, ops, series, mode):
        series(202)
        x, table = z(1, 2, 4, 128), z(1, 1, 4, 128)
        if mode == "half":
            assert ops.npu_rotary_mul(x, table, table, mode).shape == x.shape
            x, table = x.bfloat16(), table.bfloat16()
        refuses("310P", ops.npu_rotary_mul, x, table, table, mode)

    def test_rotary_heads_and_batches(self, ops):
        table = z(1, 1, 1001, 2)
        refuses("below 1000", ops.npu_rotary_mul, z(1, 1000, 1001, 2), table, table)
        refuses("below 1000", ops.npu_rotary_mul, z(1000, 1, 1001, 2), table, table)

    @pytest.mark.parametrize("name", ["npu_gelu", "npu_fast_gelu"])
    def test_activations(self, ops, series, name):
        call = getattr(torch.ops.npu, name)
        refuses("dtype", call, z(4, dtype=torch.float64))
        refuses("dtype", call, z(4, dtype=torch.int32))
        series(202)
        refuses("bfloat16", call, z(4, dtype=BF))

    def test_gelu_forms(self, ops):
        refuses("approximate", torch.ops.npu.npu_gelu, z(4), approximate="erf")

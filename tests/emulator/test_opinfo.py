"""Every operator that torch has samples for gives on the device what it gives on the CPU."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("expecttest", reason="torch's operator database needs expecttest")

from torch.testing._internal.common_methods_invocations import op_db

# Their results are random, or not there (``empty``).
RANDOM = {
    "bernoulli",
    "cauchy",
    "empty",
    "empty_like",
    "empty_permuted",
    "empty_strided",
    "exponential",
    "geometric",
    "log_normal",
    "multinomial",
    "new_empty",
    "new_empty_strided",
    "nn.functional.alpha_dropout",
    "nn.functional.dropout",
    "nn.functional.dropout2d",
    "nn.functional.dropout3d",
    "nn.functional.feature_alpha_dropout",
    "nn.functional.rrelu",
    "normal",
    "pca_lowrank",
    "rand_like",
    "randint",
    "randint_like",
    "randn",
    "randn_like",
    "svd_lowrank",
    "uniform",
}
# Samples that name the CPU, look beyond their tensor, or ask for what a device lacks (sparse).
ELSEWHERE = {"as_strided", "tensor_split", "to", "to_sparse"}
GROUPS = list("abcdefghijklmnopqrstuvwxyz_")


def move(value):
    if isinstance(value, torch.Tensor):
        return value.to("npu")
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(move(item) for item in value)
    if isinstance(value, dict):
        return {key: move(item) for key, item in value.items()}
    return torch.device("npu") if isinstance(value, torch.device) else value


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in flat(item)]
    return []


def has_format(sample):
    given = sample.kwargs.get("memory_format", torch.preserve_format)
    return given in (torch.preserve_format, torch.contiguous_format)


@pytest.mark.parametrize("first", GROUPS)
@pytest.mark.filterwarnings("ignore")
def test_operators(first):
    failures = []
    for op in op_db:
        if op.name[0].lower() != first or op.name in RANDOM | ELSEWHERE:
            continue
        if op.name.startswith(("_refs", "sparse", "torch.ops.aten._flash", "jiterator")):
            continue
        if torch.float32 not in op.supported_dtypes("cpu"):
            continue
        samples = filter(has_format, op.sample_inputs("cpu", torch.float32))
        for sample in itertools.islice(samples, 3):
            there = move(sample.input), move(tuple(sample.args)), move(dict(sample.kwargs))
            if "device" in there[2]:
                there[2]["device"] = "npu"
            expected = flat(op(sample.input, *sample.args, **sample.kwargs))
            try:
                got = flat(op(there[0], *there[1], **there[2]))
                assert len(got) == len(expected)
                for one, other in zip(got, expected, strict=True):
                    assert one.device.type == "npu"
                    bound = 1e-3 if "gelu" in op.name else 1e-5
                    torch.testing.assert_close(
                        one.cpu(), other, equal_nan=True, atol=bound, rtol=1e-4
                    )
            except (AssertionError, RuntimeError) as error:
                failures.append(f"{op.name}: {str(error).splitlines()[0]}")
    assert not failures, "\n".join(failures)

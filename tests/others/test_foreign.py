"""A suite that knows nothing of us passes and fails under ``mindiesd-run`` as it does without."""

from __future__ import annotations

import json
import re

import pytest

pytestmark = pytest.mark.slow

# PyTorch's own operator database: what each function takes, and what it must refuse.
SUITE = """\
import pytest, torch
from torch.testing._internal.common_methods_invocations import op_db

OPS = [op for op in op_db if op.name.startswith("nn.functional.") or op.name in (
    "addcmul", "mul", "add", "softmax", "matmul", "bmm", "split", "chunk", "cat",
    "native_layer_norm",
)]
NAMES = [f"{op.name}-{op.variant_test_name}" for op in OPS]

def pairs(op, result, wide):
    if isinstance(result, torch.Tensor):
        if result.is_floating_point():
            torch.testing.assert_close(result.double(), wide, atol=1e-3, rtol=1e-3)
    elif isinstance(result, (tuple, list)):
        for one, other in zip(result, wide):
            pairs(op, one, other)

@pytest.mark.parametrize("op", OPS, ids=NAMES)
@pytest.mark.parametrize("grad", [False, True])
def test_values(op, grad):
    torch.manual_seed(0)
    for number, sample in enumerate(op.sample_inputs("cpu", torch.float32, requires_grad=grad)):
        if number == 6:
            break
        torch.manual_seed(number)
        result = op(sample.input, *sample.args, **sample.kwargs)
        wide = sample.transform(lambda t: t.detach().double() if torch.is_tensor(t)
                                and t.is_floating_point() else t)
        torch.manual_seed(number)
        pairs(op, result, op(wide.input, *wide.args, **wide.kwargs))
        if grad and isinstance(result, torch.Tensor) and result.requires_grad:
            result.sum().backward()

@pytest.mark.parametrize("op", [op for op in OPS if op.error_inputs_func],
                         ids=[n for n, op in zip(NAMES, OPS) if op.error_inputs_func])
def test_errors(op):
    for error in op.error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            op(sample.input, *sample.args, **sample.kwargs)
"""


def outcomes(text: str) -> dict[str, str]:
    found = re.findall(r"^(PASSED|FAILED|ERROR|SKIPPED|XFAIL) (\S+)", text, re.MULTILINE)
    return {name: outcome for outcome, name in found}


def test_pytorchs_operator_database(runner):
    runner.write("test_operators.py", SUITE)
    runner.write("pytest.ini", "[pytest]\n")
    command = ["-m", "pytest", "-q", "-rA", "--tb=no", "-p", "no:cacheprovider", "-W", "ignore"]
    plain = runner.plain(*command, timeout=590)
    launched = runner.launch("--report=r.json", *command, timeout=590)
    before, after = outcomes(plain.out), outcomes(launched.out)
    assert len(before) > 300, plain.out[-2000:]
    assert after == before
    assert launched.code == plain.code
    summary = json.loads((runner.folder / "r.json").read_text())["summary"]
    assert summary["redirected"] > 5, "or nothing of ours was in the way"
    assert summary["redirected"] + summary["fell_back"] > 30

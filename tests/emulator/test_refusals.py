"""What the emulator does not have says so by name: no wrong number, no obscure failure."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from mindiesd.emulator import ops


def value_for(argument):
    """Anything of the argument's type; None where that is allowed."""
    kind = str(argument.type)
    if kind == "Tensor":
        return torch.ones(2, 4, device="npu")
    if kind.startswith(("List[Tensor", "Tensor[]")):
        return [torch.ones(2, 4, device="npu")]
    if kind.startswith("List["):
        inner = kind[5:].rstrip("]")
        return {"int": [1, 1], "bool": [True], "float": [1.0], "str": ["x"]}.get(inner)
    return {"int": 1, "float": 1.0, "bool": True, "str": "x", "number": 1}.get(kind)


def test_every_operator_that_is_not_emulated_says_so():
    """All of torch_npu's own operators, called through the dispatcher."""
    from mindiesd.emulator import kernels

    said, other = [], {}
    for name in kernels._registered("npu"):
        if name in ops.TABLE or name in ops.KEPT or kernels._schema("npu", name) is None:
            continue
        base, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.npu, base), overload or "default")
        arguments = operator._schema.arguments
        args = [value_for(a) for a in arguments if not a.kwarg_only and not a.has_default_value()]
        kwargs = {
            a.name: value_for(a) for a in arguments if a.kwarg_only and not a.has_default_value()
        }
        try:
            operator(*args, **kwargs)
        except NotImplementedError as error:
            if str(error).startswith("not emulated: npu::"):
                said.append(name)
                continue
            other[name] = repr(error)
        except Exception as error:
            other[name] = repr(error)
        else:
            other[name] = "no error"
    assert len(said) > 100
    assert not other


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda x: torch.nn.LSTM(8, 8).npu()(x), "npu::npu_lstm"),
        (lambda x: torch.nn.GRU(8, 8).npu()(x), "npu::npu_gru"),
        (lambda x: torch.nn.LSTMCell(8, 8).npu()(x[0]), "npu::npu_lstm_cell"),
        (lambda x: x[0].to_sparse(), "sparse"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "quantised"),
        (lambda x: torch.npu.NPUGraph().capture_begin(), "NPU graphs"),
        (lambda x: torch.npu.make_graphed_callables(torch.nn.Linear(8, 8).npu(), (x,)), "NPU gra"),
    ],
    ids=["lstm", "gru", "lstm cell", "sparse", "quantised", "graph", "graphed"],
)
def test_well_known_ones(make, said):
    with pytest.raises(NotImplementedError, match=f"^not emulated: .*{said}") as caught:
        make(torch.randn(3, 2, 8, device="npu"))
    assert "\n" not in str(caught.value)


def test_communication():
    code = (
        "import mindiesd.emulator as e; e.start()\n"
        "import torch.distributed as dist\n"
        "for name in ('hccl', 'lccl', 'cpu:gloo,npu:hccl'):\n"
        "    try: dist.init_process_group(name, rank=0, world_size=1)\n"
        "    except NotImplementedError as error: print(error)\n"
        "dist.init_process_group('gloo', rank=0, world_size=1)\n"
        "import torch; x = torch.ones(2); dist.all_reduce(x); print(x.tolist())\n"
    )
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    *refused, last = done.stdout.splitlines()
    assert [line.split(",")[0] for line in refused] == [
        "not emulated: HCCL",
        "not emulated: LCCL",
        "not emulated: HCCL",
    ], done.stderr
    assert last == "[1.0, 1.0]"


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(2, device="npu:1"),
        lambda: torch.randn(2, device=torch.device("npu", 1)),
        lambda: torch.ones(2, device="npu").to("npu:1"),
        lambda: torch.ones(2).to("npu:1"),
        lambda: torch.ones_like(torch.ones(2), device="npu:3"),
        lambda: torch.empty(2, device="npu:1"),
        lambda: torch.npu.set_device(1),
    ],
)
def test_there_is_one_device(make):
    with pytest.raises(RuntimeError):
        make()
    assert torch.ones(2, device="npu").device.index == 0
    assert torch.npu.current_device() == 0

"""What is made from a mask is made once, notices writes, and keeps nothing alive."""

import gc
import threading
import weakref

import pytest
import torch

from mindiesd.emulator import trace
from mindiesd.ops import attention
from mindiesd.ops.backends.npu import derived, forms
from mindiesd.ops.backends.npu.derived import Derived
from mindiesd.ops.masks import Band
from tests.npu.cases import Case, tensor

MADE = {"aten::bitwise_not", "aten::masked_fill_.Scalar", "aten::clone", "aten::where.self"}


def qkv(length=9, memory="BSND", dtype=torch.float16):
    return [tensor((2, 4, length, 16), dtype, memory) for _ in range(3)]


@pytest.mark.parametrize("shape", [(9, 9), (1, 1, 9, 9), (2, 1, 1, 9), (2, 4, 9, 9), (4, 1, 9)])
def test_a_bool_mask_is_inverted_once(shape):
    mask = torch.rand(shape, device="npu") > 0.3
    with trace() as counted:
        for _ in range(10):
            query, key, value = qkv()
            with torch.no_grad():
                attention.attend(query, key, value, mask)
    assert counted.launches["aten::bitwise_not"] == 1
    assert counted.launches["npu::npu_fusion_attention"] == 10
    assert not counted.layout_copies


def test_also_through_the_views_that_layers_make_anew():
    mask = torch.rand(2, 9, device="npu") > 0.3
    with trace() as counted:
        for _ in range(5):
            attention.attend(*qkv(), mask[:, None, None, :])
    assert counted.launches["aten::bitwise_not"] == 1


def test_two_views_of_one_tensor_are_two_masks():
    both = torch.rand(2, 9, 9, device="npu") > 0.3
    for at in (0, 1, 0):
        case = Case(*qkv(), both[at])
        case.check(case.attend())
    case = Case(*qkv(), both[1].t())
    case.check(case.attend())


def test_other_memory_is_noticed():
    mask = torch.rand(9, 9, device="npu") > 0.3
    view = mask[None]
    for change in (
        lambda: None,
        lambda: setattr(mask, "data", torch.rand(9, 9, device="npu") > 0.5),
        lambda: mask.set_(torch.rand(9, 9, device="npu") > 0.7),
    ):
        change()
        for seen in (mask, view, mask[None], mask[:, None].transpose(0, 1)):
            case = Case(*qkv(), seen)
            case.check(case.attend())


def test_a_write_is_noticed_also_through_a_view():
    mask = torch.rand(9, 9, device="npu") > 0.3
    view = mask[None]
    for change in (lambda: None, lambda: mask.logical_not_(), lambda: view.fill_(True)):
        change()
        case = Case(*qkv(), mask)
        case.check(case.attend())
        case = Case(*qkv(), view[None])
        case.check(case.attend())


def test_an_additive_mask_is_split_once():
    bias = torch.randn(2, 1, 1, 9, device="npu", dtype=torch.float16)
    bias[0, ..., 4:] = -torch.inf
    with trace() as counted:
        for _ in range(6):
            attention.attend(*qkv(), bias)
    once = {name: n for name, n in counted.launches.items() if not name.startswith("npu::")}
    assert sum(once.values()) <= 10, once
    with trace() as counted:
        attention.attend(*qkv(), bias)
    # Making the three inputs is counted as copies from the host.
    assert counted.launches["npu::npu_fusion_attention_v2"] == 1
    assert set(counted.launches) <= {"npu::npu_fusion_attention_v2", "aten::copy_"}


def test_the_triangle_is_made_once():
    with trace() as counted:
        for length in (5, 9, 17):
            for dtype in (torch.float16, torch.float32):
                attention.attend(*qkv(length, dtype=dtype), is_causal=True)
    assert counted.launches["aten::triu"] == 1
    triangle = forms.compressed(torch.device("npu", 0), False)
    assert triangle.shape == (2048, 2048) and not triangle[0, 0] and triangle[0, 1]


@pytest.mark.parametrize("memory", ["BNSD", "BSND"])
@pytest.mark.parametrize("causal", [False, True])
def test_one_launch_and_no_copy(memory, causal):
    query, key, value = qkv(memory=memory)
    attention.attend(query, key, value, is_causal=causal)
    with trace() as counted:
        attention.attend(query, key, value, is_causal=causal)
        out = attention.attend(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            None,
            None,
            causal,
            head_first=False,
        )
    assert counted.launches == {"npu::npu_fusion_attention": 2}
    assert not counted.layout_copies and not counted.transfers
    assert out.shape == (2, 9, 4, 16)


def test_the_layout_of_least_copying():
    query = tensor((2, 4, 9, 16), torch.float16, "BSND")
    key, value = (tensor((2, 4, 9, 16), torch.float16, "BNSD") for _ in range(2))
    with trace() as counted:
        attention.attend(query, key, value)
    assert dict(counted.layout_copies) == {"npu::npu_fusion_attention(query)": 1}


def test_the_mask_dies_when_its_owner_lets_go():
    mask = torch.rand(9, 9, device="npu") > 0.3
    attention.attend(*qkv(), mask)
    assert len(derived.TABLE) == 1
    gone = weakref.ref(mask)
    del mask
    gc.collect()
    assert gone() is None
    assert len(derived.TABLE) == 0


def test_the_table_is_bounded():
    table = Derived()
    kept = [torch.zeros(3) for _ in range(40)]
    for source in kept:
        for key in range(20):
            table.get(source, key, source.clone)
    assert len(table) == derived.SOURCES
    assert all(len(entry.forms) == derived.FORMS for entry in table._entries.values())


def test_large_derivatives_are_not_kept(monkeypatch):
    monkeypatch.setattr(derived, "LARGEST", 100)
    table, source, made = Derived(), torch.zeros(100), []
    for _ in range(2):
        table.get(source, "copy", lambda: made.append(1) or source.clone())
    assert len(made) == 2


def test_inference_tensors_and_subclasses_are_not_kept():
    class Own(torch.Tensor):
        pass

    table = Derived()
    with torch.inference_mode():
        made = torch.zeros(3)
    table.get(made, "copy", made.clone)
    own = torch.zeros(3).as_subclass(Own)
    table.get(own, "copy", own.clone)
    assert len(table) == 0


def test_threads_make_a_derivative_once():
    table, source, made = Derived(), torch.zeros(3), []
    barrier = threading.Barrier(8)

    def build():
        made.append(1)
        return source.clone()

    def work():
        barrier.wait()
        for _ in range(50):
            table.get(source, "copy", build)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_another_stream_makes_its_own(monkeypatch):
    table, source, made = Derived(), torch.zeros(3), []
    for stream in (1, 2, 1, 2):
        monkeypatch.setattr(derived, "current_stream", lambda _, stream=stream: stream)
        table.get(source, "copy", lambda: made.append(1) or source.clone())
    assert len(made) == 2


def test_the_masks_of_windows_are_bounded_and_do_not_push_out_the_triangle():
    attention.attend(*qkv(), is_causal=True)
    kept = forms.compressed(torch.device("npu", 0), False)
    for at in range(1, 20):
        # The side after the diagonal is negative, which only a full mask says.
        case = Case(*qkv(40), band=Band(-at - 2, -at))
        case.check(case.attend())
    assert len(derived._constants) == 1 + derived.CONSTANTS
    assert forms.compressed(torch.device("npu", 0), False) is kept

"""Which kernel a call names."""

import pytest

from mindiesd import ParametersInvalid
from mindiesd.ops import dispatch


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    monkeypatch.delenv(dispatch.OPERATOR_VARIABLE, raising=False)


@pytest.mark.parametrize("mode", ["runtime", "static"])
def test_the_backend_chooses(mode):
    assert dispatch.requested(mode, "prompt_flash_attn", "BSH") is None


@pytest.mark.parametrize("operator", dispatch.OPERATORS)
@pytest.mark.parametrize("layout", dispatch.LAYOUTS)
def test_manual_names_the_kernel(operator, layout):
    assert dispatch.requested("manual", operator, layout) == (operator, layout)


def test_manual_defaults():
    assert dispatch.requested("manual") == ("fused_attn_score", "BNSD")


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"opt_mode": "fast"}, "opt_mode"),
        ({"opt_mode": None}, "opt_mode"),
        ({"opt_mode": ["manual"]}, "opt_mode"),
        ({"op_type": "flash"}, "op_type"),
        ({"op_type": []}, "op_type"),
        ({"opt_mode": "manual", "op_type": None}, "op_type"),
        ({"layout": "SBND"}, "layout"),
        ({"opt_mode": "static", "layout": {}}, "layout"),
    ],
)
def test_wrong_values(arguments, argument):
    with pytest.raises(ParametersInvalid) as caught:
        dispatch.requested(**arguments)
    assert caught.value.argument == argument


def test_the_environment_overrides_in_manual_mode_only(monkeypatch):
    monkeypatch.setenv("MINDIE_SD_FA_TYPE", "ascend_laser_attention")
    assert dispatch.requested("manual", "prompt_flash_attn").operator == "ascend_laser_attention"
    assert dispatch.requested("runtime") is None
    monkeypatch.setenv("MINDIE_SD_FA_TYPE", "nonsense")
    assert dispatch.requested("static") is None
    with pytest.raises(ParametersInvalid, match=r"MINDIE_SD_FA_TYPE.*nonsense"):
        dispatch.requested("manual")


def test_a_replaced_environment_is_read(monkeypatch):
    monkeypatch.setattr("os.environ", {"MINDIE_SD_FA_TYPE": "prompt_flash_attn"})
    assert dispatch.requested("manual").operator == "prompt_flash_attn"

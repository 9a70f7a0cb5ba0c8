"""The rotary functions that diffusers' models own: each convention once, then who follows it."""

from __future__ import annotations

from mindiesd.patches.registry import Patch
from mindiesd.patches.rope.family import Family

QWEN = Family(
    call="complex_or_real", form=lambda forms: forms.complex_numbers(1), interleaved=True
)
FLAT = Family(call="one", form=lambda forms: forms.full(), interleaved=True, dims=3, sources=2)
SPLIT = Family(
    call="one",
    form=lambda forms: forms.split_heads,
    interleaved=False,
    dims=3,
    sources=2,
    view="folded",
)
ANYFLOW = Family(
    call="one", form=lambda forms: forms.complex_numbers(None, double=True), interleaved=True
)
SANA_WM = Family(
    call="one",
    form=lambda forms: forms.complex_numbers(None),
    interleaved=True,
    view="transposed",
)
HIDREAM = Family(
    call="both", form=lambda forms: forms.matrices(casts=False), interleaved=True, dims=0
)
PRX = Family(
    call="one",
    form=lambda forms: forms.matrices(casts=True, moves=True),
    interleaved=True,
    dims=0,
)
KANDINSKY6 = Family(
    call="one", form=lambda forms: forms.matrices(casts=True), interleaved=True, dims=0
)
HELIOS = Family(call="one", form=lambda forms: forms.joined, interleaved=True)
JOYIMAGE = Family(
    call="both", form=lambda forms: forms.full(0, 2, moves=True), interleaved=True, sources=2
)
JOYIMAGE_BATCHED = Family(
    call="both", form=lambda forms: forms.full(2, moves=True), interleaved=True, sources=2
)
LONGCAT_AUDIO = Family(
    call="one", form=lambda forms: forms.full(0, 2, moves=True), interleaved=False, sources=2
)
MINIMAX_H3 = Family(
    call="three",
    form=lambda forms: forms.full(0, 2, casts=True),
    interleaved=False,
    partial=True,
    sources=2,
)
MINIMAX_MUSIC3 = Family(
    call="one",
    form=lambda forms: forms.full(1, casts=True),
    interleaved=False,
    partial=True,
    sources=2,
)
STABLE_AUDIO3 = Family(
    call="one", form=lambda forms: forms.angles, interleaved=False, partial=True
)
ANIMA = Family(
    call="unsqueezed",
    form=lambda forms: forms.full(None, model_dtype=True),
    interleaved=False,
    bounded=True,
    sources=2,
)
ALLEGRO = Family(
    call="with_positions",
    form=lambda forms: forms.three_axes,
    interleaved=False,
    view="folded",
    sources=9,
)

_ONCE = "float32 inside and one rounding, as the original"
_NO_CAST = "float32 inside and one rounding, where the original rounds every step"
_COMPLEX = "one npu_rotary_mul kernel instead of a cast, a complex product and a cast"
_STEPS = "one npu_rotary_mul kernel instead of rearranging, casts, two products and a sum"
_TRANSFORMERS = "diffusers.models.transformers"


def _record(
    name: str,
    family: str,
    place: str,
    parameters: str,
    tables: str,
    why: str = _STEPS,
    numerics: str = _ONCE,
    package: str = _TRANSFORMERS,
) -> Patch:
    """One record; ``place`` is ``module:function`` below ``package``."""
    module, _, attribute = place.partition(":")
    return Patch(
        name=name,
        family="rope",
        module=f"{package}.{module}",
        attribute=attribute,
        after=f"{package}.{module}",
        becomes="mindiesd.rotary_position_embedding",
        build=f"mindiesd.patches.rope.models:{family}",
        why=why,
        when=f"{tables}; no gradients",
        numerics=numerics,
        requires={"diffusers": ">=0.35,<0.44"},
        parameters=tuple(parameters.split()),
    )


_QWEN = "x freqs_cis use_real use_real_unbind_dim"
_PER_TOKEN = "complex table [S, D/2]"
_PER_CHANNEL = "cos and sin [B, S, N*D] for x of that shape"
_PER_HEAD = "cos and sin [B, N, S, D/2] for x [B, S, N*D]"
_BROADCAST = "complex table that broadcasts to x, which is half precision where there is float64"
_DOUBLE = "float32 inside and one rounding, where the original computes half precision in float64"
_MATRIX = "one 2 x 2 matrix a pair of channels, broadcast over heads"
_TOKENS = "cos and sin [S, D] and x [B, S, N, D]"
_LEADING = "cos and sin [S, R] for the first R channels of x [B, S, N, D]"
_ANGLES = "angles [S, R] for the first R channels of x [B, S, N, D]"
_IN_MODEL = "float32 inside and one rounding of the same cast tables; the original rounds each step"

RECORDS = (
    _record(
        "qwenimage_rope",
        "QWEN",
        "transformer_qwenimage:apply_rotary_emb_qwen",
        _QWEN,
        _PER_TOKEN,
        _COMPLEX,
    ),
    _record(
        "qwenimage21_rope",
        "QWEN",
        "transformer_qwenimage21:apply_rotary_emb_qwen",
        _QWEN,
        _PER_TOKEN,
        _COMPLEX,
    ),
    _record(
        "nucleusmoe_rope",
        "QWEN",
        "transformer_nucleusmoe_image:_apply_rotary_emb_nucleus",
        _QWEN,
        _PER_TOKEN,
        _COMPLEX,
    ),
    _record("ltx_rope", "FLAT", "transformer_ltx:apply_rotary_emb", "x freqs", _PER_CHANNEL),
    _record(
        "ltx2_interleaved_rope",
        "FLAT",
        "transformer_ltx2:apply_interleaved_rotary_emb",
        "x freqs",
        _PER_CHANNEL,
    ),
    _record(
        "ltx2_split_rope",
        "SPLIT",
        "transformer_ltx2:apply_split_rotary_emb",
        "x freqs",
        _PER_HEAD,
    ),
    _record(
        "sana_wm_refiner_interleaved_rope",
        "FLAT",
        "transformer_sana_wm_refiner:apply_interleaved_rotary_emb",
        "x freqs",
        _PER_CHANNEL,
    ),
    _record(
        "sana_wm_refiner_split_rope",
        "SPLIT",
        "transformer_sana_wm_refiner:apply_split_rotary_emb",
        "x freqs",
        _PER_HEAD,
    ),
    _record(
        "anyflow_rope",
        "ANYFLOW",
        "transformer_anyflow:apply_rotary_emb",
        "hidden_states freqs",
        _BROADCAST,
        _COMPLEX,
        _DOUBLE,
    ),
    _record(
        "anyflow_far_rope",
        "ANYFLOW",
        "transformer_anyflow_far:apply_rotary_emb",
        "hidden_states freqs",
        _BROADCAST,
        _COMPLEX,
        _DOUBLE,
    ),
    _record(
        "sana_wm_rope",
        "SANA_WM",
        "transformer_sana_wm:_apply_rotary_emb",
        "hidden_states freqs",
        "complex table [1, 1, S, D/2] for x [B, N, D, S]",
        _COMPLEX,
    ),
    _record(
        "hidream_rope",
        "HIDREAM",
        "transformer_hidream_image:apply_rope",
        "xq xk freqs_cis",
        _MATRIX,
    ),
    _record("prx_rope", "PRX", "transformer_prx:apply_rope", "xq freqs_cis", _MATRIX),
    _record(
        "kandinsky6_rope", "KANDINSKY6", "transformer_kandinsky6:apply_rotary", "x rope", _MATRIX
    ),
    _record(
        "kandinsky6_sr_rope",
        "KANDINSKY6",
        "transformer_kandinsky6_sr:apply_rotary",
        "x rope",
        _MATRIX,
    ),
    _record(
        "helios_rope",
        "HELIOS",
        "transformer_helios:apply_rotary_emb_transposed",
        "hidden_states freqs_cis",
        "one table [B, S, 2 D], cosines and sines side by side",
        numerics=_NO_CAST,
    ),
    _record(
        "joyimage_rope",
        "JOYIMAGE",
        "transformer_joyimage:_apply_rotary_emb",
        "xq xk freqs_cis",
        _TOKENS,
    ),
    _record(
        "joyimage_edit_rope",
        "JOYIMAGE_BATCHED",
        "transformer_joyimage_edit_plus:_apply_rotary_emb_batched",
        "xq xk freqs_cis",
        "cos and sin [B, S, D] and x [B, S, N, D]",
    ),
    _record(
        "longcat_audio_rope",
        "LONGCAT_AUDIO",
        "transformer_longcat_audio_dit:_apply_rotary_emb",
        "hidden_states rope",
        _TOKENS,
    ),
    _record(
        "minimax_h3_rope",
        "MINIMAX_H3",
        "transformer_minimax_h3:_apply_rotary_emb",
        "hidden_states cos sin",
        _LEADING,
        numerics=_IN_MODEL,
    ),
    _record(
        "minimax_music3_rope",
        "MINIMAX_MUSIC3",
        "transformer_minimax_music3:_apply_partial_rotary_emb",
        "hidden_states rotary_emb",
        _LEADING,
        numerics=_IN_MODEL,
    ),
    _record(
        "stable_audio3_rope",
        "STABLE_AUDIO3",
        "transformer_stable_audio3:_apply_rotary_partial",
        "t freqs",
        _ANGLES,
    ),
    _record(
        "autoencoder_same_rope",
        "STABLE_AUDIO3",
        "autoencoder_same:_apply_rotary_partial",
        "t freqs",
        _ANGLES,
        package="diffusers.models.autoencoders",
    ),
    _record(
        "anima_rope",
        "ANIMA",
        "condition_embedder_anima:_apply_rotary_pos_emb",
        "hidden_states cos sin unsqueeze_dim",
        "cos and sin [B, S, D] no wider than x, within [-1, 1] on the NPU",
        numerics=_NO_CAST,
        package="diffusers.models.condition_embedders",
    ),
    _record(
        "allegro_rope",
        "ALLEGRO",
        "embeddings:apply_rotary_emb_allegro",
        "x freqs_cis positions",
        "x [B, N, S, D], a pair of tables and positions [B, S] for each third of the channels",
        "one npu_rotary_mul kernel for three lookups and rotations and their concatenation",
        package="diffusers.models",
    ),
)

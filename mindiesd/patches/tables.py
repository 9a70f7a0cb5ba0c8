"""Tables that models make anew at every step, of inputs that stay the same.

* The sinusoidal embedding of a timestep: its frequencies depend on numbers only.
* Rotary tables: of position ids, which a sampler passes unchanged at every step; or of nothing but
  the shape of the latents. They are remembered, see :mod:`mindiesd.patches.memory`.

Sources are told by fingerprints: a function that is not the known one is left alone. What is
remembered is what the original returned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mindiesd.patches import law
from mindiesd.patches.rewriting.records import builder, records
from mindiesd.patches.rewriting.rules import Expression, Kind, Rewrite, Whole
from mindiesd.patches.scope import Site

_HERE = "mindiesd.patches.tables"
Kinds = dict[Kind, int]

INFERENCE = "inference tensors, whose changes are not counted"
STATE = "module with parameters, or settings that are not numbers"

TIMESTEPS = Whole(
    name="get_timestep_embedding",
    prints=("8695b305921fbfbb",),
    build=f"{_HERE}:build_timestep_embedding",
)
OF_IDS = Whole(
    name="tables of ids",
    # Over the axes of ids; over those of the configuration. The others are of diffusers up to 0.38,
    # which chose the dtype of the angles in place: alike, and without a word of the NPU.
    prints=(
        *("f7c94e4500a6911d", "0208b0ec98cf9d9e"),
        *("f3adb9f2dfeb99eb", "9a03c377531bb378", "f1c03f31e85dbb6a"),
    ),
    build=f"{_HERE}:build_of_values",
)
OF_SHAPE = Whole(
    name="tables of a shape",
    # HunyuanVideo, HunyuanVideo 1.5, HunyuanImage, Motif; of a shape and numbers: Cosmos, LTX.
    prints=(
        *("2dd95f6ba2b4bf52", "7e284e7f52d42f56", "cedfc270de18dd2a", "72880364fd3d09a2"),
        *("f2e25fde12e670c5", "76b7cc935c30cb67"),
    ),
    build=f"{_HERE}:build_of_shape",
)
JOINED_IDS = Expression(
    name="joined_ids",
    spellings=("torch.cat((A, B), dim=0)",),
    holes=("A", "B"),
    build=f"{_HERE}:build_joined",
)

_STEPS = "torch.arange(0, DIM, 2, dtype=DTYPE, device=DEVICE)"
FREQUENCIES = Expression(
    name="frequencies",
    spellings=(
        f"1.0 / (THETA ** ({_STEPS} / DIM)) / FACTOR",
        f"1.0 / (THETA ** ({_STEPS}[: (DIM // 2)] / DIM)) / FACTOR",
    ),
    holes=("THETA", "DIM", "DTYPE", "DEVICE", "FACTOR"),
    build=f"{_HERE}:build_of_numbers",
)
OMEGA = Expression(
    name="omega",
    spellings=(f"1.0 / THETA ** ({_STEPS} / DIM)",),
    holes=("THETA", "DIM", "DTYPE", "DEVICE"),
    joins=(f"{_STEPS} / DIM",),
    build=f"{_HERE}:build_of_numbers",
)
EXPONENTIALS = Expression(
    name="exponentials",
    spellings=(
        "torch.exp(-math.log(PERIOD) * "
        "torch.arange(start=0, end=HALF, dtype=torch.float32, device=DEVICE) / HALF)",
        "torch.exp(torch.arange(HALF, dtype=torch.float32, device=DEVICE) * "
        "(-math.log(PERIOD) / (HALF - 1)))",
    ),
    holes=("PERIOD", "HALF", "DEVICE"),
    build=f"{_HERE}:build_of_numbers",
)
PAIRED_COS, PAIRED_SIN = (
    Expression(
        name=f"paired_{name}",
        spellings=(
            f"X.{name}().repeat_interleave(2, dim=1, output_size=X.shape[1] * 2)",
            f"X.{name}().repeat_interleave(2, dim=1)",
        ),
        holes=("X",),
        build=f"{_HERE}:build_paired_{name}",
    )
    for name in ("cos", "sin")
)
POSITIONS = Whole(
    name="embedding of positions",
    prints=("6456029423dabdb1",),
    build=f"{_HERE}:build_of_numbers",
)
_ROTARY: Kinds = {FREQUENCIES: 1, PAIRED_COS: 1, PAIRED_SIN: 1}

_TABLE: tuple[tuple[str, str, Whole | Expression | Kinds], ...] = (
    ("embeddings", "get_timestep_embedding", TIMESTEPS),
    ("embeddings", "get_1d_rotary_pos_embed", _ROTARY),
    ("embeddings", "get_3d_sincos_pos_embed", POSITIONS),
    ("transformers.transformer_bria", "get_1d_rotary_pos_embed", _ROTARY),
    ("transformers.transformer_ernie_image", "rope", OMEGA),
    ("transformers.transformer_hidream_image", "rope", OMEGA),
    ("transformers.transformer_prx", "PRXEmbedND.rope", OMEGA),
    ("transformers.transformer_rfd4_proteina", "get_rfd4_time_embedding", EXPONENTIALS),
    ("transformers.transformer_cosmos", "CosmosRotaryPosEmbed.forward", OF_SHAPE),
    ("transformers.transformer_ltx", "LTXVideoRotaryPosEmbed.forward", OF_SHAPE),
    ("transformers.transformer_flux", "FluxPosEmbed.forward", OF_IDS),
    ("transformers.transformer_flux2", "Flux2PosEmbed.forward", OF_IDS),
    ("transformers.transformer_flux3", "Flux3PosEmbed.forward", OF_IDS),
    ("transformers.transformer_longcat_image", "LongCatImagePosEmbed.forward", OF_IDS),
    ("transformers.transformer_ovis_image", "OvisImagePosEmbed.forward", OF_IDS),
    ("transformers.transformer_bria", "BriaEmbedND.forward", OF_IDS),
    ("transformers.transformer_bria", "BriaPosEmbed.forward", OF_IDS),
    ("transformers.transformer_bria_fibo", "BriaFiboEmbedND.forward", OF_IDS),
    ("transformers.transformer_krea2", "Krea2RotaryPosEmbed.forward", OF_IDS),
    ("transformers.transformer_hunyuan_video", "HunyuanVideoRotaryPosEmbed.forward", OF_SHAPE),
    ("transformers.transformer_hunyuan_video15", "HunyuanVideo15RotaryPosEmbed.forward", OF_SHAPE),
    ("transformers.transformer_hunyuanimage", "HunyuanImageRotaryPosEmbed.forward", OF_SHAPE),
    ("transformers.transformer_motif_video", "MotifVideoRotaryPosEmbed.forward", OF_SHAPE),
    ("transformers.transformer_flux", "FluxTransformer2DModel.forward", JOINED_IDS),
    ("transformers.transformer_chroma", "ChromaTransformer2DModel.forward", JOINED_IDS),
    (
        "transformers.transformer_longcat_image",
        "LongCatImageTransformer2DModel.forward",
        JOINED_IDS,
    ),
    ("transformers.transformer_ovis_image", "OvisImageTransformer2DModel.forward", JOINED_IDS),
    ("transformers.transformer_bria", "BriaTransformer2DModel.forward", JOINED_IDS),
    ("transformers.transformer_bria_fibo", "BriaFiboTransformer2DModel.forward", JOINED_IDS),
)

RECORDS, _BY_NAME = records(
    (
        Rewrite(
            module=f"diffusers.models.{module}",
            qualname=qualname,
            counts=kind if isinstance(kind, dict) else {kind: 1},
        )
        for module, qualname, kind in _TABLE
    ),
    family="tables",
    becomes="mindiesd.patches.memory.MEMORY.recall",
    why="tables that do not change from step to step are made once instead of a dozen kernels each",
    when="inputs that live on and were not written to, outside of inference mode; no gradients",
    numerics="bitwise equal",
)
build = builder(_BY_NAME)


def after_uninstall(replacement: object) -> None:
    """Forget, now that nothing asks any more."""
    from mindiesd.patches.memory import MEMORY

    MEMORY.clear()


def build_timestep_embedding(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of diffusers' ``get_timestep_embedding``."""
    import math

    import torch
    from torch import Tensor

    from mindiesd.patches.memory import MEMORY

    refusal = _refusal()
    numbers = (int, float)

    def get_timestep_embedding(
        timesteps: Any,
        embedding_dim: Any,
        flip_sin_to_cos: Any = False,
        downscale_freq_shift: Any = 1,
        scale: Any = 1,
        max_period: Any = 10000,
    ) -> Any:
        reason = refusal(timesteps, kept=False)
        if reason is None and not (
            timesteps.dim() == 1
            and type(embedding_dim) is int
            and embedding_dim >= 2
            and embedding_dim % 2 == 0
            and type(downscale_freq_shift) in numbers
            and type(scale) in numbers
            and type(max_period) in numbers
        ):
            reason = law.UNUSUAL_ARGUMENT
        if not site.takes(reason):
            return original(
                timesteps, embedding_dim, flip_sin_to_cos, downscale_freq_shift, scale, max_period
            )
        half = embedding_dim // 2
        device = timesteps.device

        def make() -> Tensor:
            steps = torch.arange(start=0, end=half, dtype=torch.float32, device=device)
            return torch.exp(-math.log(max_period) * steps / (half - downscale_freq_shift))

        frequencies = MEMORY.recall(
            ("timesteps", half, max_period, downscale_freq_shift), (), device, make
        )
        angles = timesteps[:, None].float() * frequencies[None, :]
        if scale != 1:
            angles = scale * angles
        sin, cos = torch.sin(angles), torch.cos(angles)
        return torch.cat([cos, sin] if flip_sin_to_cos else [sin, cos], dim=-1)

    return get_timestep_embedding


def build_of_values(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of a module's forward that makes tables of one tensor."""
    import torch

    from mindiesd.patches.memory import MEMORY

    refusal = _refusal()
    dynamo = torch.compiler.is_dynamo_compiling

    def remembered(*given: Any, **named: Any) -> Any:
        usual = len(given) == 2 and not named
        reason = refusal(given[1]) if usual else law.UNUSUAL_ARGUMENT
        if dynamo():
            site.takes(reason)
            return original(*given, **named)  # into the graph
        facts = _facts(given[0]) if reason is None else None
        if site.takes(STATE if reason is None and facts is None else reason):
            return MEMORY.recall(
                (original, facts), given[1:], given[1].device, lambda: original(*given)
            )
        return original(*given, **named)

    return remembered


def build_of_shape(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of a module's forward that looks at one tensor's shape and device only.

    Besides, it may look at numbers.
    """
    import torch

    from mindiesd.patches.memory import MEMORY

    refusal = _refusal()
    dynamo = torch.compiler.is_dynamo_compiling

    def remembered(*given: Any, **named: Any) -> Any:
        x: Any = given[1] if len(given) >= 2 else named.get("hidden_states")
        more = (*given[2:], *(part for pair in sorted(named.items()) for part in pair))
        more = tuple(part for part in more if part is not x)
        usual = bool(given) and all(map(_constant, more))
        reason = refusal(x, kept=False) if usual else law.UNUSUAL_ARGUMENT
        if dynamo():
            site.takes(reason)
            return original(*given, **named)  # into the graph
        facts = _facts(given[0]) if reason is None else None
        if site.takes(STATE if reason is None and facts is None else reason):
            # As text: 1 and 1.0 are equal, and not the same.
            key = (original, facts, tuple(x.shape), len(given), repr(more))
            return MEMORY.recall(key, (), x.device, lambda: original(*given, **named))
        return original(*given, **named)

    return remembered


def _constant(value: Any) -> bool:
    """Whether an argument says itself what it is: a number, a text, or several."""
    if type(value) is tuple:
        return all(map(_constant, value))
    return value is None or type(value) in (int, float, bool, str)


def build_of_numbers(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of what is made of numbers, a dtype and a device."""
    import torch

    from mindiesd.patches.memory import MEMORY

    _, jit_tracing, autocast = law.context()
    dynamo = torch.compiler.is_dynamo_compiling

    def of_numbers(*given: Any, **named: Any) -> Any:
        reason, device = None, None
        key: list[Any] = [original]
        for name, value in (*enumerate(given), *sorted(named.items())):
            if type(value) is torch.device:
                device = value
            elif type(value) is not torch.dtype and not _constant(value):
                reason = law.UNUSUAL_ARGUMENT
            # 1 and 1.0 are equal, and not the same.
            key.append((name, type(value), value))
        if jit_tracing() is not None:
            reason = law.JIT_TRACE
        elif device is None:
            reason = law.UNUSUAL_ARGUMENT
        elif autocast():
            reason = law.AUTOCAST
        if not site.takes(reason) or device is None or dynamo():
            return original(*given, **named)
        return MEMORY.recall(tuple(key), (), device, lambda: original(*given, **named))

    return of_numbers


def build_paired_cos(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``x.cos().repeat_interleave(2, dim=1)``."""
    return _build_paired(original, site, cosine=True)


def build_paired_sin(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``x.sin().repeat_interleave(2, dim=1)``."""
    return _build_paired(original, site, cosine=False)


def _build_paired(original: Any, site: Site, cosine: bool) -> Callable[..., Any]:
    """Angles are repeated before their cosines and sines are taken, once for both."""
    import torch

    from mindiesd.patches.memory import PAIRS

    refusal = _refusal()
    dynamo = torch.compiler.is_dynamo_compiling

    def paired(x: Any) -> Any:
        if site.takes(refusal(x)) and not dynamo():
            angles = PAIRS(x)
            return angles.cos() if cosine else angles.sin()
        return original(x)

    return paired


def build_joined(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``torch.cat((a, b), dim=0)``."""
    from mindiesd.patches.memory import MEMORY

    refusal = _refusal()

    def joined(a: Any, b: Any) -> Any:
        if site.takes(refusal(a) or refusal(b)):
            return MEMORY.recall("joined ids", (a, b), a.device, lambda: original(a, b))
        return original(a, b)

    return joined


def _refusal() -> Callable[..., str | None]:
    """Why what is made of a tensor is not remembered; None if it is.

    The function it returns is told whether it is kept by the tensor itself, not just its shape.
    """
    import torch
    from torch import Tensor
    from torch.overrides import has_torch_function_variadic

    grad_enabled, jit_tracing, autocast = law.context()
    dynamo = torch.compiler.is_dynamo_compiling

    def refusal(x: Any, kept: bool = True) -> str | None:
        if jit_tracing() is not None:
            return law.JIT_TRACE
        if not isinstance(x, Tensor) or has_torch_function_variadic(x):
            return law.UNUSUAL_ARGUMENT
        if autocast():
            return law.AUTOCAST
        if grad_enabled() and x.requires_grad:
            return law.GRADIENTS
        if kept and not dynamo() and x.is_inference():
            return INFERENCE
        return None

    return refusal


def _facts(module: Any) -> tuple[Any, ...] | None:
    """The settings of a module without parameters; None if there is more to it."""
    if module._parameters or module._buffers or module._modules:
        return None
    found: list[Any] = [type(module)]
    for name, value in module.__dict__.items():
        if name.startswith("_") or name in ("training", "forward"):
            continue
        kept = tuple(value) if type(value) in (list, tuple) else (value,)
        if any(type(number) not in (int, float, bool, str) for number in kept):
            return None
        found.append((name, *kept))
    return tuple(found)

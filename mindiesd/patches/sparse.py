"""Video transformers' self-attention → ``sparse_attention``, where ``sparse=`` asks for it.

Nothing here is installed without that option. With it, the ``forward`` of a known video transformer
notes, for as long as it runs, what its self-attention is: so many video tokens of such a latent
shape, and so much text before or behind them. The redirect of SDPA asks :func:`attend`, which takes
a call when its sequence is exactly that one, and leaves it dense in every other case: cross
attention, text encoders, masks, sequences of another length, layers and steps to be kept dense.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from mindiesd.patches import law
from mindiesd.patches.registry import NOT_COMPARED, Patch
from mindiesd.patches.scope import LOCAL, Site
from mindiesd.patches.sparse_options import SparseOptions

if TYPE_CHECKING:
    from torch import Tensor

OTHER_ATTENTION = "not the self-attention of the video"
NO_LATENT = "the latent shape is not known"
AMBIGUOUS = "as many text tokens as video tokens"
SHORT = "shorter than min_sequence"
MASK = "a mask that is not the same padding for the whole batch"
CAUSAL = "causal"
LAYER = "a layer to be kept dense"
STEP = "a step to be kept dense"

_NUMERICS = (
    "an approximation, asked for with sparse=: exact attention over a part of the key blocks"
)
_WHEN = (
    "with patch_all(sparse=…): the self-attention of the video tokens (and the text in that "
    "sequence) from min_sequence tokens on, without a mask other than padded text, outside of the "
    "steps and layers to be kept dense; not inside of torch.compile"
)


class Plan:
    """The options of one migration, and which step its models are in.

    A step is known by its timestep: models are called several times with one, and the timesteps of
    one run fall, so one that rises begins another run.
    """

    def __init__(self, options: SparseOptions, notes: list[str]) -> None:
        """Start before the first step.

        Args:
            options: what was asked for.
            notes: where to say what became of it.
        """
        self.options = options
        self._notes = notes
        self._local = threading.local()

    def tell(self, text: str) -> None:
        """Add a note to the report, once."""
        if text not in self._notes:
            self._notes.append(text)

    def step_is_dense(self, timestep: Any) -> bool:
        """Whether the forward that is given this timestep is of a step to be kept dense."""
        first, last = self.options.first_steps, self.options.last_steps
        if not first and not last:
            return False
        # One number is read from the device for each forward of the model.
        now = float(timestep.max()) if hasattr(timestep, "max") else float(timestep)
        before, step = getattr(self._local, "step", (None, 0))
        if before is not None and now != before:
            step = step + 1 if now < before else 0
        self._local.step = (now, step)
        return step < first or (last > 0 and step >= (self.options.steps or 0) - last)


PLANS: dict[str, Plan] = {}
"""``"process"`` → the plan of ``patch_all``; a token's key → that of a ``patch_pipeline`` block.

Empty where nobody asked for sparse attention, which is looked at first.
"""


class Sequence(NamedTuple):
    """The sequence that a model's self-attention runs over.

    Attributes:
        latent: (t, h, w) of the video tokens.
        text: text tokens that are part of it.
        text_last: whether they come behind the video.
        other_text: text tokens that are only attended to, by cross attention.
        layers: how many self-attentions one forward makes.
    """

    latent: tuple[int, int, int]
    text: int
    text_last: bool
    other_text: int
    layers: int

    @property
    def video(self) -> int:
        """Number of video tokens."""
        t, h, w = self.latent
        return t * h * w


class Frame:
    """One forward of a model that is running in this thread."""

    def __init__(self, plan: Plan, site: Site, sequence: Sequence | None, dense: bool) -> None:
        """Begin a forward.

        Args:
            plan: what was asked for.
            site: where the calls are counted.
            sequence: that of the self-attention, or None where it could not be found out.
            dense: whether this step is to be kept dense.
        """
        self.plan = plan
        self.site = site
        self.sequence = sequence
        self.dense = dense
        self.layer = 0
        self._mask: tuple[Any, int | None] | None = None

    def keys_under(self, mask: Tensor) -> int | None:
        """How many keys a padding mask leaves, the first ones; None if it is another mask."""
        if self._mask is None or self._mask[0] is not mask:
            # The same mask serves every layer of a forward, and is read from the device once.
            self._mask = (mask, _padding(mask))
        return self._mask[1]


def _padding(mask: Tensor) -> int | None:
    import torch

    if mask.dtype is not torch.bool or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != 1:
        return None
    rows = mask[:, 0, 0]
    count = int(rows[0].sum())
    first = torch.arange(rows.shape[1], device=rows.device) < count
    return count if bool((rows == first).all()) else None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    scale: float | None,
    is_causal: bool,
) -> Tensor | None:
    """Sparse attention of an SDPA call, or None where it is to be dense.

    Args:
        query: [B, N, Sq, D]; the call is one that SDPA's redirect takes.
        key: [B, Nkv, Skv, D].
        value: [B, Nkv, Skv, Dv].
        attn_mask: as SDPA's.
        scale: as SDPA's.
        is_causal: as SDPA's.
    """
    frame: Frame | None = getattr(LOCAL, "frame", None)
    if frame is None:
        return None
    sequence, options = frame.sequence, frame.plan.options
    length, keys = query.shape[2], key.shape[2]
    reason: str | None = None
    if sequence is None:
        reason = NO_LATENT
    elif length != sequence.video + sequence.text or keys != length:
        reason = OTHER_ATTENTION
    elif sequence.other_text == length:
        reason = AMBIGUOUS
    else:
        layer = frame.layer
        frame.layer += 1
        if frame.dense:
            reason = STEP
        elif layer < options.first_layers or layer >= sequence.layers - options.last_layers:
            reason = LAYER
        elif length < options.min_sequence:
            reason = SHORT
        elif is_causal:
            reason = CAUSAL
        elif attn_mask is not None:
            left = frame.keys_under(attn_mask)
            # Padding may only cut text off: then attention over fewer keys is the same attention.
            if left is None or left < sequence.video or not (sequence.text_last or left == length):
                reason = MASK
            else:
                keys = left
    if not frame.site.takes(reason):
        return None
    assert sequence is not None
    from mindiesd.ops.sparse.kernel import attend_sparsely

    if keys != length:
        key, value = key[:, :, :keys], value[:, :, :keys]
    return attend_sparsely(
        query,
        key,
        value,
        options.strategy,
        options.sparsity,
        scale,
        text_q=sequence.text,
        text_k=sequence.text - (length - keys),
        text_last=sequence.text_last,
        latent_q=sequence.latent,
        latent_k=sequence.latent,
        protect_first_frame=options.protect_first_frame,
        cdf_threshold=options.cdf_threshold,
    )


def traced() -> None:
    """Say that a call of a running model was compiled dense; for use while Dynamo traces."""
    for plan in PLANS.values():
        plan.tell(
            "sparse attention: calls inside of torch.compile stay dense, since a compiled graph "
            "cannot know its step and layer"
        )


def _of_wan(model: Any, given: dict[str, Any]) -> Sequence:
    patch = model.config.patch_size
    latent = _divided(given["hidden_states"].shape[-3:], patch)
    text = given["encoder_hidden_states"].shape[1]
    return Sequence(latent, 0, False, text, len(model.blocks))


def _of_hunyuan_video(model: Any, given: dict[str, Any]) -> Sequence:
    p, p_t = model.config.patch_size, model.config.patch_size_t
    latent = _divided(given["hidden_states"].shape[-3:], (p_t, p, p))
    text = given["encoder_hidden_states"].shape[1]
    layers = len(model.transformer_blocks) + len(model.single_transformer_blocks)
    return Sequence(latent, text, True, 0, layers)


def _of_cogvideox(model: Any, given: dict[str, Any]) -> Sequence:
    p, p_t = model.config.patch_size, model.config.patch_size_t or 1
    _, t, _, h, w = given["hidden_states"].shape
    text = given["encoder_hidden_states"].shape[1]
    latent = _divided((t, h, w), (p_t, p, p))
    return Sequence(latent, text, False, 0, len(model.transformer_blocks))


def _of_ltx(model: Any, given: dict[str, Any]) -> Sequence | None:
    sizes = [given.get(name) for name in ("num_frames", "height", "width")]
    if any(type(size) is not int for size in sizes):
        return None  # video_coords were given instead
    # hidden_states come as tokens already, and the sizes count tokens.
    latent = _divided(sizes, (1, 1, 1))
    text = given["encoder_hidden_states"].shape[1]
    return Sequence(latent, 0, False, text, len(model.transformer_blocks))


def _divided(sizes: Any, patch: Any) -> tuple[int, int, int]:
    t, h, w = (int(size) // int(by) for size, by in zip(sizes, patch, strict=True))
    return t, h, w


_MODELS: dict[str, tuple[str, str, Callable[[Any, dict[str, Any]], Sequence | None]]] = {
    "sparse_wan": ("transformer_wan", "WanTransformer3DModel", _of_wan),
    "sparse_hunyuan_video": (
        "transformer_hunyuan_video",
        "HunyuanVideoTransformer3DModel",
        _of_hunyuan_video,
    ),
    "sparse_cogvideox": ("cogvideox_transformer_3d", "CogVideoXTransformer3DModel", _of_cogvideox),
    "sparse_ltx": ("transformer_ltx", "LTXVideoTransformer3DModel", _of_ltx),
}

# What is read of a call; the parameters besides them go through untouched.
_READ = ("hidden_states", "encoder_hidden_states", "timestep")

RECORDS = tuple(
    Patch(
        name=name,
        family="sparse",
        option="sparse",
        module=f"diffusers.models.transformers.{module}",
        attribute=f"{kind}.forward",
        after=f"diffusers.models.transformers.{module}",
        becomes="mindiesd.sparse_attention",
        build="mindiesd.patches.sparse:build",
        reference=NOT_COMPARED,
        why="attention over the blocks that matter: its time falls with the share that is kept",
        when=_WHEN,
        numerics=_NUMERICS,
        requires={"diffusers": ">=0.35,<0.44"},
        parameters=_READ,
    )
    for name, (module, kind, _) in _MODELS.items()
)


def build(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of a video transformer's ``forward``: the same, and known while it runs."""
    import torch

    signature = inspect.signature(original)
    for name in _READ:
        if name not in signature.parameters:
            raise law.SignatureChanged(f"takes {signature}, without {name}")
    of = _MODELS[site.name][2]
    tracing = torch.compiler.is_dynamo_compiling
    tell: Callable[[], None] = torch.compiler.assume_constant_result(traced)  # type: ignore[no-untyped-call]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not PLANS:
            return original(self, *args, **kwargs)
        if tracing():
            tell()
            return original(self, *args, **kwargs)
        plan = _plan_in_force(site)
        if plan is None:
            return original(self, *args, **kwargs)
        try:
            given = signature.bind(self, *args, **kwargs).arguments
        except TypeError:
            return original(self, *args, **kwargs)  # which says what is wrong
        before = getattr(LOCAL, "frame", None)
        LOCAL.frame = Frame(plan, site, _found(of, self, given), plan.step_is_dense(_at(given)))
        try:
            return original(self, *args, **kwargs)
        finally:
            LOCAL.frame = before

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


def _plan_in_force(site: Site) -> Plan | None:
    token = getattr(LOCAL, "token", None)
    if token is not None and site.name in token.names:
        return PLANS.get(token.key)
    return PLANS.get("process") if site.everywhere else None


def _at(given: dict[str, Any]) -> Any:
    return given["timestep"]


def _found(
    of: Callable[[Any, dict[str, Any]], Sequence | None], model: Any, given: dict[str, Any]
) -> Sequence | None:
    """The sequence, or None where the call or the model is not as it is known to be."""
    try:
        return of(model, given)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, ZeroDivisionError):
        return None

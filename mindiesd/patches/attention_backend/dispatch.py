"""diffusers' attention backends by name: ``dispatch_attention_fn`` and what is asked before it.

The dispatch function is the one place that sees all arguments of a call; each backend behind it is
given only those that its signature names. A backend that cannot run, or that computes something
else, is exchanged there for ``native``, and what its own rules ask beyond that becomes a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mindiesd.errors import ParametersInvalid
from mindiesd.patches import law
from mindiesd.patches.attention_backend.contract import (
    CONTRACTS,
    CUDA,
    DENSE,
    HUB,
    NO_MASK,
    NOWHERE,
    PADDING,
    SQUARE,
    TOP_LEFT,
    Contract,
)
from mindiesd.patches.attention_backend.record import record
from mindiesd.patches.scope import Site, entered

if TYPE_CHECKING:
    from torch import Tensor

MODULE = "diffusers.models.attention_dispatch"
REJECTED = "mask that this backend rejects"

_VERSIONS = {"diffusers": ">=0.36,<0.44"}
_BUILD = "mindiesd.patches.attention_backend.dispatch"

RECORDS = (
    record(
        "diffusers_dispatch",
        (MODULE, "dispatch_attention_fn"),
        f"{_BUILD}:build_dispatch",
        why=(
            "a script that names flash-attention, SageAttention, xFormers or cuDNN runs without "
            "them; _native_npu no longer inverts additive masks and drops is_causal and enable_gqa"
        ),
        when=(
            "the named backend is a CUDA package that is absent or the tensors are not on CUDA; "
            "_native_npu and _fused_npu always. Masks the backend rejects still raise; return_lse "
            "and ring context parallelism raise. native, flex, _native_math and _native_xla are "
            "left alone"
        ),
        numerics="those of diffusers' native backend, exact where the named one quantises",
        requires=_VERSIONS,
        parameters=(
            "query",
            "key",
            "value",
            "attn_mask",
            "dropout_p",
            "is_causal",
            "scale",
            "enable_gqa",
            "attention_kwargs",
            "backend",
            "parallel_config",
        ),
    ),
    record(
        "diffusers_backend_requirements",
        (MODULE, "_check_attention_backend_requirements"),
        f"{_BUILD}:build_requirements",
        why="set_attention_backend and attention_backend accept the name of an absent CUDA package",
        when=(
            "the check would raise for a backend that diffusers_dispatch computes; inside "
            "patch_pipeline, only for a name given to one of its models"
        ),
        numerics="computes nothing",
        requires=_VERSIONS,
        parameters=("backend",),
    ),
    record(
        "diffusers_backend_download",
        (MODULE, "_maybe_download_kernel_for_backend"),
        f"{_BUILD}:build_download",
        why="the name of a CUDA kernel on the Hub needs no download where it could not run",
        when="there is no CUDA device, or the kernels package is not installed",
        numerics="computes nothing",
        requires=_VERSIONS,
        parameters=("backend",),
    ),
    record(
        "diffusers_set_backend",
        ("diffusers.models.modeling_utils", "ModelMixin.set_attention_backend"),
        f"{_BUILD}:build_set_backend",
        why="a backend named inside patch_pipeline is that pipeline's only, not the process's",
        when="inside patch_pipeline, on a model of that pipeline",
        numerics="computes nothing",
        requires=_VERSIONS,
        parameters=("self", "backend"),
    ),
)


def cuda_device() -> bool:
    """Whether there is a real CUDA or ROCm device.

    torch_npu's ``transfer_to_npu`` makes ``torch.cuda.is_available()`` speak of NPUs; it leaves the
    versions that PyTorch was built with alone.
    """
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return False
    return torch.cuda.is_available()


def build_dispatch(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``dispatch_attention_fn``."""
    from importlib import import_module

    import torch
    from torch import Tensor

    from mindiesd.ops import attention
    from mindiesd.ops.backends import backend_of
    from mindiesd.ops.masks import Band, attention_mask
    from mindiesd.patches.attention_backend.visible import EVERYTHING, padding_mask, visible

    diffusers = import_module(MODULE)
    registry, names, hub = (
        diffusers._AttentionBackendRegistry,
        diffusers.AttentionBackendName,
        diffusers._HUB_KERNELS_REGISTRY,
    )
    native = names.NATIVE
    known = {name.value: name for name in names}
    # By member, as the original's own tables are: Dynamo looks an enum member up by identity.
    contracts = {known.get(name, name): contract for name, contract in CONTRACTS.items()}
    grad_enabled, _, _ = law.context()

    def runs(contract: Contract, name: Any, query: Tensor) -> bool:
        # Not `is_cuda`: transfer_to_npu makes it say yes of tensors on an NPU.
        if query.device.type != "cuda":
            return contract.on_cpu and query.is_cpu
        if contract.needs == NOWHERE:
            return False
        if contract.needs == CUDA:
            return True
        if contract.needs == HUB:
            return hub[name].kernel_fn is not None
        return bool(getattr(diffusers, contract.needs, False))

    def refusal(contract: Contract, attn_mask: Any) -> str | None:
        """Masks on which the original raises, before it touches what is missing."""
        if attn_mask is None:
            return None
        if contract.masks == NO_MASK or not isinstance(attn_mask, Tensor):
            return REJECTED
        if contract.masks == PADDING and (
            attn_mask.dtype is not torch.bool or not 1 <= attn_mask.dim() <= 4
        ):
            return REJECTED
        if contract.masks == DENSE and attn_mask.dim() not in (2, 4):
            return REJECTED
        return None

    def extras(name: Any, given: dict[str, Any] | None) -> tuple[tuple[int, int], float]:
        """Window and softcap, of the keywords that this backend reads."""
        window, softcap = EVERYTHING, 0.0
        if given:
            reads = registry._supported_arg_names.get(name, ())
            for word in ("return_lse", "return_attn_probs"):
                if word in reads and given.get(word):
                    raise ParametersInvalid(
                        f"attention_kwargs[{word!r}]",
                        True,
                        f"False where backend {_text(name)!r} cannot run: there is no log-sum-exp",
                    )
            if "window_size" in reads and given.get("window_size") is not None:
                left, right = given["window_size"]
                window = (left, right)
            if "softcap" in reads:
                softcap = float(given.get("softcap") or 0.0)
        return window, softcap

    def redirected(
        contract: Contract,
        name: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
        attention_kwargs: dict[str, Any] | None,
        parallel_config: Any,
    ) -> Tensor:
        if contract.groups_heads and query.shape[2] != key.shape[2]:
            enable_gqa = True
        if attn_mask is None and not is_causal and not attention_kwargs and parallel_config is None:
            # Nothing for the rules below; this is nearly every call.
            plain: Tensor = original(
                query, key, value, None, dropout_p, False, scale, enable_gqa, backend=native
            )
            return plain
        window, softcap = extras(name, attention_kwargs)
        if parallel_config is not None:
            degree = parallel_config.context_parallel_config.ring_degree
            if degree > 1:
                raise ParametersInvalid(
                    "ring_degree",
                    degree,
                    f"1 where backend {_text(name)!r} cannot run: use ulysses_degree",
                )
        queries, keys = query.shape[1], key.shape[1]
        if attn_mask is not None:
            if contract.masks == PADDING:
                attn_mask = padding_mask(attn_mask)
            elif not attn_mask.is_floating_point():
                attn_mask = attn_mask.bool()
        if is_causal and contract.causal != TOP_LEFT and (queries != keys or attn_mask is not None):
            if contract.causal == SQUARE:
                raise ParametersInvalid(
                    "is_causal",
                    True,
                    f"False, or as many keys as queries and no mask, for backend {_text(name)!r}",
                )
            window, is_causal = (window[0], 0), False
        if window != EVERYTHING and is_causal:
            window, is_causal = (window[0], 0), False
        alone = (
            parallel_config is None
            and dropout_p == 0.0
            and not (
                grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
            )
        )
        if softcap:
            if not alone:
                raise ParametersInvalid(
                    "attention_kwargs['softcap']",
                    softcap,
                    f"0.0 with gradients, dropout or context parallelism, where backend "
                    f"{_text(name)!r} cannot run",
                )
            if window != EVERYTHING:
                attn_mask = visible(attn_mask, window, queries, key)
            mask = attention_mask(attn_mask, is_causal)
            return backend_of(query).attention_composed(
                query, key, value, mask, scale, False, softcap
            )
        if window != EVERYTHING:
            if (
                alone
                and attn_mask is None
                and attention.refusal(query, key, value, None, False, enable_gqa, False) is None
            ):
                # No matrix of queries by keys: a kernel takes the band as two numbers.
                band = Band.window(*window, queries, keys)
                return attention.attend(query, key, value, None, scale, False, band, False)
            attn_mask = visible(attn_mask, window, queries, key)
        result: Tensor = original(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            backend=native,
            parallel_config=parallel_config,
        )
        return result

    def dispatch_attention_fn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> Tensor:
        name = registry._active_backend if backend is None else backend
        if name is not native and (site.everywhere or site.in_force()):
            if type(name) is str:
                name = known.get(name, name)
            contract = contracts.get(name)
            if (
                contract is not None
                and not runs(contract, name, query)
                and site.takes(refusal(contract, attn_mask))
            ):
                return redirected(
                    contract,
                    name,
                    query,
                    key,
                    value,
                    attn_mask,
                    dropout_p,
                    is_causal,
                    scale,
                    enable_gqa,
                    attention_kwargs,
                    parallel_config,
                )
        result: Tensor = original(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            attention_kwargs,
            backend=backend,
            parallel_config=parallel_config,
        )
        return result

    return dispatch_attention_fn


def _text(backend: Any) -> str:
    return str(getattr(backend, "value", backend))


def build_requirements(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``_check_attention_backend_requirements``."""

    def _check_attention_backend_requirements(backend: Any) -> None:
        if _text(backend) in CONTRACTS and (site.everywhere or site.in_force()):
            try:
                original(backend)
            except RuntimeError:
                # Its only errors are of missing packages, and none is needed.
                site.takes(None)
            return
        original(backend)

    return _check_attention_backend_requirements


def build_download(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``_maybe_download_kernel_for_backend``."""
    from mindiesd.patches.hooks import find_module

    def _maybe_download_kernel_for_backend(backend: Any) -> None:
        contract = CONTRACTS.get(_text(backend))
        if (
            contract is not None
            and contract.needs == HUB
            and (site.everywhere or site.in_force())
            and not (cuda_device() and find_module("kernels"))
        ):
            site.takes(None)
            return
        original(backend)

    return _maybe_download_kernel_for_backend


def build_set_backend(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``ModelMixin.set_attention_backend``."""
    from importlib import import_module

    registry = import_module(MODULE)._AttentionBackendRegistry

    def set_attention_backend(self: Any, backend: str) -> None:
        token = None if site.everywhere else site.token_of(self)
        if token is None or str(backend).lower() not in CONTRACTS:
            original(self, backend)
            return
        before = registry._active_backend
        with entered(token):
            site.takes(None)
            original(self, backend)
        # The original also makes it every model's backend. The others are not patched, and would
        # call a package that is not there.
        registry.set_active_backend(before)

    return set_attention_backend

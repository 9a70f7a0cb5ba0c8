"""The door for one pipeline: :func:`patch_pipeline`.

The replacements are installed process-wide but act only inside the forward of a module that is in
scope. A module is in scope through an instance attribute ``forward``, a method of the instance that
marks this thread, calls the class's own forward and takes the mark away. That was measured to be
right across threads and in every order of compiling and scoping; an ambient context variable breaks
``torch.compile``, and a closure over the instance breaks ``deepcopy``.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

from mindiesd.errors import ParametersInvalid
from mindiesd.patches.engine import ENGINE
from mindiesd.patches.migration import Migration, Options
from mindiesd.patches.scope import LOCAL, OPEN, Token
from mindiesd.patches.sparse import PLANS, Plan
from mindiesd.patches.sweep import own_places

if TYPE_CHECKING:
    from torch.nn import Module

_PRIOR = "_mindiesd_prior_forward_"
"""Start of the instance attribute that keeps an instance-level forward that was there before."""

_numbers = itertools.count()


@contextmanager
def patch_pipeline(
    pipe: Any,
    only: str | Iterable[str] | None = None,
    skip: str | Iterable[str] | None = None,
    numerics: str = "faithful",
    verify: int = 0,
    strict: bool = False,
    sparse: Any = None,
    *,
    sites: bool = False,
) -> Iterator[Migration]:
    """Redirect calls made inside one pipeline's modules, for the length of a ``with`` block.

    Every module of the pipeline is in scope, however it is entered; other models of the process
    are not, also in other threads, also of the same class. A module that two pipelines share is in
    scope for both: the other pipeline's calls of it are redirected as well, and counted here, while
    its own modules stay as they are. Modules put into the pipeline inside the block are in scope
    where they are called from one that was there before.

    Args:
        pipe: a diffusers pipeline, any object whose attributes hold modules, pipelines, or lists
            or dictionaries of them, or one ``torch.nn.Module``.
        only: as for :func:`patch_all`.
        skip: as for :func:`patch_all`.
        numerics: as for :func:`patch_all`.
        verify: as for :func:`patch_all`.
        strict: as for :func:`patch_all`.
        sparse: as for :func:`patch_all`.
        sites: as for :func:`patch_all`.

    Yields:
        The migration; its ``report()`` counts this block's calls only.

    Raises:
        ParametersInvalid: ``pipe`` holds no module, or an option is not allowed.
        PatchError: as for :func:`patch_all`.
    """
    options = Options(only, skip, numerics, verify, strict, sparse, sites=sites)
    modules = _modules(pipe)
    migration = Migration(options, f"pipeline {type(pipe).__name__}")
    names = frozenset(patch.name for patch in options.patches)
    token = Token(names, migration.ledger, migration.verification, strict)
    token.modules = frozenset(map(id, modules))
    migration.install()
    scoped = _Scoped(token)
    try:
        with ENGINE.lock():
            OPEN.add(token)
            if options.sparse is not None:
                PLANS[token.key] = Plan(options.sparse, migration.notes)
            for module in modules:
                scoped.enter(module)
        yield migration
    finally:
        token.active = False
        with ENGINE.lock():
            OPEN.discard(token)
            PLANS.pop(token.key, None)
            for module in modules:
                scoped.leave(module)
        migration.uninstall()


def _modules(pipe: Any) -> list[Module]:
    from torch.nn import Module

    roots: list[Module] = []
    waiting, seen = [pipe], {id(pipe)}
    while waiting:
        holder = waiting.pop()
        if isinstance(holder, Module):
            roots.append(holder)
            continue
        for value in _held(holder, holder is pipe):
            if id(value) not in seen:
                seen.add(id(value))
                waiting.append(value)
    if not roots:
        raise ParametersInvalid(
            "pipe", type(pipe).__name__, "a torch.nn.Module or an object that holds some"
        )
    every = {id(module): module for root in roots for module in root.modules()}
    return [module for module in every.values() if _can_reach_a_patch(module)]


def _held(holder: Any, whole: bool) -> list[Any]:
    """What a pipeline, or a list or dictionary of it, may hold modules in.

    Args:
        holder: anything.
        whole: whether its attributes are looked at though it does not look like a pipeline.
    """
    if type(holder) in (list, tuple):
        return list(holder)
    if type(holder) is dict:
        return list(holder.values())
    components = getattr(type(holder), "components", None)
    if not whole and not isinstance(components, property):
        return []
    # A pipeline may be made of others, as diffusers' combined pipelines are.
    held = list(getattr(holder, "__dict__", {}).values())
    return [*holder.components.values(), *held] if components is not None else held


def _can_reach_a_patch(module: Module) -> bool:
    """Leave out PyTorch's plain leaves (Linear, Conv …): nothing they call is ever redirected."""
    import torch
    from torch._dynamo.eval_frame import OptimizedModule

    if isinstance(module, OptimizedModule):
        return False  # its forward is Dynamo's; the module it compiled is in scope itself
    if type(module).forward is torch.nn.Module.forward:
        return False  # a container such as ModuleList
    if next(module.children(), None) is not None:
        return True
    kind = type(module)
    return not kind.__module__.startswith("torch.nn.modules.") or "Norm" in kind.__name__


class _Scoped:
    """Puts modules into the scope of one token and takes them out again.

    Blocks may nest or overlap on a shared module, in any order: each keeps what it found under an
    attribute of its own and, on leaving, takes its method out of wherever it sits by then.

    Whoever put a forward of their own there before may put back inside the block what they had
    found, and so drop ours: accelerate's model offload does after each call of a pipeline, and
    diffusers when it takes a cache off. Ours is then put over what they put there.
    """

    def __init__(self, token: Token) -> None:
        self._token = token
        self._number = next(_numbers)
        self._prior = f"{_PRIOR}{self._number}"
        self._by_class: dict[type, Callable[..., Any]] = {}
        self._alive: dict[int, weakref.ref[MethodType]] = {}

    def enter(self, module: Module) -> None:
        # Straight into __dict__: Module.__setattr__ is the user's to override.
        held = vars(module)
        space, name = self._place(module)
        if name in space:
            held[self._prior] = space[name]
        else:
            held.pop(self._prior, None)
        ours = MethodType(self._forward_of(type(module)), module)
        self._alive[id(module)] = weakref.ref(ours, functools.partial(self._dropped, module))
        space[name] = ours

    def _place(self, module: Module) -> tuple[dict[str, Any], str]:
        """Where ours belongs: over all that is there, but for the blocks that were opened later.

        Over that of an enclosing block also where a hook was put over it inside of that block.
        """
        held = vars(module)
        space, name = held, "forward"
        if _prior_name(held.get(name)) is None:
            for place in own_places(module):
                for key, value in place.items():
                    if _prior_name(value) is not None and not key.startswith(_PRIOR):
                        space, name = place, key
        while True:
            prior = _prior_name(space.get(name))
            if prior is None or int(prior.removeprefix(_PRIOR)) < self._number:
                return space, name
            space, name = held, prior

    def _dropped(self, module: Module, _: object) -> None:
        if self._token.active:
            self.enter(module)

    def leave(self, module: Module) -> None:
        self._alive.pop(id(module), None)
        held = vars(module)
        ours = self._by_class.get(type(module))
        found = [
            (space, name)
            for space in own_places(module)
            for name, value in space.items()
            if isinstance(value, MethodType) and value.__func__ is ours
        ]
        for space, name in found:
            if self._prior in held:
                space[name] = held[self._prior]
            elif space is held and (name == "forward" or name.startswith(_PRIOR)):
                del held[name]
            else:
                # A hook put over ours inside the block (accelerate's _old_forward) will put this
                # back one day: give it what it would have found without us.
                space[name] = MethodType(type(module).forward, module)
        if found:
            held.pop(self._prior, None)
        # Otherwise something wraps ours where we cannot see it: the chain stays, ours is inert.

    def _forward_of(self, kind: type) -> Callable[..., Any]:
        known = self._by_class.get(kind)
        if known is None:
            known = self._by_class[kind] = _scoped_forward(kind, self._token, self._prior)
        return known


def _scoped_forward(kind: Any, token: Token, prior_name: str) -> Callable[..., Any]:
    # The class's function, called with self: a deepcopy of a module runs on its own weights. It is
    # looked up here because Dynamo cannot read it from a class marked allow_in_graph, as diffusers
    # marks its blocks.
    class_forward = kind.forward

    # wraps: pipelines read the signature of their transformer's forward.
    @functools.wraps(class_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        inner = _prior(self, prior_name)
        outer = getattr(LOCAL, "token", None)
        if outer is token or not token.active:
            if inner is None:
                return class_forward(self, *args, **kwargs)
            return inner(*args, **kwargs)
        LOCAL.token = token
        try:
            if inner is None:
                return class_forward(self, *args, **kwargs)
            return inner(*args, **kwargs)
        finally:
            LOCAL.token = outer

    # A method pickles by the name of its function.
    forward.__name__ = "forward"
    vars(forward)[_PRIOR] = prior_name
    return forward


def scoped_only(module: Any) -> bool:
    """Whether a module has no instance-level forward but that of a scope, or its class's own."""
    own = module.__dict__.get("forward")
    prior = _prior_name(own)
    if prior is not None:
        own = _prior(module, prior)
    if own is None:
        return True
    # What taking hooks off leaves behind.
    return (
        isinstance(own, MethodType)
        and own.__self__ is module
        and own.__func__ is getattr(type(module), "forward", None)
    )


def _prior_name(forward: Any) -> str | None:
    """The attribute in which a scope's forward keeps the one before it; None for any other."""
    if not isinstance(forward, MethodType):
        return None
    name: str | None = vars(forward.__func__).get(_PRIOR)
    return name


def _prior(module: Any, name: str) -> Any:
    """The instance-level forward that was there before, past enclosing blocks: ours decides."""
    prior = module.__dict__.get(name)
    while isinstance(prior, MethodType) and _PRIOR in vars(prior.__func__):
        prior = module.__dict__.get(vars(prior.__func__)[_PRIOR])
    return prior

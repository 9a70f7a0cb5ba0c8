"""``unpatch_all`` restores every attribute by identity, everywhere."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch

import mindiesd
from mindiesd.patches import sweep
from tests.processes import run_python


@pytest.mark.slow
def test_every_attribute_is_again_the_object_it_was() -> None:
    """Snapshot of every module attribute and every class attribute, before and after."""
    run_python(
        """
        import sys
        from types import ModuleType
        import mindiesd
        import mindiesd.patches, mindiesd.ops.attention, mindiesd.ops.norm, mindiesd.ops.rope
        import torch, diffusers, transformers
        import torch._dynamo, torch.jit._builtins
        from tests.tiny import flux_inputs, tiny_flux_transformer

        model = tiny_flux_transformer()
        inputs = flux_inputs(model)
        with torch.no_grad():
            model(**inputs)

        def classes():
            found = {}
            for module in list(sys.modules.values()):
                if not isinstance(module, ModuleType):
                    continue
                for value in list(vars(module).values()):
                    if isinstance(value, type):
                        found[id(value)] = value
            return found.values()

        def snapshot():
            # The objects themselves are kept, so that no id can be reused.
            taken = {}
            for name, module in list(sys.modules.items()):
                if isinstance(module, ModuleType) and not name.startswith("mindiesd"):
                    for key, value in list(vars(module).items()):
                        taken[name, key] = value
            for kind in classes():
                if str(kind.__module__).startswith("mindiesd"):
                    continue
                for key, value in list(vars(kind).items()):
                    taken["class", id(kind), kind, key] = value
                    if hasattr(value, "__defaults__"):
                        taken["defaults", id(kind), kind, key] = value.__defaults__
            return taken

        before = snapshot()
        assert len(before) > 100_000
        migration = mindiesd.patch_all()
        patched = snapshot()
        changed = {key for key in before if patched.get(key) is not before[key]}
        assert len(changed) >= 16, changed  # six targets and eleven holders of the rotary helper
        with torch.no_grad():
            model(**inputs)
        assert migration.report().redirected > 0
        mindiesd.unpatch_all()
        after = snapshot()
        different = [key for key in before if key not in after or after[key] is not before[key]]
        # Attributes that importing or running code changes by itself, patched or not.
        different = [key for key in different if "cache" not in str(key).lower()]
        # torch.compiler.reset() starts Dynamo's own counters anew.
        different = [key for key in different if "torch._dynamo" not in str(key)]
        # wrapt notes that it has put its finder into sys.meta_path, where it stays.
        different = [key for key in different if key[0] != "wrapt.importer"]
        # This script's own variables.
        different = [key for key in different if key[0] not in ("__main__", "__mp_main__")]
        assert not different, different
        fresh = {k for k in set(after) - set(before) if k[0] not in ("__main__", "__mp_main__")}
        leaked = [key for key in fresh if "mindiesd" in repr(after[key])]
        assert not leaked, leaked
        """
    )


def test_holders_of_every_kind() -> None:
    """By-name imports, class attributes and defaults are told apart, rebound, and restored."""
    run_python(
        """
        import functools, sys, textwrap, types
        import torch
        import torch.nn.functional as F
        import mindiesd

        user = types.ModuleType("user_module")
        sys.modules["user_module"] = user
        exec(textwrap.dedent('''
            import functools
            from torch.nn.functional import scaled_dot_product_attention, rms_norm
            from torch.nn.functional import scaled_dot_product_attention as attend

            class Holder:
                attn = scaled_dot_product_attention          # a builtin does not bind
                static = staticmethod(scaled_dot_product_attention)
                norm = staticmethod(rms_norm)

            def default(q, fn=scaled_dot_product_attention):
                return fn(q, q, q)

            def keyword_default(q, *, fn=scaled_dot_product_attention):
                return fn(q, q, q)

            TABLE = {"sdpa": scaled_dot_product_attention}
            PARTIAL = functools.partial(scaled_dot_product_attention, is_causal=False)

            class Instance:
                def __init__(self):
                    self.fn = scaled_dot_product_attention

            INSTANCE = Instance()

            def make():
                fn = scaled_dot_product_attention
                return lambda q: fn(q, q, q)

            CLOSURE = make()
        '''), vars(user))

        def state():
            return [
                user.scaled_dot_product_attention, user.attend, user.rms_norm,
                vars(user.Holder)["attn"], vars(user.Holder)["static"], vars(user.Holder)["norm"],
                user.default.__defaults__, user.keyword_default.__kwdefaults__["fn"],
            ]

        before = state()
        q = torch.randn(1, 2, 3, 8)
        expected = F.scaled_dot_product_attention(q, q, q)
        migration = mindiesd.patch_all(only=["sdpa", "torch_rms_norm"])

        def count():
            return migration.report().patches[0].redirected

        holder = user.Holder()
        reached = [
            lambda: user.scaled_dot_product_attention(q, q, q),
            lambda: user.attend(q, q, q),
            lambda: user.Holder.attn(q, q, q),
            lambda: holder.attn(q, q, q),
            lambda: holder.static(q, q, q),
            lambda: user.default(q),
            lambda: user.keyword_default(q),
        ]
        for number, call in enumerate(reached, 1):
            assert torch.equal(call(), expected)
            assert count() == number, number
        missed = [
            lambda: user.TABLE["sdpa"](q, q, q),
            lambda: user.PARTIAL(q, q, q),
            lambda: user.INSTANCE.fn(q, q, q),
            lambda: user.CLOSURE(q),
        ]
        for call in missed:
            assert torch.equal(call(), expected)
        assert count() == len(reached)
        sdpa = migration.report().patches[0]
        rebound = " ".join(sdpa.rebound)
        for place in ("user_module.attend", "user_module.Holder.attn", "default of fn",
                      "user_module.default (default value)"):
            assert place in rebound, (place, rebound)
        unreached = " ".join(sdpa.unreached)
        for place in ("a container at user_module.TABLE", "functools.partial",
                      "attribute 'fn' of a user_module.Instance",
                      "the closure of user_module.make"):
            assert place in unreached, (place, unreached)

        # A name imported while patched is given the original on undo.
        exec("from torch.nn.functional import scaled_dot_product_attention as late", vars(user))
        assert user.late is F.scaled_dot_product_attention
        mindiesd.unpatch_all()
        assert all(a is b for a, b in zip(before, state(), strict=True))
        assert user.late is torch._C._nn.scaled_dot_product_attention
        """
    )


def test_somebody_elses_wrapper_is_left_in_place_and_named() -> None:
    run_python(
        """
        import torch
        import torch.nn.functional as F
        import mindiesd

        migration = mindiesd.patch_all(only="sdpa")
        ours = F.scaled_dot_product_attention
        calls = []
        def theirs(*args, **kwargs):
            calls.append(1)
            return ours(*args, **kwargs)
        F.scaled_dot_product_attention = theirs
        mindiesd.unpatch_all()
        assert F.scaled_dot_product_attention is theirs
        notes = migration.report().notes
        assert any("torch.nn.functional.scaled_dot_product_attention" in n for n in notes), notes
        q = torch.randn(1, 2, 3, 8)
        expected = torch._C._nn.scaled_dot_product_attention(q, q, q)
        assert torch.equal(F.scaled_dot_product_attention(q, q, q), expected) and calls
        assert migration.report().redirected == 0, "our function is inert after the end"
        """
    )


@pytest.mark.slow
def test_cycles_leak_nothing() -> None:
    run_python(
        """
        import gc
        import torch
        import torch.nn.functional as F
        import mindiesd

        def cycle():
            mindiesd.patch_all(only=["sdpa", "torch_rms_norm", "torch_layer_norm"])
            mindiesd.unpatch_all()

        for _ in range(5):
            cycle()
        gc.collect()
        before = len(gc.get_objects())
        for _ in range(30):
            cycle()
        gc.collect()
        grown = len(gc.get_objects()) - before
        assert grown < 30, f"{grown} objects more after 30 cycles"
        assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
        """
    )


def told(patch: Any) -> list[str]:
    """What a report says was not reached, without the originals that other tests keep."""
    return [text for text in patch.unreached if not text.startswith("a container at tests.")]


def test_methods_that_were_bound_before() -> None:
    """Hooks keep the forward that they found, bound; a class that is patched does not change it."""
    accelerate = pytest.importorskip("accelerate.hooks")
    hooks = pytest.importorskip("diffusers.hooks.hooks")
    x = torch.randn(2, 8)

    def accelerated(norm: Any) -> Any:
        return accelerate.add_hook_to_module(norm, accelerate.ModelHook())

    def taken_off(norm: Any) -> Any:
        accelerate.remove_hook_from_module(accelerated(norm))
        return norm

    def hooked(norm: Any) -> Any:
        registry = hooks.HookRegistry.check_if_exists_or_initialize(norm)
        registry.register_hook(hooks.ModelHook(), "nothing")
        return norm

    changes = (accelerated, taken_off, hooked)
    before = [change(torch.nn.LayerNorm(8)) for change in changes]

    def kept(norm: Any) -> list[Any]:
        return [list(place.items()) for place in sweep.own_places(norm)]

    expected, attributes = [norm(x) for norm in before], [kept(norm) for norm in before]
    with torch.no_grad():
        migration = mindiesd.patch_all(only="torch_layer_norm")
        for number, norm in enumerate(before, 1):
            torch.testing.assert_close(norm(x), expected[number - 1])
            (patch,) = migration.report().patches
            assert (patch.redirected, told(patch)) == (number, [])
        # Of a copy, and of what was hooked inside, nothing stays either.
        copied = copy.deepcopy(before)
        inside = [change(torch.nn.LayerNorm(8)) for change in changes]
        for norm in (*copied, *inside):
            norm(x)
        assert migration.report().patches[0].redirected == 9
        # A model may go while it is patched.
        going = weakref.ref(before[0])
        there = [attributes[0], before.pop(0), expected.pop(0)]
        del there, attributes[0], norm
        gc.collect()
        assert going() is None
        mindiesd.unpatch_all()
    for norm, was, result in zip(before, attributes, expected, strict=True):
        now = kept(norm)
        assert all(
            key == other and value is same
            for place, old in zip(now, was, strict=True)
            for (key, value), (other, same) in zip(place, old, strict=True)
        )
        assert torch.equal(norm(x), result)
    for norm in (*copied, *inside):
        assert not any("mindiesd" in key for place in kept(norm) for key, _ in place)
        norm(x)
    assert migration.report().patches[0].redirected == 9


def test_a_bound_method_that_is_kept_elsewhere_is_told() -> None:
    kept = [torch.nn.LayerNorm(8).forward]
    migration = mindiesd.patch_all(only="torch_layer_norm")
    (patch,) = migration.report().patches
    assert told(patch) == ["a bound method of a torch.nn.modules.normalization.LayerNorm"]
    del kept

"""What else runs in the process is not in scope: tasks, threads, generators, shared modules."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import mindiesd
from mindiesd.patches import scope
from tests.processes import ROOT


class Part(torch.nn.Module):
    """One call of a redirected function and one of a redirected class."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        q = self.norm(q)
        return F.scaled_dot_product_attention(q, q, q)


class Pipe:
    def __init__(self, **held: Any) -> None:
        self.__dict__.update(held)

    @torch.no_grad()
    def __call__(self, q: torch.Tensor) -> torch.Tensor:
        for held in vars(self).values():
            q = held(q)
        return q


def counted(migration: mindiesd.Migration) -> int:
    (patch,) = [p for p in migration.report().patches if p.name == "sdpa"]
    return patch.redirected


def q() -> torch.Tensor:
    return torch.randn(1, 2, 3, 8, generator=torch.Generator().manual_seed(0))


def test_tasks_of_one_thread() -> None:
    """Two blocks and a task without one, all open at the same time on one event loop."""
    first, second, other = (Pipe(part=Part()) for _ in range(3))
    x = q()
    expected = [pipe(x) for pipe in (first, second, other)]
    counts: dict[str, int] = {}

    async def inside(name: str, pipe: Pipe, result: torch.Tensor, calls: int) -> None:
        with mindiesd.patch_pipeline(pipe) as migration:
            for _ in range(calls):
                await asyncio.sleep(0)
                assert torch.allclose(pipe(x), result, atol=1e-6)
                await asyncio.sleep(0)
            counts[name] = counted(migration)

    async def outside() -> None:
        for _ in range(30):
            await asyncio.sleep(0)
            assert torch.equal(other(x), expected[2])

    async def everything() -> None:
        await asyncio.gather(
            inside("first", first, expected[0], 7),
            outside(),
            inside("second", second, expected[1], 9),
        )

    asyncio.run(everything())
    assert counts == {"first": 7, "second": 9}


def test_tasks_in_threads() -> None:
    """asyncio.to_thread copies the context of the task, which must not carry a scope along."""
    mine, other = Pipe(part=Part()), Pipe(part=Part())
    x = q()
    expected = other(x)

    async def everything() -> int:
        with mindiesd.patch_pipeline(mine) as migration:
            results = await asyncio.gather(
                *[asyncio.to_thread(pipe, x) for pipe in (mine, other) * 10]
            )
            assert all(torch.equal(result, expected) for result in results[1::2])
            return counted(migration)

    assert asyncio.run(everything()) == 10


def test_a_task_that_is_cancelled_inside() -> None:
    pipe = Pipe(part=Part())
    before = dict(vars(pipe.part))

    async def work() -> None:
        with mindiesd.patch_pipeline(pipe):
            pipe(q())
            await asyncio.sleep(60)

    async def everything() -> None:
        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(everything())
    assert vars(pipe.part) == before
    assert not scope.OPEN
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


def test_a_generator_that_is_left_in_the_middle() -> None:
    pipe, other = Pipe(part=Part()), Pipe(part=Part())
    x = q()
    expected = other(x)

    def steps() -> Iterator[mindiesd.Migration]:
        with mindiesd.patch_pipeline(pipe) as migration:
            while True:
                pipe(x)
                yield migration

    generator = steps()
    migration = next(generator)
    assert torch.equal(other(x), expected)
    next(generator)
    assert counted(migration) == 2
    generator.close()
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
    pipe(x)
    assert counted(migration) == 2 and not scope.OPEN


def test_a_shared_module_is_in_scope_and_the_rest_of_the_other_is_not() -> None:
    """Two pipelines with one text encoder: it is one module, and whoever calls it is redirected."""
    encoder = Part()
    mine = Pipe(encoder=encoder, transformer=Part())
    other = Pipe(encoder=encoder, transformer=Part())
    x = q()
    expected = mine(x), other(x)
    with mindiesd.patch_pipeline(mine) as migration:
        assert torch.allclose(mine(x), expected[0], atol=1e-6)
        assert counted(migration) == 2
        assert torch.allclose(other(x), expected[1], atol=1e-6)
        assert counted(migration) == 3, "of the other, the shared encoder and nothing else"
    with mindiesd.patch_pipeline(mine) as one, mindiesd.patch_pipeline(other) as two:
        mine(x)
        assert (counted(one), counted(two)) == (1, 1), "the innermost block decides on the encoder"
        other(x)
        assert (counted(one), counted(two)) == (1, 3)
    assert torch.equal(mine(x), expected[0]) and torch.equal(other(x), expected[1])


def test_a_submodule_that_only_a_part_of_another_model_shares() -> None:
    class Model(torch.nn.Module):
        def __init__(self, *parts: Part) -> None:
            super().__init__()
            self.parts = torch.nn.ModuleList(parts)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self.parts:
                x = part(x)
            return x

    shared = Part()
    mine, other = Model(shared, Part()), Model(Part(), shared, Part())
    x = q()
    with torch.no_grad():
        expected = other(x)
        with mindiesd.patch_pipeline(mine) as migration:
            assert torch.allclose(other(x), expected, atol=1e-6)
            assert counted(migration) == 1
            mine(x)
            assert counted(migration) == 3
    assert all("forward" not in vars(module) for module in [*mine.modules(), *other.modules()])


def test_modules_in_lists_dictionaries_and_pipelines_of_a_pipeline() -> None:
    inner = Pipe(part=Part())

    class Combined:
        """As diffusers' combined pipelines: one pipeline and modules of its own."""

        def __init__(self) -> None:
            self.experts = [Part(), Part()]
            self.by_name = {"high": Part(), "low": (Part(), 3)}
            self.prior = Prior()

    class Prior:
        def __init__(self) -> None:
            self.part = inner.part

        @property
        def components(self) -> dict[str, Any]:
            return {"part": self.part}

    pipe = Combined()
    parts = [*pipe.experts, pipe.by_name["high"], pipe.by_name["low"][0], inner.part]
    x = q()
    with torch.no_grad(), mindiesd.patch_pipeline(pipe) as migration:
        for number, part in enumerate(parts, 1):
            part(x)
            assert counted(migration) == number


def test_a_module_that_is_put_in_and_taken_out_inside() -> None:
    model = torch.nn.Sequential(Part(), Part())
    x = q()
    with torch.no_grad(), mindiesd.patch_pipeline(model) as migration:
        taken = model[1]
        model[1] = Part()
        model(x)
        assert counted(migration) == 2, "called from one that was there before"
        taken(x)
        assert counted(migration) == 3, "in scope until the block ends"
    assert "forward" not in vars(taken) and "forward" not in vars(model[1])


@pytest.mark.parametrize("raised", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_after_an_error_in_the_middle_of_a_forward(raised: type[BaseException]) -> None:
    class Failing(Part):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            super().forward(x)
            raise raised

    pipe, other = Pipe(part=Part(), failing=Failing()), Pipe(part=Part())
    x = q()
    with pytest.raises(raised), mindiesd.patch_pipeline(pipe):
        pipe(x)
    assert getattr(scope.LOCAL, "token", None) is None
    assert all("forward" not in vars(m) for part in vars(pipe).values() for m in part.modules())
    with mindiesd.patch_pipeline(pipe) as migration:
        other(x)
        assert counted(migration) == 0


def test_eight_threads_of_mixed_calls() -> None:
    """1,000 calls each of models in a block and in none, while blocks open and close."""
    pipes = [Pipe(part=Part()) for _ in range(8)]
    x = q()
    expected = [pipe(x) for pipe in pipes]
    wrong: list[str] = []
    start = threading.Barrier(8)

    def work(number: int) -> None:
        pipe, result = pipes[number], expected[number]
        start.wait()
        try:
            if number % 2:
                for _ in range(1000):
                    if not torch.equal(pipe(x), result):
                        wrong.append("another model's result changed")
                return
            for _ in range(4):
                with mindiesd.patch_pipeline(pipe, only=("sdpa", "torch_layer_norm")) as migration:
                    for _ in range(125):
                        if not torch.allclose(pipe(x), result, atol=1e-6):
                            wrong.append("wrong inside")
                    if counted(migration) != 125:
                        wrong.append(f"counted {counted(migration)}")
                for _ in range(125):
                    if not torch.equal(pipe(x), result):
                        wrong.append("wrong after the block")
        except BaseException as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
    assert not scope.OPEN


def test_nothing_of_a_block_is_kept() -> None:
    pipe = Pipe(part=Part())
    held = [weakref.ref(pipe.part)]
    x = q()
    with mindiesd.patch_pipeline(pipe, verify=1, sites=True) as migration:
        pipe(x)
    held += [weakref.ref(migration), weakref.ref(x)]
    del pipe, migration, x
    gc.collect()
    assert [ref() for ref in held] == [None, None, None]


@pytest.mark.parametrize("number", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_cycles_leak_nothing(number: int) -> None:
    command = [sys.executable, ROOT / "scripts" / "soak.py", f"--cycles={number}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"after {number} cycles" in done.stdout and "grown: nothing" in done.stdout


def test_a_leak_is_seen(tmp_path: Path) -> None:
    """What the script says is only worth something if it would say otherwise."""
    (tmp_path / "leaks.py").write_text(
        "import runpy, sys\n"
        "from mindiesd.patches import pipeline\n"
        "kept, leave = [], pipeline._Scoped.leave\n"
        "def leaking(self, module):\n"
        "    kept.append(self)\n"
        "    leave(self, module)\n"
        "pipeline._Scoped.leave = leaking\n"
        f"sys.argv = ['soak.py', '--cycles=40']\n"
        f"runpy.run_path({str(ROOT / 'scripts' / 'soak.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, tmp_path / "leaks.py"], capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "grown: objects" in done.stdout and "tokens 40" in done.stdout, done.stdout

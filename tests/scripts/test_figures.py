"""What the measuring scripts give as data, and the tables they make of it."""

from __future__ import annotations

import _bench
import _coverage
import bench_overhead
import bench_sparse
import pytest
from _history import Figure
from _runs import Row, Run


def test_the_counts_of_the_models_as_figures():
    rows = [
        Row("a", Run(launches=100, read=1000, views=2), Run(launches=60, read=500, needed=1)),
        Row("b", Run(failed="crash"), Run(launches=50, read=1)),
        Row("c", absent="not installed"),
    ]
    found = {figure.name: figure for figure in _coverage.figures(rows)}
    assert found["models that run"].value == 2
    assert found["models that run"].details == {"unpatched": 1}
    assert found["launches, of unpatched"].shown() == "60.0 %"
    assert found["bytes read and written, of unpatched"].value == pytest.approx(50)
    assert found["launches of a"].value == 60
    assert found["launches of a"].details["copies"] == [2, 1]
    assert not {"launches of b", "launches of c"} & found.keys()


def test_one_launch_more_in_one_model_is_found():
    before, after = (
        {f.name: f for f in _coverage.figures([Row("a", Run(launches=99), Run(launches=n))])}
        for n in (60, 61)
    )
    assert after["launches of a"].excess(before["launches of a"]) > 0


def test_every_unit_of_the_host_figures_has_a_tolerance():
    for unit in ("µs", "ms", "×"):
        slower = bench_overhead.figure("a", 100.0, 1, unit)
        assert not slower.met
        assert slower.excess(bench_overhead.figure("a", 100.0, 1, unit)) < 0
        assert bench_overhead.figure("a", 200.0, 1, unit).excess(slower) > 0


def test_the_tables_of_sparse_attention():
    shape, strategy = [8192, 2, "float32"], ["rf_v2", 0.75]
    times = {"dense_ms": 545.0, "sparse_ms": 173.0, "wall": 3.16, "processor": 3.1}
    sizes = {"dense_mib": 31.8, "sparse_mib": 32.6}
    common = {"shape": shape, "strategy": strategy}
    found = [
        Figure(
            name="t",
            value=3.1,
            better="more",
            goal=3.2,
            details={"table": "time", **times, **common},
        ),
        Figure(name="m", value=1.025, goal=1.1, details={"table": "memory", **sizes, **common}),
        *(
            Figure(name=kind, value=0.1, details={"table": "quality", "strategy": [kind, 0.75]})
            for kind in ("rf_v2", "ada_bsa", "random")
        ),
    ]
    assert bench_sparse.times_table(found).splitlines()[-1] == (
        "| 8192 | 2 | float32 | rf_v2 | 0.75 | 545 ms | 173 ms | 3.16 × | 3.10 × | 3.2 × | **no** |"
    )
    assert bench_sparse.memory_table(found).splitlines()[-1] == (
        "| 8192 | 2 | float32 | rf_v2 | 0.75 | 31.8 MiB | 32.6 MiB | 1.025 × | yes |"
    )
    assert bench_sparse.quality_table(found).splitlines()[-1] == "| 0.75 | 0.100 | 0.100 | 0.100 |"


def test_a_measurement_that_fails_ends_the_run(monkeypatch, tmp_path):
    broken = _bench.Measurement("no_such_script.py", False, "machine", ())
    monkeypatch.setitem(_bench.MEASUREMENTS, "host", broken)
    import sys
    from pathlib import Path

    with pytest.raises(SystemExit, match="failed with status"):
        _bench.measured("host", False, Path(sys.executable))


def test_without_torch_npu_the_launches_are_not_measured(tmp_path, capsys):
    run = _bench.run(["launches"], False, tmp_path / "no" / "python")
    assert run.parts == {} and "NOT MEASURED" in capsys.readouterr().err

"""The page and its charts, from kept runs."""

from __future__ import annotations

from xml.etree import ElementTree

import _bench_page
import _chart
import _history
import pytest
from _history import Figure, Part, Run
from hypothesis import given
from hypothesis import strategies as st

SVG = "{http://www.w3.org/2000/svg}"
HERE = {"architecture": "x86_64", "processor": "some", "cores": 2, "load": 0.5}


def rectangles(text):
    """Width and colour of every bar."""
    found = ElementTree.fromstring(text).iter(f"{SVG}rect")
    return [(float(one.get("width")), one.get("fill")) for one in found][1:]


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8", exclude_categories=("C",))),
            st.floats(0, 1e9),
            st.floats(0, 1e9),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_bars_are_as_long_as_their_values(rows):
    drawn = [_chart.Bar(label, (a, b), f"{a:g}") for label, a, b in rows]
    text = _chart.bars("<title> & more", ("before", "after"), drawn)
    values = [value for _, a, b in rows for value in (a, b)]
    widths = [width for width, _ in rectangles(text)][2:]  # after the legend
    largest = max(values)
    room = _chart.WIDTH - _chart.LABELS - _chart.RIGHT
    assert len(widths) == len(values)
    for width, value in zip(widths, values, strict=True):
        assert width == pytest.approx(room * value / largest if largest else 0, abs=0.06)
    told = [one.text or "" for one in ElementTree.fromstring(text).iter(f"{SVG}text")]
    assert told[0] == "<title> & more"
    assert [label for label, *_ in rows] == told[3::2]


def test_what_cannot_be_drawn_is_refused():
    for series, values in ((("a",), (-1.0,)), (("a", "b"), (1.0,)), ((), ())):
        with pytest.raises(ValueError, match=r"value|series"):
            _chart.bars("t", series, [_chart.Bar("x", values, "")])


def part(figures, depends="machine"):
    return Part(
        command="scripts/x.py", depends=depends, versions={"torch": "2.13.0"}, figures=figures
    )


def whole(date, sdpa=1.5, share=60.0):
    """A run with every part and every figure that the history shows."""
    host = [
        Figure(name="SDPA redirected, no mask, kernel a no-op", value=sdpa, unit="µs", goal=3),
        Figure(name="`import mindiesd`, added to `python -c pass`", value=12, unit="ms", goal=30),
        Figure(
            name="`patch_all()` after importing diffusers and transformers", value=200, unit="ms"
        ),
        Figure(name="a tiny Flux pipeline, patched / unpatched", value=0.97, unit="×"),
    ]
    sparse = [
        Figure(
            name=f"faster than dense: {kind} 0.75",
            value=value,
            unit="×",
            better="more",
            details={"table": "time", "strategy": [kind, 0.75]},
        )
        for kind, value in (("rf_v2", 3.0), ("ada_bsa", 2.0))
    ]
    launches = [
        Figure(name="models that run", value=165, better="more", details={"unpatched": 160}),
        Figure(
            name="launches, of unpatched",
            value=share,
            unit="%",
            details={"unpatched": 100, "patched": share},
        ),
        Figure(
            name="bytes read and written, of unpatched",
            value=70.0,
            unit="%",
            details={"unpatched": 100, "patched": 70},
        ),
        Figure(name="launches of flux", value=90, unit="launches", details={"unpatched": 180}),
    ]
    parity = [Figure(name="error patched / unpatched, float32", value=1.0, unit="×")]
    return Run(
        date=date,
        commit="abc",
        machine=HERE,
        parts={
            "host": part(host),
            "sparse": part(sparse),
            "launches": part(launches, "versions"),
            "parity": part(parity),
        },
    )


def test_the_history_shows_every_run_the_newest_first():
    runs = [whole("2026-01-01", sdpa=1.5, share=60.0), whole("2026-02-01", sdpa=2.5, share=55.0)]
    lines = _bench_page.history_table(runs).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 2026-02-01", "| 2026-01-01"]
    assert "55.0 %" in lines[2] and "2.50 µs" in lines[2] and "2.500 ×" in lines[2]
    assert "60.0 %" in lines[3] and "1.50 µs" in lines[3]


def test_each_part_is_from_the_last_run_that_has_it(tmp_path):
    first = whole("2026-01-01", sdpa=1.5, share=60.0)
    second = whole("2026-02-01", sdpa=2.5, share=55.0)
    second = Run(date=second.date, commit="def", machine=HERE, parts={"host": second.parts["host"]})
    folder = tmp_path / "benchmarks"
    for run in (first, second):
        _history.keep(run, folder)
    written = _bench_page.write(folder)
    assert {path.name for path in written} == {
        "benchmarks.md",
        "host.svg",
        "launches.svg",
        "sparse.svg",
    }
    page = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    host, launches = (
        page.partition(f"## {_bench_page.TITLES[n]}")[2] for n in ("host", "launches")
    )
    assert "Commit def, 2026-02-01" in host.partition("##")[0] and "2.50 µs" in host
    assert "Commit abc, 2026-01-01" in launches.partition("##")[0]
    assert "| 2026-02-01 | def | – | – | 2.50 µs |" in page
    for name in ("host", "launches", "sparse"):
        ElementTree.parse(folder / f"{name}.svg")
        assert f"(benchmarks/{name}.svg)" in page


def test_nothing_measured_is_said():
    text = _bench_page.page([], [])
    assert text.count("Not measured yet.") == len(_bench_page.TITLES)


def test_a_renamed_figure_does_not_vanish_from_the_history():
    run = whole("2026-01-01")
    run.parts["parity"].figures.clear()
    with pytest.raises(LookupError, match="error patched"):
        _bench_page.history_table([run])

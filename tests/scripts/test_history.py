"""Kept figures: what is written is read back, and what got worse is found."""

from __future__ import annotations

import json
from dataclasses import replace

import _history
import pytest
from _history import Change, Figure, Part, Run
from hypothesis import given
from hypothesis import strategies as st

HERE = {"architecture": "x86_64", "processor": "some", "cores": 2, "load": 0.5}
VERSIONS = {"python": "3.11.7", "torch": "2.13.0"}


def time(value, **others):
    return Figure(name="a call", value=value, unit="µs", tolerance=0.1, slack=0.3, **others)


def part(*figures, depends="machine", versions=VERSIONS):
    return Part(command="measure", depends=depends, versions=versions, figures=[*figures])


def run(date="2026-01-01T12:00:00Z", commit="abc", machine=HERE, **parts):
    return Run(date=date, commit=commit, machine=machine, parts=parts)


numbers = st.floats(-1e6, 1e6)
figures = st.builds(
    Figure,
    name=st.text(),
    value=numbers,
    unit=st.sampled_from(["", "µs", "×", "launches"]),
    better=st.sampled_from(["less", "more"]),
    goal=st.none() | numbers,
    tolerance=st.floats(0, 1),
    slack=st.floats(0, 10),
    details=st.dictionaries(st.text(), st.lists(st.integers()), max_size=2),
)


@given(st.lists(figures, max_size=4))
def test_a_run_is_read_back_as_it_was_written(found):
    before = run(host=part(*found))
    assert Run.from_json(before.to_json()) == before
    assert _history.figures_from_json(_history.figures_to_json(found))[1] == found


def test_another_schema_is_refused():
    text = run().to_json()
    data = json.loads(text)
    assert data["schema"] == _history.SCHEMA
    for schema in (data["schema"] + 1, None):
        with pytest.raises(ValueError, match="schema"):
            Run.from_json(json.dumps({**data, "schema": schema}))


def test_history_is_in_order_of_time_and_keeps_every_run(tmp_path):
    runs = [
        run("2026-01-02T12:00:00Z", "aaa"),
        run("2026-01-01T12:00:00Z", "ccc"),
        run("2026-01-02T11:00:00Z", "bbb+"),
    ]
    for one in runs:
        _history.keep(one, tmp_path)
    assert [one.commit for one in _history.history(tmp_path)] == ["ccc", "bbb+", "aaa"]
    assert _history.history(tmp_path / "none") == []


def test_parts_of_one_day_and_commit_come_together(tmp_path):
    _history.keep(run(host=part(time(1.0)), parity=part(time(2.0))), tmp_path)
    _history.keep(run(host=part(time(3.0))), tmp_path)
    (kept,) = _history.history(tmp_path)
    assert kept.parts["host"].figures[0].value == 3.0
    assert kept.parts["parity"].figures[0].value == 2.0


def test_times_of_two_machines_do_not_come_together(tmp_path):
    _history.keep(run(host=part(time(1.0))), tmp_path)
    for later, parts in ((13, "parity"), (14, "sparse")):
        date = f"2026-01-01T{later}:00:00Z"
        other = run(date, machine={**HERE, "cores": 64}, **{parts: part(time(2.0))})
        _history.keep(other, tmp_path)
    found = [[*kept.parts] for kept in _history.history(tmp_path)]
    assert found == [["host"], ["parity", "sparse"]]


@given(before=st.floats(0.01, 1e4), change=st.floats(-0.9, 9))
def test_worse_is_beyond_the_tolerance(before, change):
    after = before * (1 + change)
    (found,) = _history.compare([run(host=part(time(before)))], run(host=part(time(after))))
    beyond = (after - before) - 0.1 * before - 0.3
    if abs(beyond) > 1e-9 * max(before, after):
        assert found.worse == (beyond > 0)


def test_where_more_is_better_less_is_worse():
    def fast(value):
        return part(Figure(name="speed", value=value, unit="×", better="more", tolerance=0.1))

    for value, worse in ((3.0, False), (1.9, False), (1.7, True)):
        (found,) = _history.compare([run(sparse=fast(2.0))], run(sparse=fast(value)))
        assert found.worse is worse


def test_one_more_launch_is_worse():
    def count(value):
        return part(Figure(name="n", value=value, unit="launches"), depends="versions")

    for value, worse in ((99, False), (100, False), (101, True)):
        (found,) = _history.compare([run(launches=count(100))], run(launches=count(value)))
        assert found.judged and found.worse is worse


def test_times_of_another_machine_and_counts_of_other_versions_are_not_judged():
    elsewhere = {**HERE, "processor": "another"}
    before = run(
        machine=elsewhere,
        host=part(time(1.0)),
        launches=part(time(1.0), depends="versions", versions={"torch": "1"}),
    )
    now = run(host=part(time(9.0)), launches=part(time(9.0), depends="versions"))
    changes = _history.compare([before], now)
    assert len(changes) == 2
    assert not any(change.judged or change.worse for change in changes)
    assert all(str(change).endswith("(not judged)") for change in changes)


def test_the_load_of_the_machine_does_not_make_it_another():
    before = run(machine={**HERE, "load": 7.0}, host=part(time(1.0)))
    (found,) = _history.compare([before], run(host=part(time(9.0))))
    assert found.worse


def test_the_last_run_of_the_same_machine_is_the_one_to_compare_with():
    elsewhere = run("2026-01-03", machine={**HERE, "cores": 64}, host=part(time(0.1)))
    older = run("2026-01-01", host=part(time(9.0)))
    newer = run("2026-01-02", host=part(time(1.0)))
    (found,) = _history.compare([older, newer, elsewhere], run(host=part(time(1.1))))
    assert found.judged and not found.worse and found.before.value == 1.0


def test_a_figure_that_is_no_longer_measured_is_worse_and_a_new_one_is_not():
    before = run(host=part(time(1.0)))
    now = run(host=part(replace(time(1.0), name="another call")))
    new, gone = _history.compare([before], now)
    assert new.before is None and not new.worse
    assert gone.now is None and gone.worse and "no longer measured" in str(gone)


def test_a_part_that_no_run_has_is_new():
    (found,) = _history.compare([run(parity=part(time(1.0)))], run(host=part(time(1.0))))
    assert found == Change("host", None, time(1.0), False, False)
    assert str(found) == "host: a call: new → 1.00 µs  (not judged)"


def test_goals_are_shown_with_their_direction():
    text = _history.goals(
        [
            time(1.0, goal=2.0),
            Figure(name="speed", value=1.0, unit="×", better="more", goal=2.0),
            Figure(name="plain", value=0.25),
        ]
    )
    assert text.splitlines()[2:] == [
        "| a call | 1.00 µs | ≤ 2 µs | yes |",
        "| speed | 1.000 × | ≥ 2 × | **no** |",
        "| plain | 0.25 |  |  |",
    ]


def test_the_commit_machine_and_versions_of_this_checkout():
    assert set(HERE) == set(_history.machine())
    assert "torch" in _history.versions()

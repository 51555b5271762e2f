"""Charts and training curves: what is drawn, what is left out, and alarms."""

import json
import re
from xml.etree import ElementTree

import pytest

from dgpo.evaluation.arcap_chart import arcap_section
from dgpo.evaluation.charts import FILE_COLOURS, dot_chart, line_chart, line_file, radar_chart
from dgpo.evaluation.curves import RunCurves, curves_section, read_curves
from dgpo.files import read_jsonl
from tests.conftest import ROOT


def polylines(svg):
    return [path.split() for path in re.findall(r'<polyline points="([^"]*)"', svg)]


def test_a_drawing_in_a_file_needs_no_page():
    names = [f"run {number} < {number + 1}" for number in range(7)]
    text = line_file({name: [(1, 0.1), (2, 0.5)] for name in names}, x_label="step", y_label="EM")
    drawing = ElementTree.fromstring(text)
    assert "var(" not in text
    spaced = {each.tag.partition("}")[2] for each in drawing.iter()}
    assert {"polyline", "text", "style"} <= spaced
    strokes = [each.get("stroke") for each in drawing.iter("{http://www.w3.org/2000/svg}polyline")]
    assert strokes[0] == strokes[6] == "#2f6fde", "the seventh begins again"
    sheet = (ROOT / "dgpo" / "evaluation" / "page" / "style.css").read_text()
    assert " ".join(f"--line-{n}: {colour};" for n, colour in enumerate(FILE_COLOURS, start=1)) in sheet
    assert "var(" not in line_file({"a point": [(1, 0.1)]}, x_label="step", y_label="EM")
    said = [each.text for each in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert said[-7:] == names
    assert {"EM", "step"} <= set(said)


def test_values_that_are_not_finite_are_left_out_of_a_line():
    svg = line_chart({"em": [(1, 0.1), (2, float("nan")), (3, 0.3)]}, x_label="x", y_label="y")
    assert [len(path) for path in polylines(svg)] == [2]
    assert "nan" not in svg
    assert line_chart({"em": [(1, float("inf"))]}, x_label="x", y_label="y") == ""


def test_a_long_line_is_drawn_with_its_moving_average_and_no_finer_than_the_screen():
    svg = line_chart({"em": [(step, 0.5) for step in range(1000)]}, x_label="x", y_label="y")
    paths = polylines(svg)
    assert len(paths) == 2
    assert {len(path) for path in paths} == {250}


def test_a_name_has_one_colour_as_a_line_and_as_points():
    svg = line_chart({"a": [(0, 1), (1, 2)]}, dotted={"a": [(1, 2)], "b": [(1, 1)]}, x_label="x", y_label="y")
    assert svg.count("<i style=") == 2
    assert svg.count('fill="var(--line-1)"') == 1


def test_a_radar_places_a_full_value_on_the_rim_and_leaves_a_missing_one_out():
    svg = radar_chart(["up", "right", "down", "left"], {"m": [1.0, 0.5, None, 0.0]}, title="t")
    shape = re.findall(r'<polygon points="([^"]*)" fill="var', svg)[0].split()
    centre_x, centre_y = 260.0, 165.0
    assert shape == [f"{centre_x},{centre_y - 120}", f"{centre_x + 60},{centre_y}", f"{centre_x},{centre_y}"]


def test_the_rim_of_a_radar_is_the_next_quarter_above_every_value():
    svg = radar_chart(["up", "right", "down", "left"], {"m": [0.35, None, 0.25, 0.0]}, title="t")
    assert "rim: 0.5" in svg
    assert re.findall(r'<polygon points="([^"]*)" fill="var', svg)[0].split()[1] == "260.0,225.0"  # half of 120 below


def test_a_run_keeps_its_colour_in_charts_where_another_has_no_values():
    svg = line_chart({"a": [], "b": [(0, 1), (1, 2)]}, x_label="x", y_label="y")
    assert 'stroke="var(--line-2)"' in svg


def test_a_radar_needs_three_axes_and_a_value_for_each():
    with pytest.raises(ValueError, match="at least three"):
        radar_chart(["a", "b"], {}, title="t")
    with pytest.raises(ValueError, match="2 values for 3 axes"):
        radar_chart(["a", "b", "c"], {"m": [0.1, 0.2]}, title="t")


def run_curves(name="run", alarms=()):
    training = [
        {"step": step, "episode/em": 0.1 * step, "teacher/gate_fraction": 0.9, "teacher/kl_failed": 0.3}
        for step in (1, 2, 3)
    ]
    return RunCurves(name, training, [{"step": 1, "loss": 2.0}], alarms)


def test_metrics_of_one_run_share_a_chart_and_those_of_several_runs_have_one_each():
    assert "<figcaption>Share of episodes</figcaption>" in curves_section([run_curves()])
    several = curves_section([run_curves("dgpo"), run_curves("ppo")])
    assert "<figcaption>Share of episodes: gated (the teacher term applies)</figcaption>" in several
    assert several.count("</i>dgpo") == several.count("</i>ppo") == several.count("<figure>")


def test_alarms_are_listed_with_their_advice_and_marked_in_the_charts():
    alarm = {
        "rule": "kl",
        "metric": "teacher/kl_failed",
        "value": 3.0,
        "threshold": 2.0,
        "step": 2,
        "first_step": 1,
        "advice": "lower <it>",
    }
    section = curves_section([run_curves(alarms=[alarm])])
    assert "<b>kl</b> at step 2: teacher/kl_failed = 3, limit 2, first sign at step 1. lower &lt;it&gt;" in section
    assert '<line class="alarm"' in section
    assert "alarm" not in curves_section([run_curves()])


def test_the_torn_last_line_of_a_run_in_progress_is_left_out(tmp_path):
    path = tmp_path / "train" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text('{"step": 1, "text": "a\u2028b"}\n{"step": 2, "te')
    assert read_jsonl(path, growing=True) == [{"step": 1, "text": "a\u2028b"}]
    assert [record["step"] for record in read_curves(tmp_path, "run").training] == [1]


ARCAP = {
    "hits": "ours",
    "temperature": 0.0,
    "models": {
        "dgpo": {
            "checkpoint": "x",
            "source_referencing": {
                name: {"em": 0.6, "em_ci95": [0.5, 0.7], "num_questions": 9} for name in ("nq", "musique")
            },
            "using_evidence": {"nq": {"em": 0.5, "em_ci95": [0.4, 0.6], "num_questions": 9}},
            "query_rewriting": {"nq": {"hit": 0.7, "hit_ci95": [0.6, 0.8], "num_questions": 9}},
            "when_to_search": {
                "musique": {"hit": 0.4, "hit_ci95": [0.3, 0.5], "num_searches": 2.345, "num_questions": 9}
            },
        },
        "kd": {"checkpoint": "y", "query_rewriting": {"nq": {"hit": 0.2, "hit_ci95": [0.1, 0.3], "num_questions": 9}}},
    },
}


def test_arcap_is_drawn_as_a_radar_beside_a_table_with_the_papers_numbers():
    section = arcap_section(json.loads(json.dumps(ARCAP)), pair="qwen3b_05b")
    assert "single samples at temperature 1" in section
    assert "ours are greedy" in section
    assert section.count('fill-opacity=".1"') == 2
    assert (
        '0.600 <small>/</small> <small class="paper">0.565</small><small class="under">[0.50, 0.70]</small>' in section
    )
    assert "<td>2.35</td>" in section or "<td>2.34</td>" in section
    assert "source referencing, musique" in section


def test_arcap_of_other_models_shows_no_number_of_the_paper():
    assert "paper" not in arcap_section(ARCAP, pair=None)


def test_a_row_of_points_has_its_bar_and_an_interval_between_its_ends():
    svg = dot_chart(
        {"first": {"em": [0.2, 0.4], "f1": [0.5]}, "second": {"em": [0.1], "f1": [0.3]}},
        x_label="x",
        intervals={"first": {"f1": (0.4, 1.0)}},
    )
    x_of = {float(tick): float(x) for x, tick in re.findall(r'<text x="([\d.]+)"[^>]*>([\d.]+)</text>', svg)}
    assert (min(x_of), max(x_of)) == (0.0, 1.0), "the axis holds the interval's end"
    scale = x_of[1.0] - x_of[0.0]
    bars = [(float(x) + 1.5 - x_of[0.0]) / scale for x in re.findall(r'<rect x="([\d.]+)"', svg)]
    assert bars == pytest.approx([0.3, 0.5, 0.1, 0.3], abs=1e-3)
    intervals = re.findall(rf'<line x1="([\d.]+)" x2="([\d.]+)"[^>]*stroke="{FILE_COLOURS[1]}"', svg)
    assert [(float(end) - x_of[0.0]) / scale for end in intervals[0]] == pytest.approx([0.4, 1.0], abs=1e-3)
    assert len(intervals) == 1

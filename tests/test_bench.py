"""The table and the plots of a benchmark's result file."""

from __future__ import annotations

import importlib.util
import json

import pytest

from metafast import bench
from metafast.__main__ import main


def entry(group, comparisons, plot=None, what="metafast"):
    info = {"what": what, "comparisons": comparisons, **({"plot": plot} if plot else {})}
    return {"group": group, "stats": {"median": 0.5}, "extra_info": info}


def compared(ratio, bar=None, of="time", peer="math"):
    return {"of": of, "with": peer, "own": 0.01, "other": 0.01 * ratio, "ratio": ratio, "bar": bar}


def place(x, y="cost"):
    return {"figure": "attention", "panel": "second", "x": x, "xlabel": "length", "y": y}


RESULTS = {
    "benchmarks": [
        entry("attention 512", [compared(3.0, 2.5)], place(512)),
        entry("attention 1024", [compared(2.0, 2.5)], place(1024)),
        entry(
            "meta step",
            [compared(1.5, peer="higher"), compared(1.2, peer="loop")],
            {**place("S", "ratio"), "figure": "meta"},
        ),
        entry("alone", []),
    ]
}


def test_a_line_a_comparison():
    lines = bench.table(RESULTS)
    assert len(lines) == 1 + 5
    assert "500.00 ms" in lines[1]
    assert [line.split()[-1] for line in lines if line.startswith("attention 1024")] == ["missed"]
    (met,) = (line for line in lines if line.startswith("attention 512"))
    assert met.split()[2:] == ["metafast", "10.00", "ms", "math", "30.00", "ms", "3.00x", "2.50"]


def test_figures_collect_lines_by_peer():
    found = bench.figures(RESULTS)
    assert found["attention"]["second"].lines == {
        "metafast": {512: 10, 1024: 10},
        "math": {512: pytest.approx(30), 1024: pytest.approx(20)},
    }
    assert found["meta"]["second"].lines == {"higher": {"S": 1.5}, "loop": {"S": 1.2}}


def test_a_result_file_is_reported_again(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "result.json"
    path.write_text(json.dumps(RESULTS))
    assert main(["bench", "--from", str(path)]) == 0
    assert "missed" in capsys.readouterr().out
    assert {plot.name for plot in tmp_path.glob("*.png")} == {"result-attention.png", "result-meta.png"}


def test_without_matplotlib_the_table_remains(tmp_path, capsys, monkeypatch):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(RESULTS))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "--from", str(path)]) == 0
    assert "install metafast[bench]" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.png"))


def test_what_is_not_a_result_file_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="expected a result file"):
        main(["bench", "--from", str(tmp_path / "none.json")])
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"expected a result file .* without a list of benchmarks"):
        main(["bench", "--from", str(tmp_path / "empty.json")])


def test_an_unknown_suite_is_refused():
    with pytest.raises(SystemExit, match=r"expected one of .*attention.*got 'nothing'"):
        main(["bench", "nothing"])

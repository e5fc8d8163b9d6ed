"""Points of plots: dvc.yaml and the stages agree, and DVC draws them without a word and without a network."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dllm.stages.plots import PLOTS, training_points, write_plots
from tests.arch.source_tree import ROOT
from tests.patience import LONGEST_S

POINTS = {
    "train": {"loss": [(5, 2.5, "training"), (10, 2.0, "training"), (10, 2.1, "held-out")]},
    "evaluate": {"acceptance": [(1, 0.5, "with all before it"), (2, None, "with all before it")]},
}


def test_dvc_yaml_names_every_plot_with_its_columns() -> None:
    named = {}
    for entry in yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"]:
        if isinstance(entry, dict):
            [(path, about)] = entry.items()
            assert (ROOT / ".dvc" / "plots" / f"{about['template']}.json").is_file()
            assert about["title"] and about["x_label"] and about["y_label"]
            named[path] = (about["x"], about["y"])
    assert named == {
        f"out/{stage}/plots/{name}.csv": columns for stage, plots in PLOTS.items() for name, columns in plots.items()
    }


def test_every_file_is_there_and_only_points_with_a_value(tmp_path: Path) -> None:
    files = write_plots("evaluate", tmp_path / "plots", POINTS["evaluate"])
    assert list(files) == [f"plots/{name}.csv" for name in PLOTS["evaluate"]]
    read = {path.stem: list(csv.reader(path.open())) for path in files.values()}
    assert read["acceptance"] == [["offset", "accepted", "series"], ["1", "0.5", "with all before it"]]
    assert read["throughput"] == [["draft_tokens", "tokens_per_s", "series"]]
    with pytest.raises(KeyError, match="loss"):
        write_plots("evaluate", tmp_path, {"loss": []})


def test_a_step_that_is_validated_twice_is_one_point() -> None:
    records = [{"step": 5, "loss": 2.0}, {"step": 5, "val_loss": 3.0}, {"step": 5, "val_loss": 3.0}]
    assert training_points(records, {"loss": "loss"}) == {"loss": [(5, 2.0, "training"), (5, 3.0, "held-out")]}


@pytest.mark.slow
def test_dvc_draws_them_from_files_alone(tmp_path: Path) -> None:
    shutil.copytree(ROOT / ".dvc" / "plots", tmp_path / ".dvc" / "plots")
    for name in ("dvc.yaml", "params.yaml", ".dvc/config", ".dvc/page.html", ".gitignore"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    for stage, points in POINTS.items():
        (tmp_path / "out" / stage).mkdir(parents=True)
        write_plots(stage, tmp_path / "out" / stage / "plots", points)
    shutil.copyfile(ROOT / "docs" / "acceptance.png", tmp_path / "out" / "evaluate" / "evaluation.png")
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
    command = [sys.executable, "-m", "dvc", "plots", "show"]
    shown = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LONGEST_S)
    assert (shown.returncode, shown.stderr) == (0, "")
    page = (tmp_path / "dvc_plots" / "index.html").read_text()
    assert '"loss": "2.5"' in page and "Draft tokens accepted, by offset in the block" in page
    assert "DVC_METRIC" not in page, "an anchor of a template was not filled"
    assert page.index("../.dvc/vega.js") < page.index("cdn.")
    assert page.count("<script src=") == 2, "the bundle, and in its absence the same libraries from elsewhere"

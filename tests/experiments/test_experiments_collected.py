"""Collected results, the tables that they give, and the tables of the pages compared with them to the last digit."""

from __future__ import annotations

import csv
import json
import re
import shutil
import statistics
from pathlib import Path

import pytest
from house import ROOT
from small_sweeps import ROWS, write_sweep

from priorclip.__main__ import main
from priorclip.experiments.collected import collect, named_tables, read_collected
from priorclip.experiments.page_tables import BEGINNING, COMMENT, problems

RESULTS = sorted(path for path in (ROOT / "docs" / "results").glob("*.csv") if ".intervals" not in path.name)
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def two_sweeps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweeps")
    for name in ("first", "second"):
        write_sweep(folder / name, name)
    collect([folder / "first", folder / "second"], folder / "results.csv")
    return folder


@pytest.fixture
def results(two_sweeps: Path, tmp_path: Path) -> Path:
    """The folder of a made-up page: results.csv with the tables ``first`` and ``second``, and their runs."""
    return shutil.copytree(two_sweeps, tmp_path, dirs_exist_ok=True)


def page_of(results: Path, name: str = "first") -> str:
    lines = named_tables(str(results / "results.csv"), [name], None)
    return "\n".join(["# A page", "", *lines, "text"]).replace(str(results / "results.csv"), "results.csv")


def test_a_line_says_what_its_report_says(results: Path) -> None:
    lines = list(csv.DictReader((results / "results.csv").open()))
    assert [(line["table"], line["row"], line["seed"]) for line in lines] == [
        (table, row, str(seed)) for table in ("first", "second") for row in ROWS for seed in range(3)
    ]
    for line in lines:
        run = results / line["table"] / line["row"] / f"seed-{line['seed']}" / "closed"
        for figure, value in json.loads((run / "report.json").read_text())["test"].items():
            assert float(line[figure]) == pytest.approx(value, abs=1e-6)
    assert (lines[1]["validation_mean_recall"], lines[1]["epoch"], lines[1]["seconds"]) == ("22.500000", "3.00", "50")
    assert lines[1]["accuracy"] == ""


def test_the_printed_table_has_the_cells_of_the_sweeps_table(results: Path) -> None:
    """Without the column of published figures, which stands in experiments/rows."""
    sweeps = [line for line in (results / "first" / "first.md").read_text().splitlines() if line.startswith("|")]
    printed = [line for line in page_of(results).splitlines() if line.startswith("|")]
    assert len(printed) == len(sweeps) == 5
    for ours, theirs in zip(printed[2:], sweeps[2:], strict=True):
        assert theirs.startswith(ours.removesuffix("|")), "mean, spread, interval, difference, seeds"
    assert re.search(r"\+\d+\.\d ± \d\.\d \[\d+\.\d, \d+\.\d\]", printed[3])


def test_any_row_can_be_subtracted(results: Path) -> None:
    table = read_collected(results / "results.csv")["first"]
    of = {row: [runs[seed]["mean_recall"] for seed in range(3)] for row, runs in table.results.items()}
    pairs = [one - other for one, other in zip(of["closed-baseline"], of["closed-soft"], strict=True)]
    low, high = table.intervals["closed-baseline", "closed-soft"]
    wanted = f"{statistics.mean(pairs):+.1f} ± {statistics.stdev(pairs):.1f} [{low:.1f}, {high:.1f}]"
    lines = table.markdown(["closed-soft"])
    assert f"less {table.labels['closed-soft']}" in lines[0]
    assert lines[2].split("|")[-3].strip() == wanted
    assert lines[4].split("|")[-3].strip() == "", "a row is not compared with itself"
    with pytest.raises(ValueError, match="table 'first' has no row 'closed-sofd'"):
        table.markdown(["closed-sofd"])


def test_a_row_with_its_own_test_is_not_compared(results: Path) -> None:
    text = (results / "results.csv").read_text().splitlines()
    at = text[0].split(",").index("test")
    lines = [line.split(",") for line in text]
    for line in lines:
        line[at] = "{other_test}" if line[1] == "closed-soft" else line[at]
    (results / "results.csv").write_text("\n".join(",".join(line) for line in lines) + "\n")
    table = read_collected(results / "results.csv")["first"]
    assert table.difference("closed-soft", "closed-baseline") == ""
    assert table.difference("closed-full", "closed-baseline") != ""


def test_the_commands(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = results / "docs" / "both.csv"
    assert main(["collect", str(results / "first"), str(results / "second"), "--output", str(output)]) == 0
    assert output.read_text() == (results / "results.csv").read_text()
    assert "first, second" in capsys.readouterr().out
    assert main(["tables", str(output), "--names", "[second]"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"<!-- table: {output} second -->\n| | mean recall |")
    assert main(["tables", str(output), "--names", "[third]"]) == 2
    assert "has no table 'third'; its tables are first, second" in capsys.readouterr().err
    assert main(["collect", str(results / "first"), str(results / "first"), "--output", str(output)]) == 2
    assert "two tables 'first'" in capsys.readouterr().err


def test_a_table_that_is_not_that_of_its_runs_is_refused(results: Path) -> None:
    report = results / "first" / "closed-full" / "seed-1" / "closed" / "report.json"
    content = json.loads(report.read_text())
    content["test"]["mean_recall"] += 1
    report.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="closed-full is not the figure of its run with seed 1"):
        collect([results / "first"], results / "again.csv")
    assert not (results / "again.csv").exists()
    with pytest.raises(ValueError, match="has no table of a family"):
        collect([results / "first" / "closed-full"], results / "again.csv")


def test_a_right_page_has_no_problem(results: Path) -> None:
    page = page_of(results) + "\n" + page_of(results, "second")
    assert problems("p.md", page, results) == []
    cut = [line.rsplit("|", 3)[0] + "|" for line in page_of(results).splitlines() if line.startswith("|")]
    bold = [re.sub(r"\| ([^|]+) \|$", r"| **\1** |", line) for line in cut[2:]]
    page = "\n".join(["<!-- table: results.csv first -->", *cut[:2], *bold[::-1]])
    assert "**" in page
    assert problems("p.md", page, results) == [], "fewer columns, another order and bold cells are allowed"


def changed_digits(page: str) -> list[str]:
    """Returns the page with each digit of its figures changed, one at a time."""
    start = page.index("|---")
    places = [place for place, sign in enumerate(page) if sign.isdigit() and place > start]
    return [page[:place] + str((int(page[place]) + 1) % 10) + page[place + 1 :] for place in places]


def test_each_wrong_digit_is_found(results: Path) -> None:
    page = page_of(results)
    wrong = changed_digits(page)
    assert len(wrong) > 100
    for text in wrong:
        assert len(problems("p.md", text, results)) == 1
    signs = page.replace("| +", "| -", 1)
    assert signs != page
    assert "should be '+" in problems("p.md", signs, results)[0]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("results.csv first", "none.csv first", "No such file"),
        ("results.csv first", "results.csv third", "no such table; its tables are first, second"),
        ("results.csv first -->", "results.csv -->", "not a table's name"),
        ("<!-- table:", "<!-- table", "not a table's name"),
        ("| | mean recall", "\n\n| | mean recall", "no table with a row follows"),
        ("| mean recall", "| best recall", "unknown column 'best recall'"),
        ("\n| PriorITR", "\n| PriorITS", "0 rows have the label"),
        ("| 3 |", "| 3 | 4 |", "has 8 cells for 7 columns"),
    ],
)
def test_a_page_that_names_something_else_is_wrong(results: Path, old: str, new: str, problem: str) -> None:
    page = page_of(results)
    assert old in page, page
    found = problems("p.md", page.replace(old, new), results)
    assert found
    assert all(each.startswith("p.md: ") for each in found)
    assert problem in found[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_of_the_pages_are_those_of_the_results(page: Path) -> None:
    assert problems(page.name, page.read_text(), ROOT) == []


def test_the_results_are_shown_on_a_page() -> None:
    """So that the comparison above compares each results file of docs/results."""
    lines = [line.strip() for page in PAGES for line in page.read_text().splitlines() if BEGINNING.search(line)]
    named = {match["file"] for match in map(COMMENT.match, lines) if match}
    assert {str(path.relative_to(ROOT)) for path in RESULTS} <= named

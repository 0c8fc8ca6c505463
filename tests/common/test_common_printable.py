"""No escape sequence of others reaches a terminal or a log, and no module prints in another way."""

from __future__ import annotations

import ast
import io
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from priorclip.common.output import SafeFormatter, get_logger, print_failure, print_warning, say, set_up_logging
from priorclip.common.printable import figure_text, one_line, one_line_values, printable

ROOT = Path(__file__).parents[2]
PACKAGES = "common model data_shards training cluster pretrain finetune experiments retrieval demo".split()  # noqa: SIM905
EVIL = "\x1b]0;pwned\x07\x9b31m\u202e\u200b\udc80\r"
# The guardian has the standard library only. The others print what another program reads: a script for sbatch, a
# command to copy, lines of JSON between our processes.
PRINTING = {
    "common/output.py", "cluster/check/host_probe.py", "cluster/check/hosts.py", "cluster/check/rank_rates.py",
    "cluster/launch/sbatch.py", "cluster/launch/start_run.py", "training/ranks/guardian.py",
}  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60))
def test_only_lines_tabs_and_visible_letters_are_left(text: str) -> None:
    shown = printable(text)
    assert all(letter in "\n\t" or letter.isprintable() or letter.isspace() for letter in shown)
    assert not set(shown) & set("\x1b\x9b\x85\u2028\u202e\r\x0b\x0c\x1c")
    assert printable(shown) == shown
    assert "\n" not in one_line(text)


def test_readable_text_stays() -> None:
    text = "a river, 长江, реки\u00a0и Ålesund\n\tsecond line"
    assert printable(text) == text
    assert printable(EVIL) == "\\x1b]0;pwned\\x07\\x9b31m\\u202e\\u200b\\udc80\\r"
    assert one_line_values({EVIL: [EVIL, 1, {"a": "b\nc"}]}) == {one_line(EVIL): [one_line(EVIL), 1, {"a": "b c"}]}


def evil_record(logger: logging.Logger) -> None:
    try:
        raise OSError(f"{EVIL} https://me:hunter2@host")
    except OSError:
        logger.exception("bad %s in %s\nERROR forged", EVIL, "https://me:hunter2@host")


@pytest.mark.parametrize("ours", [True, False])
def test_a_record_is_safe_in_a_foreign_handler_and_of_a_foreign_library(ours: bool) -> None:
    """Our records are safe for any handler, and our formatter makes any record safe."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    if not ours:
        handler.setFormatter(SafeFormatter("%(levelname)s %(message)s"))
    logger = get_logger("priorclip.test") if ours else logging.getLogger("foreign.test")
    logger.addHandler(handler)
    evil_record(logger)
    logger.removeHandler(handler)
    text = stream.getvalue()
    assert "Traceback" in text
    assert printable(text) == text
    assert "hunter2" not in text
    assert not any(line.startswith("ERROR forged") for line in text.splitlines())


def test_what_a_command_prints_and_an_uncaught_error_are_safe(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"{EVIL} https://me:hunter2@host\nsecond")
    try:
        raise RuntimeError(EVIL)
    except RuntimeError:
        print_failure(*sys.exc_info())  # type: ignore[arg-type]
    shown = capsys.readouterr()
    assert shown.out.endswith("https://***@host\nsecond\n")
    assert "RuntimeError: \\x1b]0" in shown.err
    assert printable(shown.out + shown.err) == shown.out + shown.err


def calls(text: str) -> list[str]:
    """Returns the calls in a module that print or log, as text."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    named = [(node, getattr(node.func, "id", getattr(node.func, "attr", ""))) for node in nodes]
    return [ast.unparse(node) for node, name in named if name in ("print", "basicConfig", "getLogger")]


def test_no_module_prints_or_logs_in_another_way() -> None:
    """A bare print() or logger would bring untrusted text to the terminal again."""
    found = []
    for path in (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))):
        name = str(path.relative_to(ROOT))
        for call in calls(path.read_text()):
            bare_print = call.startswith("print(") and name not in PRINTING
            bare_log = call == "logging.getLogger(__name__)" or "basicConfig(" in call[:25]
            if bare_print or (bare_log and name != "common/output.py"):
                found.append(f"{name}: {call}")
    assert found == []


def test_warnings_of_python_are_safe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(warnings, "showwarning", None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    set_up_logging("%(message)s", handler=logging.NullHandler())
    assert warnings.showwarning is print_warning
    print_warning(UserWarning(f"Glyph 27 ({EVIL}) missing"), UserWarning, "a.py", 3)
    said = capsys.readouterr().err
    assert "a.py:3: UserWarning: Glyph 27 (\\x1b]0;pwned" in said
    assert not set(said) & set(EVIL) - set(printable(EVIL))


FORMULA = r"a $\frac{ $ pond"


def draw_stats(name: str, path: Path) -> None:
    from matplotlib.figure import Figure

    from priorclip.data_shards.inspect.stats_page import draw_bars

    figure = Figure()
    draw_bars(figure.subplots(), {name: 3}, "classes")
    figure.savefig(path)


def draw_confusion(name: str, path: Path) -> None:
    import torch

    from priorclip.finetune.confusion_matrix import draw

    draw(torch.ones(2, 2, dtype=torch.int64), [name, "pond"], path)


def draw_robustness(name: str, path: Path) -> None:
    from priorclip.retrieval.robustness import draw_plot

    cell = {"model": name, "corruption": "none", "severity": 0, "mean_recall": 20.0}
    draw_plot({"cells": [cell]}, path)


@pytest.mark.filterwarnings("ignore:Glyph", "error:constrained_layout")
@pytest.mark.parametrize("name", [FORMULA, EVIL, "$" * 3, "\ud800", "x" * 10_000])
@pytest.mark.parametrize("draw", [draw_stats, draw_confusion, draw_robustness])
def test_a_name_in_a_figure_is_no_formula(draw: Callable[[str, Path], None], name: str, tmp_path: Path) -> None:
    """matplotlib ends with an error for half a formula, and for half of a surrogate pair."""
    draw(name, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert len(figure_text(name, 80)) <= 160

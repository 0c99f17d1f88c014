"""The page about a training run: every curve, without network, nothing unescaped."""

import html.parser
import math
import re
import sys

import pytest

from modernalbert.training.reports import curves as report
from modernalbert.training.reports.curves import write_report
from modernalbert.training.reports.html import INK
from modernalbert.training.reports.tables import html_table, markdown_table, text_table


def training_log(steps=range(10, 60, 10)):
    log = []
    for step in steps:
        losses = {"loss": 9 / step, "mlm_loss": 5 / step, "kl_loss": 1 / step, "hidden_loss": 0.1, "aux_loss": 1.0}
        speed = {"learning_rate": 1e-3, "grad_norm": 0.5, "tokens": 2048 * step, "tokens_per_second": 9e3, "mfu": 0.41}
        loads = {f"expert_load/group_{group}/expert_{expert}": 0.25 for group in (4, 5) for expert in range(4)}
        entropies = {f"router_entropy/group_{group}": 0.9 for group in (4, 5)}
        log.append({"step": step, "epoch": 0.1, **losses, **speed, **loads, **entropies})
    return [*log, {"step": log[-1]["step"], "eval_loss": 3.25, "eval_runtime": 1.0}]


class Text(html.parser.HTMLParser):
    """Collects the texts of a page by the element they are in."""

    def __init__(self, page):
        super().__init__()
        self.open, self.texts = [], {}
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())


def read_report(folder, log, title="A run", facts=None):
    write_report(folder / "report.html", log, title, facts or {})
    return (folder / "report.html").read_text()


def rows_of(page):
    return dict(re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td>", page))


def test_report_shows_every_curve(tmp_path):
    log = training_log()
    page = read_report(tmp_path, log, facts={"seed": "7"})
    text = Text(page).texts
    titles = {
        "losses",
        "balancing loss, 1 = even",
        "learning rate",
        "tokens per second, MFU 41.0% (median)",
        "gradient norm",
    }
    titles |= {"router entropy, 1 = uniform", "expert load, group_4", "expert load, group_5"}
    assert titles <= set(text["text"])
    assert {"loss", "mlm_loss", "kl_loss", "hidden_loss", "eval_loss", "even"} <= set(text["text"])
    assert text["text"].count("expert_3") == 2 and text["text"].count("group_5") == 1
    assert text["h1"] == ["A run"]
    rows = rows_of(page)
    assert rows["seed"] == "7" and rows["eval_loss"] == "3.25" and rows["tokens"] == str(2048 * 50)
    assert {name for entry in log for name in entry} - {"step", "epoch"} <= set(rows)


def test_report_needs_no_network(tmp_path):
    page = read_report(tmp_path, training_log())
    assert re.sub(r'xmlns(:\w+)?="[^"]*"', "", page).count("http") == 0
    assert not re.search(r"<(script|link|img|image)\b|@import|base64|\bsrc=", page)
    assert set(re.findall(r'href="(.)', page)) == {"#"}


def test_report_follows_the_color_of_the_page(tmp_path):
    page = read_report(tmp_path, training_log())
    assert "currentColor" in page and INK not in page
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_panels_without_data_are_left_out(tmp_path):
    page = read_report(tmp_path, [{"step": 1, "loss": 2.0}, {"loss": 1.0}, {"step": 2, "tflops": 3.0, "note": "text"}])
    titles = Text(page).texts["text"]
    assert "losses" in titles and not any("expert" in title or "tokens" in title for title in titles)
    assert "Nothing was logged yet" in read_report(tmp_path, [])


def test_report_survives_what_is_not_finite(tmp_path):
    log = [{"step": step, "loss": value} for step, value in enumerate((2.0, math.nan, math.inf, -math.inf, 1.5))]
    log += [{"step": 9, "grad_norm": math.nan, "mfu": math.nan, "tokens_per_second": 5}]
    page = read_report(tmp_path, log)
    assert rows_of(page)["loss"] == "1.5" and rows_of(page)["grad_norm"] == "not finite"
    assert "tokens per second" in Text(page).texts["text"]
    assert not re.search(r"\b(nan|inf|infinity)\b", page, re.IGNORECASE)


def test_a_resumed_run_counts_once():
    log = [{"step": step, "loss": 1.0} for step in (1, 2, 3)] + [{"step": step, "loss": 5.0} for step in (2, 3, 4)]
    assert report.read_curves(log) == {"loss": ((1, 2, 3, 4), (1.0, 5.0, 5.0, 5.0))}


def test_long_runs_make_small_reports(tmp_path):
    page = read_report(tmp_path, training_log(range(1, 5001)))
    assert len(page) < 1_000_000
    steps, values = report.thin((range(1, 5001), range(1, 5001)))
    assert len(steps) <= report.MAX_POINTS and steps == values and sum(steps) / len(steps) == 2500.5


def test_report_escapes(tmp_path):
    log = [{"step": 1, "eval_<b>$x_1$_loss": 1.0, "loss": 1.0}]
    page = read_report(tmp_path, log, "<script>alert()</script>", {"<i>": "a & <b>"})
    assert "<script" not in page and "<i>" not in page and "<b>" not in page
    assert rows_of(page)["&lt;i&gt;"] == "a &amp; &lt;b&gt;"
    assert "eval_<b>$x_1$_loss" in Text(page).texts["text"]


def test_a_failed_report_leaves_the_old_one(tmp_path, monkeypatch):
    page = read_report(tmp_path, training_log())

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        read_report(tmp_path, [])
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == page


def test_the_balancing_loss_has_a_panel_of_its_own():
    panels = report.select_panels(report.read_curves(training_log()))
    assert set(panels["losses"]) == {"loss", "mlm_loss", "kl_loss", "hidden_loss", "eval_loss"}
    assert set(panels["balancing loss, 1 = even"]) == {"aux_loss"}


def test_tables_escape_their_cells():
    rows = [("<b>|", "a\nb"), ("*c*", 1)]
    assert html_table(rows).count("<td>") == 2 and "<b>" not in html_table(rows)
    lines = markdown_table(("x", "y"), rows).splitlines()
    assert lines == ["| x | y |", "|---|---|", "| &lt;b&gt;\\| | a b |", "| \\*c\\* | 1 |"]
    assert text_table([("a", "b"), ("cc", 1)], width=3) == "  a  b\n cc  1"

"""`plait report`: what the page holds, that it needs nothing else, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from written import PLAN, write_plan, write_run

from plait.cli.main import run
from plait.report.sources import read_report

VOID = {"meta", "br", "hr", "img", "input", "link", "path", "use", "rect"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; complains where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def made(*words: str) -> Page:
    assert run(["report", *words]) == 0
    path = words[words.index("-o") + 1] if "-o" in words else str(Path(words[0]) / "report.html")
    return Page(Path(path).read_text(encoding="utf-8"))


def check_alone(page: Page) -> None:
    """No script, nothing from elsewhere, no name twice."""
    names = [value for _, attributes in page.tags if (value := attributes.get("id"))]
    assert len(names) == len(set(names))
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "img", "image", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src", "xlink:href"):
                assert str(value).startswith("#"), (tag, value)
                assert str(value)[1:] in names
            assert "url(" not in str(value) or re.search(r"url\(#", str(value)), value
    style = [attributes for tag, attributes in page.tags if attributes.get("http-equiv") == "Content-Security-Policy"]
    assert style
    assert "default-src 'none'" in str(style[0]["content"])


def test_a_run_with_its_prediction(here: Path):
    """All charts, figures beside each other, plan, machine and versions."""
    page = made(str(write_run(here / "runs" / "one")))

    check_alone(page)
    for words in ("Loss", "Speed", "Where a step's time goes", "Memory", "The schedule", "Predicted beside measured",
                  "-20 %", "torch 2.13", "dp=2,pp=2,microbatches=2", "Machine and versions", "a note"):  # fmt: skip
        assert words in page.text, words
    assert sum(tag == "svg" for tag, _ in page.tags) == 10


def test_a_run_without_a_prediction(here: Path, capsys):
    """One that was stopped, under a plan written by hand: what there is."""
    folder = write_run(here / "stopped", whole=False)
    assert run(["report", str(folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)

    assert result["charts"] == ["Loss", "Speed"]
    assert result["facts"]["steps"] == 20
    assert "it left no summary" in result["notes"][0]
    check_alone(Page((folder / "report.html").read_text(encoding="utf-8")))


def test_a_plan_file(here: Path):
    """Estimate, schedule, memory, those behind it and the front; beside the file by default."""
    write_plan(here / "plan.yaml")
    assert run(["report", "plan.yaml"]) == 0
    page = Page(Path("plan-report.html").read_text(encoding="utf-8"))

    check_alone(page)
    for words in (
        "A step in figures",
        "The plan and those behind it",
        "dp=4 *",
        "$2.00",
        "binds: arithmetic",
        "The schedule",
    ):
        assert words in page.text, words


def test_a_bare_plan_file(here: Path):
    """A plan that somebody wrote by hand has a page, too."""
    Path("plan.yaml").write_text("dp: 2\npp: 2\n", encoding="utf-8")
    page = made("plan.yaml", "-o", "out/it.html")

    assert "`plait plan -o` writes its estimate beside it" in page.text
    assert "4 devices" in page.text


ODD = '<script>alert(1)</script> "$\\frac{a}$" \' onload=x & é'


def test_texts_stay_texts(here: Path):
    """Whatever names, targets, plans and notes hold."""
    folder = write_run(here / ODD.replace("/", "_"), target=ODD)
    record = json.loads((folder / "run.json").read_text())
    record["machine"] = {ODD: ODD}
    (folder / "run.json").write_text(json.dumps(record))
    summary = json.loads((folder / "summary.json").read_text())
    summary["estimate"]["notes"] = [ODD]
    summary["estimate"]["timeline"][0]["kind"] = ODD
    (folder / "summary.json").write_text(json.dumps(summary))
    page = made(str(folder))

    check_alone(page)
    assert page.text.count("<script>alert(1)</script>") >= 4
    plan = write_plan(here / "plan.yaml", target=ODD)
    plan.write_text(plan.read_text().replace("spec: dp=4", "spec: '<img src=x onerror=alert(1)> $x'"))
    page = made("plan.yaml", "-o", "plan.html")
    check_alone(page)
    assert "<img src=x onerror=alert(1)> $x *" in page.text


def test_a_resumed_run_counts_the_last_time(here: Path):
    """Steps that were done again, and a line that was cut off; what is no number leaves a gap."""
    folder = write_run(here / "r", lines=3)
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"step": 2, "loss": 9.0}\n{"step": 4, "loss": NaN}\n{"step": 5, "lo')
    report = read_report(folder)

    assert report.losses == [(1, 3.0), (2, 9.0), (3, 1.0)]
    assert report.evaluations == [(3, 0.5)]
    assert report.notes[:2] == [
        "the loss of step 4 is not a finite number", "1 of 7 lines of the log cannot be read and are left out",
    ]  # fmt: skip


def test_what_verify_said_is_shown(here: Path):
    """The newest certificate of the same target and plan, however many microbatches; no other."""
    folder = write_run(here / "runs" / "one")
    place = here / "runs" / "certificates"
    place.mkdir()
    right = {"model": "tiny.py:job", "plan": {**PLAN.to_dict(), "microbatches": 4}, "ok": True, "max_loss_diff": 1e-7}
    for number, changes in enumerate(({"date": "2026-01-01", "ok": False}, {"date": "2026-02-01"}, {"model": "b.py:job", "date": "2027"}, {"plan": {"dp": 4}, "date": "2027"})):  # fmt: skip
        (place / f"{number}.json").write_text(json.dumps({**right, **changes}))
    page = made(str(folder))

    assert "Parity holds" in page.text.replace(" .", ".")
    assert "1.00e-07" in page.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: None, "no such run directory or plan file"),
        (lambda f: f.mkdir(), "is not a run directory: it has no log.jsonl"),
        (lambda f: f.write_text("nonsense: ["), "plan file"),
        (lambda f: f.write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff"), "plan file"),
        (lambda f: (f.mkdir(), (f / "log.jsonl").write_text("hello\nworld\n")), "no line of it is a step of a run"),
        (lambda f: (f.mkdir(), (f / "log.jsonl").write_text("[1]\n")), "no line of it is a step of a run"),
        (lambda f: (write_run(f), (f / "summary.json").write_text("{")), "summary.json"),
        (lambda f: (write_run(f), (f / "run.json").write_text("[]")), "holds no JSON object"),
    ],
)
def test_what_is_no_run_and_no_plan(here: Path, capsys, make, message: str):
    """Status 2, a short message, no page."""
    make(here / "it")

    assert run(["report", "it", "-o", "page.html"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err
    assert not Path("page.html").exists()


@pytest.mark.parametrize("value", ["text", [1], {"a": {}}, None, -5, 1e400, True])
def test_foreign_values_are_left_out(here: Path, value):
    """Fields of the wrong kind, in every file: no figure is made of them, and nothing breaks."""
    folder = write_run(here / "r")
    summary = json.loads((folder / "summary.json").read_text())
    for place in (summary, summary["measured"], summary["estimate"], summary["estimate"]["breakdown"],
                  summary["estimate"]["memory"][0], summary["estimate"]["timeline"][0]):  # fmt: skip
        for name in place:
            if name not in ("measured", "estimate", "breakdown", "memory", "timeline"):
                place[name] = value
    (folder / "summary.json").write_text(json.dumps(summary))

    check_alone(made(str(folder)))


def test_a_page_that_cannot_be_written(here: Path, capsys):
    """The folder's place is taken by a file."""
    write_plan(here / "plan.yaml")

    assert run(["report", "plan.yaml", "-o", "plan.yaml/page.html"]) == 2
    assert "error: report: plan.yaml/page.html" in capsys.readouterr().err


def test_without_matplotlib(here: Path, capsys, monkeypatch):
    """The extra that brings it."""
    write_plan(here / "plan.yaml")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)

    assert run(["report", "plan.yaml"]) == 2
    assert "pip install 'plait[report]'" in capsys.readouterr().err


def browser() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="needs a Chromium (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [1280, 520])
def test_a_browser_shows_it(here: Path, width: int):
    """Nothing is asked of the network, nothing is wider than the window, the form that fits it is drawn."""
    made(str(write_run(here / "r")), "-o", "page.html")
    # A frame of that width measures the page: with a policy against scripts it cannot measure itself.
    text = Path("page.html").read_text(encoding="utf-8")
    probe = (
        "<script>addEventListener('load', () => { const d = document.documentElement; document.title = JSON.stringify({"
        "wide: d.scrollWidth, window: innerWidth, asked: performance.getEntriesByType('resource').length,"
        "shown: [...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width > 200).length,"
        "all: document.querySelectorAll('svg').length}); });</script>"
    )
    Path("probe.html").write_text(re.sub(r"<meta http-equiv[^>]*>", "", text).replace("</head>", probe + "</head>"))
    common = [str(browser()), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={here}/profile",
              f"--window-size={width},1000"]  # fmt: skip
    dumped = subprocess.run(
        [*common, "--dump-dom", f"file://{here}/probe.html"], capture_output=True, text=True, timeout=100, check=True
    ).stdout
    found = json.loads(re.search(r"<title>(.*?)</title>", dumped, re.DOTALL)[1])
    subprocess.run(
        [*common, f"--screenshot={here}/shot.png", f"file://{here}/page.html"],
        capture_output=True,
        timeout=100,
        check=True,
    )
    shot = Path("shot.png").read_bytes()

    assert found["asked"] == 0
    assert found["wide"] <= found["window"]
    assert (found["shown"], found["all"]) == (5, 10)
    assert struct.unpack(">2I", shot[16:24]) == (width, 1000)

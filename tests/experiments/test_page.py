"""Laws of the page: it is whole, opens offline, and fits its window."""

import json
import os
import re
import shutil
import subprocess
import sys
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest
from drills import rig
from sweeps import keep_account, simulated_sweep, tiny_metrics, tiny_sweep, write_run, write_sweep

from conftest import HANG_SECONDS
from experiments import report


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A report with every picture, two seeds and an arm without experts."""
    directory = simulated_sweep(tmp_path_factory.mktemp("sweep"), ["none", "bias_sign", "dense"], [0, 1], every=50)
    report.main([str(directory), "--figures"])
    return directory, (directory / "report.html").read_text(encoding="utf-8")


def test_page_refers_to_nothing_outside_itself(page: tuple[Path, str]) -> None:
    _, html = page
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s>)]{1,40})""", html)
    assert len(links) == 6 and all(link.startswith("data:image/") for link in links)
    assert len(html) < 4_000_000
    assert "http://" not in html and "https://" not in html


def test_page_names_every_arm_seed_and_picture(page: tuple[Path, str]) -> None:
    directory, html = page
    for text in ("none", "bias_sign", "dense", "balance.bias_sign = defaults", "jax = 0.7.0"):
        assert text in html
    for heading in ("The answer", "Numbers", "Pictures", "What this does not show", "Settings", "Where it comes from"):
        assert f"<h2>{heading}</h2>" in html
    alts = re.findall(r'<img alt="([^"]+)"', html)
    assert len(alts) == html.count("<figcaption>") == len(list((directory / "figures").glob("*.png"))) == 6


def test_page_is_well_formed(page: tuple[Path, str]) -> None:
    _, html = page
    for tag in (
        "table",
        "thead",
        "tr",
        "th",
        "td",
        "span",
        "small",
        "main",
        "figure",
        "p",
        "div",
        "ul",
        "li",
        "details",
        "pre",
    ):
        assert len(re.findall(rf"<{tag}[ >]", html)) == html.count(f"</{tag}>"), tag


def test_names_are_escaped_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = "_<script>alert('$x$ & y')[bold]"
    tiny_sweep(tmp_path, {bad: [1.0, 1.1], "aux_loss": [1.0, 1.2]}, description="<img src=x>", name="<b>&")
    report.main([str(tmp_path)])
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html and "<img src" not in html and "<b>&<" not in html
    assert "_&lt;script&gt;alert(&#x27;$x$ &amp; y&#x27;)[bold]" in html
    assert "[bold]" in capsys.readouterr().out


def test_a_folder_whose_name_is_no_text_is_named_on_the_page_and_the_terminal(tmp_path: Path) -> None:
    directory = tiny_sweep(tmp_path / os.fsdecode(b"caf\xe9"), {"none": [1.0, 1.1]})
    write_run(directory / os.fsdecode(b"stray\xe9") / "seed0", tiny_metrics(1.0, 1.0), [])
    command = [sys.executable, "-m", "experiments.report", str(directory)]
    strict = os.environ | {"PYTHONIOENCODING": "utf-8"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=strict, cwd=rig.REPO)
    assert run.returncode == 0, run.stderr
    assert r"stray\udce9/seed0 is not listed in sweep.json" in (directory / "report.html").read_text()
    assert run.stdout.splitlines()[-1] == rf"Wrote {tmp_path}/caf\udce9/report.html"


def test_terminal_table_shows_the_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_sweep(tmp_path, {"none": [1.0, 1.2], "aux_loss": [0.9]})
    report.print_table(report.read_sweep(tmp_path))
    out = capsys.readouterr().out
    assert "1.1000 ± 1.2706" in out and "! aux_loss, seed 1: not started (no metrics)." in out


def test_nothing_finished_is_a_sentence_and_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep(tmp_path, ["none"], [0])
    with pytest.raises(SystemExit, match="2"):
        report.main([str(tmp_path)])
    assert "must hold at least one finished run" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
    report.print_table(report.read_sweep(tmp_path))
    assert "! none, seed 0: not started (no metrics)." in capsys.readouterr().out


def test_the_page_shows_where_the_time_went_if_a_run_logged_it(tmp_path: Path) -> None:
    tiny_sweep(tmp_path, {"none": [1.0, 1.2]})
    assert "Where the time went" not in report.write(report.read_sweep(tmp_path)).read_text()
    keep_account(tmp_path / "none" / "seed0", 10.0, init=1, step=3)
    html = report.write(report.read_sweep(tmp_path)).read_text()
    assert '<td data-column="step"><span>75.0%</span></td>' in html.partition("Where the time went")[2]


def test_the_page_shows_which_data_the_runs_read(tmp_path: Path) -> None:
    folder = tiny_sweep(tmp_path, {"none": [2.0], "bias": [1.9]})
    for arm, corpus in (("none", "aaaa"), ("bias", "bbbb")):
        (folder / arm / "seed0" / "run.json").write_text(json.dumps({"identity": {"corpus": corpus}}))
    assert "aaaa / bbbb" in report.write(report.read_sweep(folder)).read_text()


def test_an_added_column_is_on_the_page(tmp_path: Path) -> None:
    tiny_sweep(tmp_path, {"none": [1.0, 1.2]})
    example = rig.REPO / "docs" / "examples" / "column.py"
    command = [sys.executable, str(example), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(rig.REPO)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    title = "loss in the last quarter"
    assert f'<td data-column="{title}"><span>3.000 ± 0.000</span></td>' in (tmp_path / "report.html").read_text()


# --- in a browser -----------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# a frame of the page's own origin can be read and be as narrow as a phone, and leaves the page itself unchanged
FRAME = """<!DOCTYPE html><iframe srcdoc="{page}" style="width:{width}px;height:800px;border:0"></iframe><script>
onload = () => {{
  const view = document.querySelector("iframe").contentWindow, page = view.document;
  const all = query => [...page.querySelectorAll(query)];
  document.title = JSON.stringify({{
    width: view.innerWidth,
    needed: page.documentElement.scrollWidth,
    tables: all(".scroll:has(table)").map(box => box.scrollWidth - box.clientWidth),
    pictures: all("img").map(image => image.complete && image.naturalWidth > 0),
    addresses: all("[src], [href]").map(e => (e.getAttribute("src") || e.getAttribute("href")).slice(0, 5)),
    requests: view.performance.getEntriesByType("resource").map(r => r.name.slice(0, 5)),
  }});
}};
</script>"""


def opened(html: str, width: int, folder: Path) -> dict[str, Any]:
    """The facts that a browser reports of the page in a window of this width."""
    if BROWSER is None:
        pytest.skip("no chromium here (Debian: apt-get install chromium)")
    (folder / "frame.html").write_text(FRAME.format(page=escape(html), width=width))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--window-size=1400,900", "--dump-dom", (folder / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, check=True)
    return json.loads(unescape(re.findall("<title>(.*?)</title>", done.stdout, re.DOTALL)[-1]))


@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_the_page_whole_and_fetches_nothing(page: tuple[Path, str], width: int, tmp_path: Path) -> None:
    found = opened(page[1], width, tmp_path)
    assert found["width"] == width
    assert found["needed"] <= width
    assert len(found["tables"]) >= 4 and set(found["tables"]) == {0}
    assert found["pictures"] == [True] * 6
    assert set(found["addresses"] + found["requests"]) == {"data:"}


def test_long_names_do_not_widen_the_page(tmp_path: Path) -> None:
    long = "balance_" * 12
    directory = tiny_sweep(tmp_path / long, {long: [1.0, 1.1], "aux_loss": [1.0, 1.2]}, name=long, description=long)
    html = report.write(report.read_sweep(directory)).read_text()
    assert all(opened(html, width, tmp_path)["needed"] <= width for width in (360, 1200))

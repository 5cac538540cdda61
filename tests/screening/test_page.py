"""The page of a screening: what it holds, its size, its refusals; and, in a real Chromium, what a reader can do."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from tests.screening.scans_written import TWO_THETA, counts, write_folder, write_tar
from xrdfast.cli import cli
from xrdfast.data.generate import AugmentConfig
from xrdfast.data.scans import scan_of_points
from xrdfast.errors import InputError
from xrdfast.models import build_model
from xrdfast.prediction import SymmetryPredictor
from xrdfast.screening.page import write_page
from xrdfast.screening.pipeline import Screener
from xrdfast.screening.preparation import Axis, thumbnail
from xrdfast.screening.results import write_table

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
HOSTILE = "<img src=x onerror=document.title='hit'>&amp;\u202e.xy"


@pytest.fixture(scope="module")
def screened(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of answers for plain files, a tar archive, names that are markup, and two failures."""
    folder = tmp_path_factory.mktemp("page")
    scans = write_folder(folder / "scans", 6)
    (scans / "0000.xy").rename(scans / HOSTILE)
    (scans / "</script><script>document.title='hit'.xy".replace("/", "\\")).write_text("nothing\n")
    (scans / "noted.xy").write_text("# lambda 0.7\n" + (scans / "0001.xy").read_text())
    (scans / "bad.xy").write_text("nothing here\n")
    torch.manual_seed(0)
    predictor = SymmetryPredictor(build_model("small").eval(), augment=AugmentConfig(profile="lab"))
    output = folder / "answers.parquet"
    assert Screener(predictor).screen([scans, write_tar(folder / "some.tar", 2)], output) == (9, 2)
    return output


def packed(page: str, name: str) -> bytes:
    """What a page carries."""
    found = re.search(rf'id="{name}">([A-Za-z0-9+/=]*)</script>', page)
    assert found
    return gzip.decompress(base64.b64decode(found[1]))


def test_what_a_page_holds(screened, tmp_path):
    output = tmp_path / "page.html"
    assert write_page(screened, output) == (9, 9, 2)
    page = output.read_text()
    content = json.loads(packed(page, "content"))
    rows, summary = content["rows"], content["summary"]
    assert summary["n"] == 9 and sum(summary["histogram"]) == sum(summary["by_system"]) == 9
    assert summary["calibrated"] is False and "not calibrated" in page
    unusual = rows["out_of_distribution"]
    assert unusual == sorted(unusual, reverse=True) and sorted(rows["at"]) == list(range(9))
    assert len(packed(page, "thumbnails")) == 9 * 200
    assert len(content["patterns"]) == 9  # read again, from files and archive
    drawn = content["patterns"]["0"]
    assert len(drawn["high"]) == len(drawn["background"]) == 1500 and 5 <= len(drawn["peaks"]) <= 10
    assert [failure["id"] for failure in content["failures"]] == sorted(f["id"] for f in content["failures"])
    assert HOSTILE in " ".join(rows["scan_id"])
    assert (
        "onerror" not in page
        and not re.search(r"(?:src|href)=\"(?!#)", page)
        and "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    )
    assert write_page(screened, tmp_path / "again.html") and (tmp_path / "again.html").read_text() == page


def test_files_that_changed_are_not_drawn(screened, tmp_path):
    path = next(screened.parent.glob("scans/0001.xy"))
    before = path.read_text()
    path.write_text(before + "90.05 1\n")
    try:
        write_page(screened, tmp_path / "page.html", n_patterns=100)
        content = json.loads(packed((tmp_path / "page.html").read_text(), "content"))
        missing = set(range(9)) - {int(i) for i in content["patterns"]}
        assert [Path(content["rows"]["scan_id"][i]).name for i in missing] == ["0001.xy"]
    finally:
        path.write_text(before)


@pytest.fixture(scope="module")
def many(screened, tmp_path_factory) -> Path:
    """A table of 10,100 answers: thumbnails with the noise of real counts, long names, notes."""
    (row,) = pq.read_table(screened).slice(0, 1).to_pylist()
    rng = np.random.default_rng(0)
    axis = Axis(scan_of_points(TWO_THETA, counts(0), path="a.xy"))
    images = [thumbnail(axis, counts(seed)) for seed in range(100)]
    rows = []
    for i in range(10_100):
        share = np.sort(rng.dirichlet(np.full(5, 0.3)))[::-1]
        image = np.frombuffer(images[i % 100], np.uint8) // 2 + rng.integers(0, 8, 200)
        rows.append(
            row
            | {"scan_id": f"/beamline/2026/run_{i // 100:03d}/sample with a long name_{i:06d}.xy"}
            | {"probability": share.tolist(), "space_group": (rng.permutation(230)[:5] + 1).tolist()}
            | {"out_of_distribution": rng.random(), "sha256": rng.bytes(32).hex(), "seconds": rng.random()}
            | {"notes": [f"{rng.integers(100)} negative intensities set to 0"], "file": "gone.xy"}
            | {"thumbnail": image.astype(np.uint8).tobytes()}
        )
    path = tmp_path_factory.mktemp("many") / "many.parquet"
    write_table(path, rows)
    return path


def test_ten_thousand_scans_are_under_five_megabytes(many, tmp_path):
    """And of more, the most unusual are listed."""
    assert write_page(many, tmp_path / "many.html") == (10_100, 10_000, 0)
    assert (tmp_path / "many.html").stat().st_size < 5e6
    page = (tmp_path / "many.html").read_text()
    assert "The 10,000 most unusual are listed" in page
    assert sum(json.loads(packed(page, "content"))["summary"]["histogram"]) == 10_100


def test_an_empty_table_and_refusals(tmp_path):
    write_table(tmp_path / "none.parquet", [])
    assert write_page(tmp_path / "none.parquet", tmp_path / "none.html") == (0, 0, 0)
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(InputError, match="must be a table of answers"):
        write_page(tmp_path / "text.parquet", tmp_path / "page.html")
    with pytest.raises(InputError, match="must be writable"):
        write_page(tmp_path / "none.parquet", tmp_path / "none" / "page.html")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(InputError, match="columns: must be those of answers"):
        write_page(tmp_path / "other.parquet", tmp_path / "page.html")


def test_command(screened, tmp_path):
    done = CliRunner().invoke(cli, ["report", str(screened), "-o", str(tmp_path / "page.html")])
    assert done.exit_code == 0 and "9 answered (9 listed), 2 failed" in done.output
    done = CliRunner().invoke(cli, ["report", str(screened), "-o", str(tmp_path / "page.txt")])
    assert done.exit_code == 2 and "must end in .html" in done.output


@pytest.fixture
def browser():
    if not Path(CHROMIUM).exists():
        pytest.skip("no Chromium: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield chromium
        chromium.close()


def opened(browser, path: Path):
    """The page, with a list of everything that went wrong or was asked of a network."""
    page, wrong = browser.new_page(viewport={"width": 1280, "height": 1000}), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: wrong.append(request.url) if request.url != path.as_uri() else None)
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]")
    return page, wrong


def wait_until(page, expression: str) -> None:
    """Polls from here: the page's own policy forbids the evaluation of text, which waiting inside it would need."""
    for _ in range(100):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(expression)


@pytest.mark.browser
@pytest.mark.filterwarnings("ignore")  # playwright's own: its event loop at the end
def test_in_a_browser(browser, screened, tmp_path):
    """Sort, filter, open a row, change axes; names that are markup stay text; nothing is fetched."""
    write_page(screened, tmp_path / "page.html")
    page, wrong = opened(browser, tmp_path / "page.html")

    def column(n: int) -> list[str]:
        return page.eval_on_selector_all(f".row > :nth-child({n})", "cells => cells.map(c => c.textContent)")

    assert page.title() == "answers.parquet: screening" and len(column(1)) == 9
    assert page.inner_text("#count") == "9 of 9"
    assert any(HOSTILE in name for name in column(3))
    page.click("#head button:text('no.')")
    assert column(1) == [str(i) for i in range(1, 10)]
    page.click("#head button:text('no.')")
    assert column(1) == [str(i) for i in range(9, 0, -1)]
    page.click("#head button:text('probability')")
    shares = [float(text.split()[0]) for text in column(5)]
    assert shares == sorted(shares, reverse=True)
    page.fill("#find", "noted")
    assert page.inner_text("#count") == "1 of 9" and "noted.xy" in column(3)[0]
    page.click(".row")
    assert page.is_visible("#detail") and "0.7 Å (file)" in page.inner_text("#facts")
    assert "peaks found" in page.inner_text("#caption")
    drawings = {page.evaluate("document.getElementById('plot').toDataURL()")}
    for button in ("d", "Q", "log", "linear"):
        page.click(f"#detail .tools button:text-is('{button}')")
        drawings.add(page.evaluate("document.getElementById('plot').toDataURL()"))
    assert len(drawings) == 5
    picture = tmp_path / "page.png"
    page.screenshot(path=str(picture))
    assert picture.stat().st_size > 20_000
    page.keyboard.press("Escape")
    page.click("text=Clear")
    wait_until(page, "document.getElementById('count').textContent === '9 of 9'")
    page.check("#assumed")
    assert page.inner_text("#count") == "8 of 9"
    assert len(page.query_selector_all("#failed tbody tr")) == 2
    assert page.title() == "answers.parquet: screening" and not page.query_selector("img") and wrong == []


@pytest.mark.browser
@pytest.mark.filterwarnings("ignore")
def test_ten_thousand_rows_stay_quick(browser, many, tmp_path):
    """Sorting takes less than half a second, and no more rows exist than can be seen."""
    write_page(many, tmp_path / "many.html")
    page, wrong = opened(browser, tmp_path / "many.html")
    took = page.evaluate(
        "() => { const t = performance.now(); document.querySelectorAll('#head button')[2].click();"
        " document.getElementById('body').offsetHeight; return performance.now() - t; }"
    )
    assert took < 500.0
    page.evaluate("document.getElementById('body').scrollTop = 40 * 5000")
    wait_until(
        page,
        "document.querySelector('.row') && +document.getElementById('window').style.top.slice(0, -2) > 1e5",
    )
    assert len(page.query_selector_all(".row")) < 40
    listed = json.loads(packed((tmp_path / "many.html").read_text(), "content"))["rows"]["space_group"]
    n_found = sum(groups[0] == 19 for groups in listed)
    for symbol in ("P212121", "p2_12_12_1"):
        page.fill("#find", symbol)
        wait_until(page, f"document.getElementById('count').textContent === '{n_found} of 10,000'")
    page.fill("#find", "")
    wait_until(page, "document.getElementById('count').textContent === '10,000 of 10,000'")
    page.click(".row >> nth=8")
    assert "stored thumbnail" in page.inner_text("#caption") and wrong == []

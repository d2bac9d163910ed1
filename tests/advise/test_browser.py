"""The report in a real Chromium: it sorts, it asks the network for nothing, its script raises nothing."""

import json
import os
import re
import shutil
import subprocess

import pytest

from foveate.advise.report import write_report
from tests.advise.documents import MECHANISMS, sample_document

pytestmark = pytest.mark.browser
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-extensions"),
    # The browser's own errands get nowhere either.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]

# Clicks headings as a user would and writes what the columns then hold into the page.
PROBE = """
<script>
window.addEventListener("error", function (event) { document.body.dataset.error = event.message; });
window.addEventListener("load", function () {
  var table = document.querySelectorAll("table.sortable")[1];
  var heads = Array.from(table.tHead.rows[0].cells);
  var column = heads.findIndex(function (head) { return head.textContent.trim() === "forward"; });
  function values() {
    var rows = Array.from(table.tBodies[0].rows);
    return rows.map(function (row) { return Number(row.cells[column].dataset.sort); });
  }
  var found = { before: values() };
  heads[column].querySelector("button").click();
  found.up = values(); found.up_state = heads[column].getAttribute("aria-sort");
  heads[column].querySelector("button").click();
  found.down = values(); found.down_state = heads[column].getAttribute("aria-sort");
  heads[0].querySelector("button").click();
  found.names = Array.from(table.tBodies[0].rows).map(function (row) { return row.cells[0].dataset.sort; });
  document.getElementById("copy").click();
  found.overflow = document.documentElement.scrollWidth > window.innerWidth;
  document.body.dataset.found = JSON.stringify(found);
});
</script>
"""


def browse(page, folder):
    """Open a page; return the document as it stands after its scripts ran, and the browser's network log."""
    if CHROMIUM is None:
        if os.environ.get("FOVEATE_REQUIRE_BROWSER") == "1":
            pytest.fail("FOVEATE_REQUIRE_BROWSER=1, but there is no Chromium on this machine")
        pytest.skip("there is no Chromium on this machine")
    log = folder / f"{page.stem}.net.json"
    where = [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", "--window-size=1280,1600"]
    done = subprocess.run(
        [CHROMIUM, *FLAGS, *where, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    return done.stdout, log.read_text(errors="replace")


def requests(log):
    """Every address the page asked for; the browser's own errands have no origin as initiator."""
    asked = (event.get("params", {}) for event in json.loads(log)["events"])
    return {p["url"] for p in asked if "url" in p and p.get("initiator", "not an origin") != "not an origin"}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    page = write_report(sample_document(), folder / "report.html")
    page.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    return browse(page, folder)


def found(dom):
    match = re.search(r'<body[^>]* data-found="([^"]*)"', dom)
    assert match, dom[-2000:]
    return json.loads(match.group(1).replace("&quot;", '"'))


def test_the_table_sorts_both_ways_by_number_and_by_name(opened):
    seen = found(opened[0])
    assert len(seen["before"]) == len(MECHANISMS)
    assert seen["up"] == sorted(seen["before"])
    assert seen["down"] == sorted(seen["before"], reverse=True)
    assert (seen["up_state"], seen["down_state"]) == ("ascending", "descending")
    assert seen["names"] == sorted(MECHANISMS)


def test_the_script_raises_nothing_and_the_page_does_not_overflow(opened):
    assert "data-error" not in opened[0].split("<main", 1)[0]
    assert found(opened[0])["overflow"] is False


def test_the_pages_other_sections_do_not_overflow_either(tmp_path):
    page = write_report(sample_document(("recall", "shapes")), tmp_path / "report.html")
    page.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    dom, log = browse(page, tmp_path)
    assert "data-error" not in dom.split("<main", 1)[0]
    assert found(dom)["overflow"] is False
    assert requests(log) == set()


def test_nothing_is_asked_of_the_network(opened):
    assert requests(opened[1]) == set()


def test_a_request_would_have_been_seen_and_the_page_forbids_it(tmp_path):
    picture = '<img src="http://127.0.0.1:9/picture.png"></body>'
    page = write_report(sample_document(("shapes",)), tmp_path / "report.html")
    text = page.read_text().replace("</body>", picture)
    page.write_text(text)
    assert requests(browse(page, tmp_path)[1]) == set()
    bare = tmp_path / "bare.html"
    bare.write_text(re.sub(r"<meta http-equiv=[^>]*>", "", text))
    assert requests(browse(bare, tmp_path)[1]) == {"http://127.0.0.1:9/picture.png"}

"""Opens our pages in headless Chromium, points at everything that can be pointed at, and fails on any error.

`python tests/interop/browser.py [PAGE…]`: each must say something under the pointer, log nothing, and be no wider than
the window on a telephone. Without a page it trains a small model and takes the pages of that; without Chromium it says
so and passes.
"""

from __future__ import annotations

import html
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

WIDTHS = (1280, 400)
PROBE = """
<script>
const found = { told: [], silent: 0, width: document.documentElement.scrollWidth };
for (const place of document.querySelectorAll(".plot, .heat, .text span[data-t]")) {
  const box = place.getBoundingClientRect();
  const at = { bubbles: true, clientX: box.left + box.width / 2, clientY: box.top + box.height / 2 };
  place.dispatchEvent(new PointerEvent("pointermove", at));
  const tip = document.querySelector(".tip");
  if (tip.hidden || !tip.textContent) found.silent += 1; else found.told.push(tip.textContent);
  place.dispatchEvent(new PointerEvent("pointerleave", at));
}
for (const choice of document.querySelectorAll("input[type=radio]")) choice.click();
parent.postMessage(JSON.stringify(found), "*");
</script>
"""
# In a frame: a window of its own is never as narrow as a telephone.
FRAME = """
<iframe src="page.html" style="width:{width}px; height:900px; border:0"></iframe>
<script>addEventListener("message", (event) => {{
  const said = document.body.appendChild(document.createElement("pre"));
  said.id = "probe";
  said.textContent = event.data;
}});</script>
"""


def open_page(browser: str, page: Path, width: int) -> tuple[dict, list[str]]:
    """Return what the probe found on a page, and every line of the console."""
    with tempfile.TemporaryDirectory() as folder:
        frame, probed = Path(folder) / "frame.html", Path(folder) / "page.html"
        frame.write_text(FRAME.format(width=width))
        probed.write_text(page.read_text("utf-8").replace("</body>", PROBE + "</body>"), "utf-8")
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
        command = [browser, *flags, "--window-size=1400,950", f"--user-data-dir={folder}/profile", frame.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    return json.loads(html.unescape(found[1])) if found else {}, console


def fresh_pages(folder: Path) -> list[Path]:
    """Train a little on this repository's own words, and return the pages that come of it."""
    run, ostro = folder / "run", [sys.executable, "-m", "ostro"]
    text = str(Path(__file__).resolve().parents[2] / "docs" / "log.md")
    words = "train.steps=8 data.seq_length=64 model.num_hidden_layers=2 train.eval_every=4"
    paths = [f"data.path={text}", f"data.eval_path={text}", f"run.dir={run}"]
    subprocess.run([*ostro, "train", "tiny", *words.split(), *paths], check=True, stdout=subprocess.DEVNULL)
    routing = ["routing", run, text, "--out", folder / "routing", "--seq-length", "64", "--most-tokens", "640"]
    subprocess.run([*ostro, *map(str, routing)], check=True, stdout=subprocess.DEVNULL)
    return [run / "report.html", folder / "routing" / "routing.html"]


def main(pages: list[str]) -> int:
    """Check each page at each width; return how many faults there were."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        print("no Chromium here, so no page was opened: on Debian, apt-get install chromium")
        return 0
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        for page, width in itertools.product(map(Path, pages) if pages else fresh_pages(Path(folder)), WIDTHS):
            found, console = open_page(browser, page, width)
            is_well = bool(found) and not console and found["told"] and not found["silent"] and found["width"] <= width
            faults += not is_well
            told = len(found.get("told", ()))
            print(f"{'ok  ' if is_well else 'FAIL'} {page.name} at {width}: told {told} times, {console or 'no error'}")
            if not is_well:
                print(json.dumps(found)[:2000])
    return faults


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

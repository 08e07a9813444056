"""report.html in a browser: on the screens of a phone and of a desktop, light and dark."""

import json
import re
import shutil
import subprocess
from html import escape

import pytest
from synthetic_runs import FEW, JEPA, REGULAR, add_learning, export_views, log_steps, one_arm, two_arms

from llm_jepa.report import main

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = 420, 1280
# Shows the report in a frame of each width, because a window may not be as narrow, opens what is folded and measures.
MEASURE = """<!doctype html><body>{frames}<script>addEventListener("load", () => {{
  const found = [...document.querySelectorAll("iframe")].map(({{contentWindow: frame}}) => {{
    const page = frame.document, images = [...page.images], width = page.documentElement.clientWidth;
    page.querySelectorAll("details").forEach(folded => folded.open = true);
    const count = test => images.filter(test).length;
    return {{
      width, scroll: page.documentElement.scrollWidth, figures: page.querySelectorAll("figure").length,
      broken: count(i => !i.naturalWidth), silent: count(i => !i.alt.trim()),
      outside: count(i => i.getBoundingClientRect().right > width),
      text: frame.getComputedStyle(page.body).color, inverted: count(i => frame.getComputedStyle(i).filter != "none"),
    }};
  }});
  document.body.innerHTML = "<pre>" + JSON.stringify(found) + "</pre>";
}})</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    placebo = JEPA | {"jepa_loss": "clip", "shuffle_pairs": True, "system": "a_long_name_without_a_space" * 3}
    runs = two_arms(folder, FEW, jepa_loss="clip") + one_arm(folder, "placebo", placebo, FEW)
    runs += one_arm(folder, "nitp", REGULAR | {"nitp": True}, FEW)
    for run in runs:
        log_steps(run, 20)
        export_views(run, 10)
    add_learning(runs[2], 0.8, 0.4)
    assert main([*runs, "--output_dir", str(folder / "report"), "--allow", "system"]) == 0
    text = escape((folder / "report" / "report.html").read_text())
    frames = "".join(f'<iframe srcdoc="{text}" style="width:{w}px;height:900px;border:0"></iframe>' for w in WIDTHS)
    file = folder / "frames.html"
    file.write_text(MEASURE.format(frames=frames))
    return file


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize(("theme", "text"), [(0, "rgb(255, 255, 255)"), (1, "rgb(0, 0, 0)")], ids=["dark", "light"])
def test_page_fits_the_screen_and_has_no_errors(page, tmp_path, theme, text):
    flags = ["--headless", "--no-sandbox", "--hide-scrollbars", "--enable-logging=stderr", "--dump-dom"]
    flags += [f"--blink-settings=preferredColorScheme={theme}", f"--user-data-dir={tmp_path}"]
    done = subprocess.run([CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    found = json.loads(re.search("<pre>(.*?)</pre>", done.stdout)[1])
    for width, measured in zip(WIDTHS, found, strict=True):
        assert (measured.pop("inverted") > 0) == (theme == 0)
        faults = dict.fromkeys(("broken", "silent", "outside"), 0)
        assert measured == faults | {"width": width, "scroll": width, "figures": 5, "text": text}

# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""A report as a browser shows it on a phone and on a desk."""

import html
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest


PROBE = """<!DOCTYPE html><body style="margin:0">{frames}<script>
addEventListener("load", () => {{
  const found = [...document.querySelectorAll("iframe")].map(frame => {{
    const page = frame.contentDocument, style = frame.contentWindow.getComputedStyle(page.body);
    const letters = [...page.querySelectorAll("svg text")].map(text => text.getBoundingClientRect().height);
    return {{
      overflow: page.documentElement.scrollWidth - frame.clientWidth,
      plots: [...page.querySelectorAll("figure svg")].map(svg => svg.getBoundingClientRect().width),
      smallest: Math.min(...letters), background: style.backgroundColor, color: style.color,
    }};
  }});
  document.body.innerHTML = "<pre>" + JSON.stringify(found) + "</pre>";
}});
</script></body>"""


def brightness(colour: str) -> float:
    return statistics.mean(map(float, re.findall(r"[\d.]+", colour)[:3]))


def check_rendering(study: Path, folder: Path, dark: bool, plots: int) -> None:
    """Writes page and PNG files of the study into `folder`; the page has to fit both screens and follow the theme."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs a browser: install chromium")
    report = folder / "report.html"
    command = [sys.executable, "-m", "nt_transformers.report", str(study)]
    subprocess.run([*command, "--output", str(report), "--png", str(folder)], check=True, timeout=300)
    assert len(list(folder.glob("*.png"))) == plots
    srcdoc = html.escape(report.read_text(encoding="utf-8"))
    frames = "".join(
        f'<iframe srcdoc="{srcdoc}" style="width:{w}px;height:900px;border:0"></iframe>' for w in (390, 1900)
    )
    (folder / "probe.html").write_text(PROBE.format(frames=frames), encoding="utf-8")
    browser = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    browser += [
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--virtual-time-budget=5000",
        "--dump-dom",
    ]
    dom = subprocess.run(
        [*browser, (folder / "probe.html").as_uri()], check=True, capture_output=True, text=True, timeout=120
    )
    found = re.search(r"<pre>(.*)</pre>", dom.stdout)
    assert found is not None
    phone, desk = json.loads(html.unescape(found[1]))
    for screen in (phone, desk):
        assert screen["overflow"] <= 0
        assert len(screen["plots"]) == plots
        assert (brightness(screen["background"]) < brightness(screen["color"])) == dark
    assert min(phone["plots"]) > 300
    assert phone["smallest"] > 7
    assert max(desk["plots"]) < 1000  # several in a row

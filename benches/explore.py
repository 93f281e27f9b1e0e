"""Times the explorer: from the pointer's move to the picture, and ten visitors who move at once.

    python benches/explore.py [--seconds 60] [--visitors 10] [--moves 60]

At 64 x 64 tokens of the built-in model (256 pixels), in a headless chromium, over the real server
on the loopback interface, with everything on this machine: the browser takes its share of the
cores. The target is 60 ms, and 2 s for the first page once the model is loaded.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))


@dataclass
class Visits:
    """What some visitors found who moved at once."""

    visitors: int
    seconds: float
    milliseconds: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    before: int = 0  # bytes of the process, once all had moved for a tenth of the time
    after: int = 0

    def told(self) -> str:
        """As a line of text."""
        times = sorted(self.milliseconds)
        grown = (self.after - self.before) / 2**20
        return (
            f"{self.visitors} visitors for {self.seconds:.0f} s: {len(times)} rows, "
            f"{len(self.faults)} faults, median {statistics.median(times):.0f} ms, "
            f"95 % within {times[int(0.95 * len(times))]:.0f} ms, memory {grown:+.1f} MiB"
        )


def visit_at_once(rules: Any, visitors: int, seconds: float, size: int | None) -> Visits:
    """Visitors who each add a picture of their own, and move over it without a pause.

    Each looks at its own picture, again and again while moving, and at what its rows are: that of
    another would show.
    """
    import psutil
    from explored import Client, png

    found = Visits(visitors, seconds)
    begin = threading.Barrier(visitors + 1)
    ends = [0.0]

    def visit(number: int) -> None:
        try:
            client = Client(rules).open()
            mine = client.ask("upload", {"name": f"{number}"}, png(64, 64, seed=number))[0][
                "picture"
            ]
            shown = client.ask("image", {"picture": mine})[1]
            view = {} if size is None else {"size": size}
            seen = client.ask("look", {"source": mine, "target": "p1", **view})[0]
            look, (height, width) = seen["look"], seen["source_grid"]
            first = client.ask("row", {"look": look, "side": "source", "token": 7})
        except Exception as error:
            found.faults.append(repr(error))
            begin.abort()
            return
        begin.wait()
        step = 0
        while time.perf_counter() < ends[0]:
            step += 1
            try:
                began = time.perf_counter()
                token = 7 if step % 20 == 0 else (step * 37 + number) % (height * width)
                row = client.ask("row", {"look": look, "side": "source", "token": token})
                found.milliseconds.append(1e3 * (time.perf_counter() - began))
                if token == 7 and row != first:
                    raise AssertionError("the row of a token has changed")
                if step % 50 == 0 and client.ask("image", {"picture": mine})[1] != shown:
                    raise AssertionError("the picture is another visitor's")
            except Exception as error:
                found.faults.append(repr(error))

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(visitors)]
    for each in threads:
        each.start()
    ends[0] = float("inf")
    begin.wait(300)
    ends[0] = time.perf_counter() + seconds
    process = psutil.Process()
    time.sleep(seconds / 10)
    found.before = process.memory_info().rss
    for each in threads:
        each.join()
    found.after = process.memory_info().rss
    return found


def point(address: str, moves: int) -> tuple[float, list[float]]:
    """Seconds until the first page is there, and milliseconds from each move to its picture."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        raise SystemExit("there is no chromium; get it: apt install chromium")
    found = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1366, "height": 800})
        page.set_default_timeout(120_000)
        began = time.perf_counter()
        page.goto(address)
        page.wait_for_selector("[data-ready]")
        first = time.perf_counter() - began
        page.select_option('[data-id="size"]', "256")
        page.wait_for_selector('[data-ready="2"]')
        box = page.locator('[data-id="source-stage"]').bounding_box()
        for k in range(moves):
            column, row = (k * 11) % 64, (k * 7) % 64
            place = f'[data-token="source:{row * 64 + column}"]'
            page.evaluate("() => delete document.querySelector('.fm-explorer').dataset.latency")
            page.mouse.move(
                box["x"] + (column + 0.5) / 64 * box["width"],
                box["y"] + (row + 0.5) / 64 * box["height"],
            )
            node = page.wait_for_selector(f"{place}[data-latency]", state="attached")
            found.append(float(node.get_attribute("data-latency")))
        browser.close()
    return first, found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--visitors", type=int, default=10)
    parser.add_argument("--moves", type=int, default=60)
    given = parser.parse_args()

    from explored import serving

    with serving() as rules:
        first, found = point(f"http://127.0.0.1:{rules.port}/", given.moves)
        found.sort()
        print(f"first page: {first:.2f} s after the model was loaded (target 2 s)")
        print(
            f"pointer to picture at 64 x 64 tokens, {len(found)} moves: median "
            f"{statistics.median(found):.0f} ms, 95 % within "
            f"{found[int(0.95 * len(found))]:.0f} ms (target 60 ms)"
        )
        print(visit_at_once(rules, given.visitors, given.seconds, 256).told())


if __name__ == "__main__":
    main()

"""The pictures of docs/images: what an engineer sees in the Prefect UI, in headless Chromium.

    python tests/ui/screenshots.py        # needs chromium: apt-get install chromium

Everything is real: embedded cloud, Prefect server, `llm-rollout bootstrap`, `prefect deploy --all`, a worker, and a
rollout that is started, approved and read in the browser as a person does it. Takes about three minutes, and fails
where the UI does not show what the documentation says.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

from PIL import Image
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from websockets.sync.client import connect

from flows.bootstrap import bootstrap
from flows.rehearsal import front_door, stage
from flows.rehearsal_acts import MODEL
from rollout import catalog

REPOSITORY = Path(__file__).parents[2]
IMAGES = REPOSITORY / "docs" / "images"
WIDTH, HEIGHT = 1500, 900
SHOWN_TIMEOUT_S = 300.0
"""A rollout takes half a minute on an idle machine, several times that on a busy one."""
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


class Browser:
    """One page of a headless Chromium, driven by the DevTools protocol."""

    def __init__(self, address: str, folder: Path) -> None:
        self._socket = connect(address, max_size=None)
        self._ids = itertools.count(1)
        self._folder = folder
        self.resize(HEIGHT)

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == number:
                if "error" in message:
                    raise SystemExit(f"chromium refuses {method}: {message['error']['message']}")
                result: dict[str, Any] = message["result"]
                return result

    def resize(self, height: int) -> None:
        self.command(
            "Emulation.setDeviceMetricsOverride", width=WIDTH, height=height, deviceScaleFactor=1, mobile=False
        )

    def evaluate(self, script: str) -> Any:
        answer = self.command("Runtime.evaluate", expression=script, returnByValue=True)
        return answer["result"].get("value")

    def open(self, url: str, *texts: str) -> None:
        """Open a page, and wait until it shows all `texts`."""
        self.command("Page.navigate", url=url)
        self.until(*texts)

    def until(self, *texts: str) -> None:
        deadline = time.monotonic() + SHOWN_TIMEOUT_S
        while missing := [text for text in texts if text not in (self.evaluate("document.body.innerText") or "")]:
            if time.monotonic() > deadline:
                self.picture("failed")
                raise SystemExit(f"the UI does not show {missing}: see {self._folder / 'failed.png'}")
            time.sleep(0.3)
        time.sleep(2.0)  # pictures and graphs are drawn after the text

    def click(self, text: str) -> None:
        """Click the last element that says exactly `text`: the one in the dialog, if there is one."""
        script = f"""(() => {{
            const saying = [...document.querySelectorAll("button, a, [role=option], [role=tab], li, span")]
                .filter(e => e.innerText?.trim() === {json.dumps(text)} && e.getClientRects().length);
            saying.at(-1)?.scrollIntoView({{block: "center"}});
            const box = saying.at(-1)?.getBoundingClientRect();
            return box && [box.x + box.width / 2, box.y + box.height / 2];
        }})()"""
        deadline = time.monotonic() + SHOWN_TIMEOUT_S
        while (place := self.evaluate(script)) is None:
            if time.monotonic() > deadline:
                self.picture("failed")
                raise SystemExit(f"the UI has no {text!r} to click: see {self._folder / 'failed.png'}")
            time.sleep(0.3)
        for kind in ("mousePressed", "mouseReleased"):
            self.command("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)
        time.sleep(1.0)

    def choose(self, value: str) -> None:
        """Take an option of a native select, whose list no page script can open."""
        self.evaluate(f"""(() => {{
            const list = [...document.querySelectorAll("select")]
                .find(select => [...select.options].some(option => option.value === {json.dumps(value)}));
            list.value = {json.dumps(value)};
            for (const kind of ["input", "change"]) list.dispatchEvent(new Event(kind, {{bubbles: true}}));
        }})()""")

    def picture(self, name: str) -> None:
        shot = self.command("Page.captureScreenshot", format="png")
        image = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
        # A palette: a quarter of the size, and nobody sees the difference on pages of a dozen colours.
        image.quantize(128).save(self._folder / f"{name}.png", optimize=True)


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        raise SystemExit("there is no chromium: apt-get install chromium, then run this again")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        command = [program, *QUIET, f"--user-data-dir={home}", "--remote-debugging-port=0", "about:blank"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            port_file, deadline = Path(home) / "DevToolsActivePort", time.monotonic() + SHOWN_TIMEOUT_S
            while not port_file.exists() or "\n" not in port_file.read_text():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{program} does not start: try it by hand with {' '.join(QUIET)} about:blank")
                time.sleep(0.1)
            port = port_file.read_text().splitlines()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as pages:
                address = json.load(pages)[0]["webSocketDebuggerUrl"]
            yield Browser(address, folder)
        finally:
            process.terminate()
            process.wait()


def deployments_of(api: str) -> dict[str, str]:
    """Everything of prefect.yaml, beside the rehearsal's own; (flow/name → id)."""
    bootstrap([catalog.load_target(name) for name in catalog.known("targets")])
    prefect = str(Path(sys.executable).with_name("prefect"))
    command = [prefect, "--no-prompt", "deploy", "--all"]
    subprocess.run(
        command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PREFECT_API_URL": api}
    )
    with get_client(sync_client=True) as client:
        flows = {flow.id: flow.name for flow in client.read_flows()}
        return {f"{flows[one.flow_id]}/{one.name}": str(one.id) for one in client.read_deployments(limit=100)}


def tour(page: Browser, ui: str, deployments: dict[str, str]) -> None:
    """An engineer's way: choose, fill in, approve, watch, read."""
    gemma = deployments["rollout-model/gemma-4-26b-a4b-it-s3ns-france"]
    page.open(f"{ui}/deployments/deployment/{gemma}/run", "Context window (tokens)", "Approval timeout (seconds)")
    page.picture("form")

    own = deployments[f"rollout-model/{MODEL}-rehearsal"]
    page.open(f"{ui}/deployments/deployment/{own}/run", "Context window")
    page.click("Submit")
    run = waiting_run()
    page.open(f"{ui}/runs/flow-run/{run}", f"{MODEL} → rehearsal", "Suspended")
    page.click("Resume")
    page.until("USD per hour", "Decision")
    page.picture("approval")
    page.choose("approve")
    page.click("Submit")
    wait_until_completed(run)
    page.open(f"{ui}/runs/flow-run/{run}", f"{MODEL} → rehearsal", "Completed", "Retry")
    page.picture("run")
    for key, text in (
        ("rollout-report", "Timeline"),
        ("plan", "cost while running"),
        ("start-up-waterfall", "image"),
        ("benchmark", "knee"),
    ):
        page.resize(1300 if key in ("rollout-report", "benchmark") else HEIGHT)
        page.open(f"{ui}/artifacts/artifact/{artifact(run, key)}", text)
        page.picture(key.removeprefix("rollout-"))
    page.resize(HEIGHT)
    page.open(f"{ui}/deployments", "rollout-model", "s3ns-france")  # at the end, when the worker is known to be there
    page.picture("deployments")


def waiting_run() -> str:
    """The run that the form has started, once it waits for its approval."""
    deadline = time.monotonic() + SHOWN_TIMEOUT_S
    with get_client(sync_client=True) as client:
        while time.monotonic() < deadline:
            for run in client.read_flow_runs():
                if run.state is not None and run.state.is_paused():
                    return str(run.id)
            time.sleep(0.5)
    raise SystemExit("no run waits for its approval: did the form's Submit start one?")


def wait_until_completed(run: str) -> None:
    """Not by the page's text: its log says of every step that it is completed."""
    deadline = time.monotonic() + SHOWN_TIMEOUT_S
    with get_client(sync_client=True) as client:
        while (state := client.read_flow_run(UUID(run)).state) is None or not state.is_completed():
            if time.monotonic() > deadline or (state is not None and state.is_final()):
                raise SystemExit(f"the rollout is not completed, but {state}")
            time.sleep(0.5)


def artifact(run: str, key: str) -> str:
    """The newest artifact of that key."""
    with get_client(sync_client=True) as client:
        found = [one for one in client.read_artifacts() if one.key == key and str(one.flow_run_id) == run]
    return str(max(found, key=lambda one: one.created or 0).id)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=IMAGES)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, contextlib.ExitStack() as stack:
        root = Path(name)
        target_file = root / "rehearsal.yaml"
        page = stack.enter_context(browser(options.out))
        api = stack.enter_context(stage(root, target_file, "simulated"))
        stack.enter_context(temporary_settings({PREFECT_API_URL: api}))  # Prefect has read its environment already
        stack.enter_context(front_door(root, target_file, "simulated"))
        tour(page, api.removesuffix("/api"), deployments_of(api))


if __name__ == "__main__":
    main()

"""Run cells in a real Jupyter kernel, and write down what a browser would show: python notebook_cells.py CELLS.json SHOWN.json

A cell is {"code", "interrupts"}: the kernel is interrupted when the cell has printed "ready", and so many seconds later again
(no number: never). Its outcome is {"stdout", "stderr", "displays", "updates", "error", "took_s"}.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import time
from pathlib import Path
from typing import Any

from jupyter_client.manager import KernelManager, start_new_kernel


def outcome(manager: KernelManager, client: Any, cell: dict[str, Any]) -> dict[str, Any]:
    """Run one cell until the kernel is idle again."""
    found: dict[str, Any] = {"stdout": "", "stderr": "", "displays": {}, "updates": 0, "error": None}
    request = client.execute(cell["code"])
    began = time.monotonic()
    due: list[float] | None = None
    while True:
        if due is None and "ready" in found["stdout"]:
            due = [time.monotonic() + seconds for seconds in cell.get("interrupts", ())]
        if due and time.monotonic() > due[0]:
            due.pop(0)
            manager.interrupt_kernel()
        try:
            message = client.get_iopub_msg(timeout=0.1)
        except queue.Empty:
            if time.monotonic() > began + 200:
                raise TimeoutError(f"the kernel is still busy with:\n{cell['code']}\nshown: {found}") from None
            continue
        if message["parent_header"].get("msg_id") != request:
            continue
        kind, content = message["msg_type"], message["content"]
        if kind == "stream":
            found[content["name"]] += content["text"]
        elif kind == "error":
            found["error"] = {"name": content["ename"], "says": content["evalue"], "alive": manager.is_alive()}
        elif kind in ("display_data", "update_display_data"):
            name = content["transient"].get("display_id") or f"unnamed {len(found['displays'])}"
            found["displays"][name] = content["data"]["text/plain"]
            found["updates"] += kind == "update_display_data"
        elif kind == "status" and content["execution_state"] == "idle":
            return {**found, "displays": list(found["displays"].values()), "took_s": time.monotonic() - began}


def main() -> None:
    """All cells in one kernel."""
    os.environ.pop("PYTEST_CURRENT_TEST", None)  # with it, ipykernel leaves what other processes print to pytest
    cells, shown = Path(sys.argv[1]), Path(sys.argv[2])
    manager, client = start_new_kernel(kernel_name="python3", startup_timeout=120)
    try:
        shown.write_text(json.dumps([outcome(manager, client, cell) for cell in json.loads(cells.read_text())]))
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


if __name__ == "__main__":
    main()

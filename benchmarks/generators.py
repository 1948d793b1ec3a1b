"""Who generates the load, on a core of its own: wrk where it is installed, else ``load.py``."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.peers import HERE
from benchmarks.servers import LOAD_CORE, LOG, pin
from benchmarks.workloads import Workload

# Requests are made once; the summary counts those that were not answered with 2xx or 3xx as errors.
SCRIPT = """
local paths, requests, n = {{{paths}}}, {{}}, 0
init = function() for i, path in ipairs(paths) do requests[i] = wrk.format("GET", path) end end
request = function() n = n % #requests + 1; return requests[n] end
done = function(summary)
    local refused = summary.errors.status
    print("answered", summary.requests - refused, "refused", refused, "seconds", summary.duration / 1e6)
end
"""


@cache
def wrk() -> str | None:
    """Where wrk is installed, if it is."""
    return shutil.which("wrk")


def generate(port: int, workload: Workload, seconds: int) -> tuple[int, float]:
    """Ask for the workload's paths: how many requests were answered 200, and in how many seconds.

    wrk takes a tenth of the processor that a generator in Python does, which leaves more to PostgreSQL; but it cannot
    read slowly.

    Raises:
        RuntimeError: A request was answered otherwise; its rate would say nothing.
    """
    if wrk() is None or workload.slow_readers:
        options = [f"--clients={workload.clients}", f"--slow={workload.slow_readers}", f"--seconds={seconds}"]
        return _run([sys.executable, str(HERE / "load.py"), str(port), *workload.paths, *options])
    with TemporaryDirectory() as directory:
        script = Path(directory) / "paths.lua"
        script.write_text(SCRIPT.format(paths=", ".join(f'"{path}"' for path in workload.paths)))
        options = ["-t1", f"-c{workload.clients}", f"-d{seconds}s", "--timeout=60s", f"--script={script}"]
        return _run([str(wrk()), *options, f"http://127.0.0.1:{port}"])


def _run(command: list[str]) -> tuple[int, float]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    pin(process.pid, LOAD_CORE)
    output, _ = process.communicate()
    found = re.search(r"^answered\s+(\d+)\s+refused\s+(\d+)\s+seconds\s+(\S+)", output, re.MULTILINE)
    if found is None or found[2] != "0":
        raise RuntimeError(f"not every answer was 200, see {LOG}:\n{output}")
    return int(found[1]), float(found[3])

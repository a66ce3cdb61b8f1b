"""A run that is stopped goes on with the same command, from the very update at which it stopped.

python examples/resume.py                   # drawn faces, a minute
python examples/resume.py FLAG ...          # flags of `facefast train`: --data.root DIR --model.source WEIGHTS
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

RUN = Path("runs/stopped")
SHORT = ["--phases.scratch.steps=20", "--phases.pretrain.steps=20", "--phases.finetune.steps=20"]
command = [sys.executable, "-m", "facefast.train", *(sys.argv[1:] or SHORT), "--out", str(RUN), "--log-every=1"]


def updates() -> list[int]:
    """Numbers of the updates that the run has written down."""
    log = RUN / "metrics.jsonl"
    whole = log.read_text().rpartition("\n")[0].splitlines() if log.exists() else []  # the last may be half written
    return [line["step"] for line in map(json.loads, whole) if line["split"] == "train"]


shutil.rmtree(RUN, ignore_errors=True)  # of an earlier try
run = subprocess.Popen(command)
while run.poll() is None and len(updates()) < 5:
    time.sleep(0.1)
run.send_signal(signal.SIGTERM)  # what a cluster sends before it takes the machine away
print(f"exit code {run.wait()} after {len(updates())} updates", flush=True)  # 75: stopped, and resumable
print("\nthe same command again:", flush=True)
print(f"exit code {subprocess.run(command).returncode} after {len(updates())} updates")
print("each update once, in order:", updates() == list(range(1, len(updates()) + 1)))

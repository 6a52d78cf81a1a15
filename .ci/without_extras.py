"""Checks the installed packages without their extras: the imports, and what the command says.

`tox -e bare` runs it in an environment with nothing else.
"""

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

for name in ("jinja2", "matplotlib", "pandas", "sklearn", "scipy", "tyro"):
    if importlib.util.find_spec(name):
        sys.exit(f"{name} is installed here, so nothing shows what works without it")

subprocess.run(
    [sys.executable, "-I", "-c", "import masked_layers, lottery_ticket_pruner"], check=True
)
command = Path(sysconfig.get_path("scripts")) / "lottery-ticket"
said = subprocess.run([command, "run"], capture_output=True, text=True)
print(said.stderr, end="")
if said.returncode != 2 or said.stdout or "Traceback" in said.stderr:
    sys.exit(f"`lottery-ticket run` ended with {said.returncode}")
if 'pip install "lottery-ticket-pruner[cli]"' not in said.stderr:
    sys.exit("`lottery-ticket run` does not say what to install")

"""Installs the given packages with pip, of each the oldest version that its requirement allows.

Usage: python install_oldest.py [PIP ARGUMENT ...]

`keras>=3.15` installs 3.15.0. A version that does not exist, or that another package excludes, is
an error of pip: the requirement in pyproject.toml then promises what cannot be had.
"""

import re
import subprocess
import sys

# A requirement starts with its name; options of pip with a dash, and files with none of both.
oldest = [
    re.sub(r"^([A-Za-z][\w.-]*(?:\[[\w,]+\])?)>=", r"\1==", argument) for argument in sys.argv[1:]
]
sys.exit(subprocess.call([sys.executable, "-I", "-m", "pip", "install", *oldest]))

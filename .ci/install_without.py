"""Installs the given packages with pip, except one distribution.

Usage: python install_without.py NAME [PIP ARGUMENT ...]
"""

import re
import subprocess
import sys

left_out, *arguments = sys.argv[1:]
kept = [
    argument
    for argument in arguments
    # A requirement starts with its name: tensorflow, tensorflow>=2.20, tensorflow[extra] ; marker
    if re.split(r"[\s<>=!~;\[@]", argument, maxsplit=1)[0].lower() != left_out.lower()
]
sys.exit(subprocess.call([sys.executable, "-m", "pip", "install", *kept]))

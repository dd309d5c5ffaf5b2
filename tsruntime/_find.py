"""Where the executable is."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

NAME = "tsruntime"


def find_executable() -> Path:
    """The executable installed with this package: in this environment's scripts folder, in the user's or in a
    `--target` folder's `bin`; else the one on PATH. FileNotFoundError, naming all these, if there is none.
    """
    folders = [
        Path(sysconfig.get_path("scripts")),
        Path(sys.executable).parent,
        Path(sysconfig.get_path("scripts", scheme=sysconfig.get_preferred_scheme("user"))),
        Path(__file__).resolve().parent.parent / "bin",
    ]
    for folder in folders:
        executable = folder / NAME
        if executable.is_file() and os.access(executable, os.X_OK):
            return executable
    found = shutil.which(NAME)
    if found is not None:
        return Path(found)
    searched = ", ".join(map(str, dict.fromkeys(folders)))
    raise FileNotFoundError(
        f"the executable {NAME} is in none of {searched}, nor on PATH: reinstall the package"
    )

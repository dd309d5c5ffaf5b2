"""What the compiler reads beside its own code: models/, templates/ and csrc/launch_abi.h."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# The wheel carries them as the package's data (.wheel.data); in a clone they lie beside the package.
ROOT = _PACKAGE / "data" if (_PACKAGE / "data").is_dir() else _PACKAGE.parent
MODELS = ROOT / "models"
TEMPLATES = ROOT / "templates"
LAUNCH_ABI = ROOT / "csrc" / "launch_abi.h"

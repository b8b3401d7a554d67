"""Run a script of timm's repository with the zoo's models registered.

    python -m dcp_zoo.timm_run validate.py IMAGES --model dcp_vitb16.imagenet-16shot --pretrained

validate.py, inference.py, benchmark.py and onnx_export.py have no hook for plug-ins. train.py has one, and does not
need this module: `train.py --device-modules dcp_zoo ...`.
"""

import runpy
import sys
from pathlib import Path

import dcp_zoo  # noqa: F401  the models register when the script imports timm


def main() -> None:
    """Run the script given by the first argument with the remaining arguments."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        script = f"There is no script {sys.argv[1]!r}. " if len(sys.argv) > 1 else ""
        sys.exit(f"{script}Usage: python -m dcp_zoo.timm_run SCRIPT [ARGUMENTS], with a script of timm's repository.")
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))  # as Python does for a script
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()

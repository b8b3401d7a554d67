"""`python -m dcp_zoo.timm_script SCRIPT ARGUMENTS` runs a script of timm's repository, such as validate.py,
with the zoo's models in timm's registry. Most of these scripts cannot import a package themselves."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":  # the package is imported by now, and registers the models as soon as timm is
    del sys.argv[0]
    script = Path(sys.argv[0] if sys.argv else "")
    if not script.is_file():
        sys.exit("Pass the path of train.py, validate.py, benchmark.py or inference.py in a checkout of timm.")
    runpy.run_path(str(script), run_name="__main__")

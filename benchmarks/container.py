"""The disk space that hub/docker/Dockerfile needs on top of its base image, part by part, without Docker.

    python benchmarks/container.py      writes results/container.csv in a minute; needs '.[export]' and the network

It installs what the Dockerfile installs, for its Python on x86-64 Linux, into folders, and adds up the files' sizes.
"""

import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "hub" / "docker"
RESULTS = Path(__file__).parent / "results" / "container.csv"
PLATFORMS = [f"--platform=manylinux_2_{version}_x86_64" for version in (17, 27, 28)]  # of the base image's packages
PIP = (sys.executable, "-m", "pip", "--quiet")


def main() -> None:
    """Install, export and measure."""
    text = (DOCKER / "Dockerfile").read_text()
    base, version = re.findall(r"^FROM (python:([\d.]+)-\S+)$", text, re.MULTILINE)[-1]
    (head,) = re.findall(r"^ARG HEAD=(\S+)$", text, re.MULTILINE)
    with TemporaryDirectory() as folder:
        checkout, wheels, own, others = (
            Path(folder, name) for name in ("checkout", "wheels", "package", "dependencies")
        )
        checkout.mkdir()
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(["tar", "--extract"], cwd=checkout, input=archive, check=True)
        subprocess.run([*PIP, "wheel", "--no-deps", "--wheel-dir", wheels, checkout], check=True)
        to_base = [f"--python-version={version}", "--only-binary=:all:", *PLATFORMS]
        subprocess.run([*PIP, "install", "--target", own, "--no-deps", *wheels.iterdir()], check=True)
        requirements = ["--requirement", DOCKER / "requirements.txt"]
        subprocess.run([*PIP, "install", "--target", others, *to_base, *requirements], check=True)
        model = Path(folder, "model", "model.onnx")
        model.parent.mkdir()
        subprocess.run([sys.executable, "-m", "dcp_zoo", "export", "--head", head, "--output", model], check=True)
        rows = [{"part": part.name, "mb": megabytes(part)} for part in (others, own, model.parent)]
    pd.DataFrame(rows).assign(base=base, head=head).to_csv(RESULTS, index=False)
    print(RESULTS.read_text())


def megabytes(folder: Path) -> float:
    """The size of all files in a folder."""
    return round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6, 1)


if __name__ == "__main__":
    main()

"""A Hub for the tests: olah, in a separate environment, serving local git repositories on a free port."""

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock
from helpers import until

OLAH = "olah==0.5.4"
CONFIG = Path(__file__).parents[1] / "hub" / "mirror" / "olah.toml"
GIT = ["git", "-c", "user.name=tests", "-c", "user.email=tests@example.org", "-c", "init.defaultBranch=main"]


def olah_command() -> Path:
    """olah's command in a cached separate environment, created on the first call; skips the test if pip cannot."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dcp_zoo_tests"
    folder = cache / f"{OLAH}-python{sys.version_info.major}.{sys.version_info.minor}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "ready").exists():
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            done = subprocess.run(
                [folder / "bin/pip", "install", "-q", OLAH], capture_output=True, text=True, check=False
            )
            if done.returncode:
                pytest.skip(f"pip cannot install {OLAH}: {done.stderr.strip().splitlines()[-1]}")
            (folder / "ready").touch()
    return folder / "bin/olah-cli"


class Hub:
    """A running Hub: `url` is the value for HF_ENDPOINT, `add` adds repositories."""

    def __init__(self, root: Path) -> None:
        self.mirrors, self.root = root / "mirrors", root
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def add(self, repo_id: str, files: dict[str, Path], tag: str | None = None) -> str:
        """Commit files to a repository, weights as LFS objects as on the real Hub; returns the commit."""
        repo = self.mirrors / "models" / repo_id
        if not repo.exists():
            subprocess.run([*GIT, "init", "-q", repo], check=True)
        for name, source in files.items():
            if name.endswith(".safetensors"):
                digest = hashlib.sha256(source.read_bytes()).hexdigest()
                stored = repo / ".git/lfs/objects" / digest[:2] / digest[2:4] / digest
                stored.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, stored)
                pointer = (
                    f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {stored.stat().st_size}\n"
                )
                (repo / name).write_text(pointer)
            else:
                shutil.copy(source, repo / name)
        git = [*GIT, "-C", repo]
        subprocess.run([*git, "add", "-A"], check=True)
        subprocess.run([*git, "commit", "-q", "-m", "files"], check=True)
        if tag:
            subprocess.run([*git, "tag", tag], check=True)
        return subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()

    def is_up(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.url}/", timeout=2)
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True


@contextmanager
def serve(root: Path) -> Iterator[Hub]:
    """Run olah with the configuration documented in `hub/mirror/`, except for its paths and port."""
    hub = Hub(root)
    text = CONFIG.read_text().replace('"/srv/hub"', f'"{hub.mirrors}"').replace("/srv/hub-cache", f"{root}/cache")
    (root / "olah.toml").write_text(text.replace("8090", str(hub.port)).replace("0.0.0.0", "127.0.0.1"))
    hub.mirrors.mkdir(parents=True)
    with (root / "olah.out").open("w") as out:
        server = subprocess.Popen([olah_command(), "--config", root / "olah.toml"], cwd=root, stdout=out, stderr=out)
        try:
            until(lambda: hub.is_up() or server.poll() is not None)
            assert hub.is_up(), (root / "olah.out").read_text()
            yield hub
        finally:
            server.terminate()
            server.wait(10)

"""Runs one and the same operator library in several releases of ONNX Runtime, and prints a table of what came.

    python tests/versions/run_matrix.py [--folder build/versions] [RELEASE ...]

Each release gets an environment of its own with onnxruntime and numpy. Without releases: the oldest of a list that can
be installed for this Python, one in the middle, and the newest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.append(str(Path(__file__).resolve().parents[2] / "runtime"))  # where it is not installed

from versions.cases import write_cases  # its folder has to be known first

from blockpress_runtime import library_path

HERE = Path(__file__).resolve().parent
OLD = ("1.18.1", "1.19.2", "1.20.1", "1.22.1", "1.23.2", "1.24.4")  # not all have wheels for every Python
MIDDLE = ("1.24.4", "1.27.0")
NEWEST = "newest"


def environment(release: str, folder: Path) -> Path | None:
    """The interpreter of an environment with the release; None where no wheel of it fits."""
    home = folder / release
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    python = home / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    packages = ["onnxruntime"] if release == NEWEST else [f"onnxruntime=={release}"]
    if release.startswith("1.18."):
        packages.append("numpy<2")  # what it was built against
    install = [str(python), "-m", "pip", "install", "--quiet", "--only-binary", ":all:", *packages]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    return python if done.returncode == 0 else None


def run_check(python: Path, cases: Path) -> list[object] | None:
    """The line of JSON of check.py; None where a model did not do what it should."""
    command = [str(python), str(HERE / "check.py"), str(library_path()), str(cases)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
        return None
    found: list[object] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Run the matrix; 1 where a release failed or none could be installed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("build/versions"))
    parser.add_argument("releases", nargs="*", metavar="RELEASE")
    asked = parser.parse_args()
    cases = asked.folder / "cases"
    shutil.rmtree(
        cases, ignore_errors=True
    )  # those of an earlier library, which may not be what this one makes
    cases.mkdir(parents=True)
    write_cases(cases)
    print(
        "| ONNX Runtime | numpy | right | broken refused | largest error |\n|---|---|---|---|---|", flush=True
    )
    failed, ran = 0, 0
    for group in [(release,) for release in asked.releases] or (OLD, MIDDLE, (NEWEST,)):
        for release in group:
            python = environment(release, asked.folder)
            if python is None:
                print(f"{release} has no wheel for this Python", file=sys.stderr)
                continue
            row = run_check(python, cases)
            ran += 1
            failed += row is None
            if row is not None:
                version, numpy, right, refused, worst = row
                print(f"| {version} | {numpy} | {right} | {refused} | {worst:.1e} |", flush=True)
            break
    return 1 if failed or not ran else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Run the test-suite of the installed PEFT against the tuners of this package.

    python tests/peft_suite/run.py [pytest arguments]

PEFT's source distribution carries its tests. They are downloaded once per version into
`build/peft-sdist`, so that the suite always matches the installed library, and run unchanged but
for the methods and models that they are parametrised with (`plugin.py`). What cannot apply to a
method is listed in `not_applicable.py`, each with its reason. One method: `-k AuroraConfig`.
"""

import importlib.metadata
import os
import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / "build" / "peft-sdist"
SUITES = ("test_decoder_models.py", "test_config.py", "test_custom_models.py")


def fetch(version: str) -> Path:
    """Folder of the unpacked source distribution of this PEFT version."""
    folder = CACHE / f"peft-{version}"
    if not (folder / "tests" / "testing_common.py").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", ":all:", "--dest", str(CACHE), f"peft=={version}"]
        subprocess.run(command, check=True)
        with tarfile.open(CACHE / f"peft-{version}.tar.gz") as archive:
            archive.extractall(CACHE, filter="data")
    (folder / "tests" / "__init__.py").touch()  # its modules import each other as a package
    return folder


def main(arguments: list[str]) -> int:
    """Exit status of pytest over the suites."""
    folder = fetch(importlib.metadata.version("peft"))
    command = [sys.executable, "-m", "pytest", "-p", "plugin", "-p", "no:cacheprovider"]
    command += ["-c", str(HERE / "suite.ini"), "--rootdir", str(folder), "-q"]
    command += [str(folder / "tests" / suite) for suite in SUITES] + arguments
    paths = [str(HERE), str(folder), str(HERE.parents[1])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m bench [pytest options]`: run every benchmark, write one JSON record of the run."""

import datetime
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def main() -> int:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True
    ).stdout.strip()
    name = f"{datetime.date.today():%Y-%m-%d}-cpu-{commit or 'unknown'}.json"
    record = HERE / "results" / name
    record.parent.mkdir(exist_ok=True)
    code = pytest.main(
        [
            str(HERE),
            "-p",
            "no:xdist",
            "--benchmark-sort=name",
            "--benchmark-columns=min,median,iqr,rounds",
            "--benchmark-group-by=group",
            f"--benchmark-json={record}",
            *sys.argv[1:],
        ]
    )
    print(f"record: {record.relative_to(HERE.parent)}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())

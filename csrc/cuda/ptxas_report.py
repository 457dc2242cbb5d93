"""Runs nvcc for CMake and keeps what `-Xptxas -v` says of the kernels beside the object.

    ptxas_report.py report|error NVCC ARGUMENT...

The report lies in OBJECT.ptxas. "error": a kernel that spills registers or uses stack fails the
compilation, and its object is removed; "report": it is named. Other messages pass through.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Usage(NamedTuple):
    """One kernel, or device function that was not inlined, for one architecture."""

    function: str
    architecture: str
    registers: int  # 0: not a kernel
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def clean(self) -> bool:
        return not (self.stack or self.spill_stores or self.spill_loads)


_ENTRY = re.compile(r"Compiling entry function '(.+?)' for '(.+?)'")
_FUNCTION = re.compile(r"Function properties for (\S+)")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


def parse(report: str) -> list[Usage]:
    """Every function that ptxas describes in `report`."""
    found: list[Usage] = []
    function, architecture = "", ""
    for line in report.splitlines():
        if match := _ENTRY.search(line):
            architecture = match[2]
        elif match := _FUNCTION.search(line):
            function = match[1]
        elif match := _STACK.search(line):
            found.append(Usage(function, architecture, 0, *map(int, match.groups())))
        elif (match := _REGISTERS.search(line)) and found:
            found[-1] = found[-1]._replace(registers=int(match[1]))
    return found


def is_report(line: str) -> bool:
    return line.startswith("ptxas info") or _STACK.search(line) is not None


def main() -> int:
    mode, *command = sys.argv[1:]
    result = subprocess.run(command, capture_output=True, text=True)
    lines = (result.stdout + result.stderr).splitlines()
    messages = [line for line in lines if not is_report(line)]
    if messages:
        print("\n".join(messages), file=sys.stderr)
    if result.returncode != 0 or "-o" not in command:
        return result.returncode
    output = Path(command[command.index("-o") + 1])
    if output.suffix != ".o":
        return 0
    report = "\n".join(line for line in lines if is_report(line))
    output.with_name(output.name + ".ptxas").write_text(report + "\n")
    dirty = [usage for usage in parse(report) if not usage.clean]
    for usage in dirty:
        print(
            f"{mode}: {usage.function} for {usage.architecture}: {usage.stack} bytes of stack, "
            f"{usage.spill_stores} bytes spilled, {usage.spill_loads} read back",
            file=sys.stderr,
        )
    if dirty and mode == "error":
        output.unlink(missing_ok=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Compare the type errors of every package with the number that type_errors.json allows.

Run by `make types`. A package with more errors than allowed fails. With fewer, the number has to be lowered, so that it
only ever falls. A package that is not listed allows none.
"""

from __future__ import annotations

import collections
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ALLOWED = ROOT / "tests" / "type_errors.json"


def main() -> None:
    """Run mypy over all packages and exit with 1 if one of them has more errors than allowed."""
    allowed: dict[str, int] = json.loads(ALLOWED.read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "mypy", "--no-error-summary", *allowed]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode not in (0, 1):  # 2 and above: mypy itself failed, for example on a syntax error
        sys.exit(result.stdout + result.stderr)
    errors = collections.defaultdict(list)
    for line in result.stdout.splitlines():
        if ": error: " in line:
            errors[line.split("/")[0]].append(line)
    failed = False
    for package in sorted({*allowed, *errors}):
        found, most = len(errors[package]), allowed.get(package, 0)
        if found > most:
            failed = True
            print("\n".join(errors[package]))
            print(f"{package}: {found} type errors, at most {most} are allowed ({ALLOWED.name})")
        elif found < most:
            print(f"{package}: {found} type errors: lower the {most} in {ALLOWED.relative_to(ROOT)}")
        else:
            print(f"{package}: {found} type errors")
    sys.exit(failed)


if __name__ == "__main__":
    main()

"""Whether the libraries that are installed are of versions known to work together.

The ranges are the package's own requirements, as they were installed with it. The exact versions of
a whole environment that works are in `constraints.txt`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator


def warn_of_unknown(extra: str | None = None) -> None:
    """Print a line on stderr for each library of a version that is not known to work here.

    extra: the extra whose libraries are about to be used; None: those that every run uses.
    """
    for line in unknown(extra):
        print(f"warning: {line}", file=sys.stderr)


def install_command(extra: str | None = None) -> str:
    """What installs this checkout, with an extra of its, in versions that work together."""
    what = f"'.[{extra}]'" if extra else "."
    return f"pip install -c constraints.txt -e {what}"


def unknown(extra: str | None = None) -> Iterator[str]:
    """What is installed, what is known to work, and the command that installs that."""
    # `--help` is to be spared both imports.
    from importlib import metadata

    from packaging.requirements import InvalidRequirement, Requirement

    try:
        lines = metadata.requires("proglayer") or []
    except metadata.PackageNotFoundError:
        return  # a checkout that was never installed says nothing about versions
    for line in lines:
        of_extra = re.search(r"extra == ['\"]([^'\"]+)", line)
        if (of_extra and of_extra[1]) != extra:
            continue
        try:
            requirement = Requirement(line)
            installed = metadata.version(requirement.name)
        except (InvalidRequirement, metadata.PackageNotFoundError):
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            yield (
                f"{requirement.name} {installed} is not known to work here (known: "
                f"{requirement.specifier}): {install_command(extra)}"
            )

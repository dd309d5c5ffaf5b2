"""`python -m tsruntime`: the executable, with the same arguments."""

import os
import sys

from tsruntime._find import find_executable


def main() -> None:
    executable = str(find_executable())
    os.execv(executable, [executable, *sys.argv[1:]])


if __name__ == "__main__":
    main()

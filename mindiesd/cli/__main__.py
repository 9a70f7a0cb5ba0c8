"""``python -m mindiesd.cli``: the same as ``mindiesd-run``."""

import os
import sys

# python -m puts the current directory first; no file there is meant for the launcher.
if sys.path and sys.path[0] in ("", os.getcwd()):
    del sys.path[0]

from mindiesd.cli import main

if __name__ == "__main__":
    sys.exit(main())

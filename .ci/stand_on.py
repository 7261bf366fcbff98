"""Makes a virtual environment that stands on another one: ``.venv/bin/python .ci/stand_on.py FOLDER``.

The new one sees all packages of the one whose Python runs this, pip and packages installed in place among them. What is
installed into it goes into its own folder, and comes first where both have a package.
"""

import sys
import sysconfig
import venv
from pathlib import Path


def main(folder):
    venv.create(folder, clear=True, symlinks=True)
    below = sysconfig.get_path("purelib")
    # addsitedir, as the .pth files of that folder have to be read, too.
    line = f"import site; site.addsitedir({below!r})\n"
    Path(sysconfig.get_path("purelib", vars={"base": folder}), "below.pth").write_text(line)


if __name__ == "__main__":
    main(*sys.argv[1:])

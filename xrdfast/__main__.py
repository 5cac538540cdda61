"""`python -m xrdfast`: the command line of `xrdfast.cli`, from a source tree too."""

from __future__ import annotations

from xrdfast.cli import main

if __name__ == "__main__":
    main()

"""`python -m xrdfast`: the command line of `xrdfast.cli`, from a source tree too."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    try:
        from xrdfast.cli import main
    except ModuleNotFoundError as error:  # a source tree need not have what only the command line uses
        print(
            f"xrdfast: error: {error.name}: package: must be installed for the command line, got none "
            "(from Python, `xrdfast.Trainer` needs torch, numpy, safetensors and ninja alone)",
            file=sys.stderr,
        )
        sys.exit(2)
    main()

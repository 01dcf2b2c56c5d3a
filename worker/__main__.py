"""``python -m worker`` and the ``ffmpeg-worker`` script."""

from __future__ import annotations

import sys

from worker import cli


def main() -> int:
    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())

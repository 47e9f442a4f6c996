"""``python -m fastcls``: the command line."""

import sys

from fastcls.cli import main

sys.exit(main())

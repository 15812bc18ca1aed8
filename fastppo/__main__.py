"""`python -m fastppo` is the `fastppo` command."""

import sys

from fastppo.cli import main

sys.exit(main())

"""`python -m estune` is the `estune` command."""

import sys

from estune.cli import main

sys.exit(main())

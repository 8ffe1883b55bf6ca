"""`python -m bigmix.cli` is `bigmix`, where the console script is not on the PATH."""

import sys

from bigmix.cli import main

sys.exit(main())

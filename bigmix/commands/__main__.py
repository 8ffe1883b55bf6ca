"""`python -m bigmix.commands` is `bigmix`, where the console script is not on the PATH."""

import sys

from bigmix.commands.main import main

sys.exit(main())

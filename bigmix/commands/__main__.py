"""Makes `python -m bigmix.commands` the command `bigmix`, where that is not on the PATH."""

import sys

from bigmix.commands.main import main

sys.exit(main())

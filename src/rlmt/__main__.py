"""`python -m rlmt` is `rlmt`."""

import sys

from rlmt.cli import main

sys.exit(main())

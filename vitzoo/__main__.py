"""``python -m vitzoo``: the ``vitzoo`` command."""

import sys

from vitzoo_cli import main

sys.exit(main())

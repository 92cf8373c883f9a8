"""``python -m vitzoo_cli``: the ``vitzoo`` command without its script."""

import sys

from vitzoo_cli import main

sys.exit(main())

"""``python -m dendsam_deploy``: the same as ``dendsam-deploy``."""

import sys

from dendsam_deploy.cli.main import main

sys.exit(main())

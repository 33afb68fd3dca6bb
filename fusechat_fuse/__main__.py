"""`python -m fusechat_fuse`, `accelerate launch -m fusechat_fuse`: the same as the command `fusechat-fuse`."""

import os
import sys

from fusechat_fuse.processes import DIE_WITH_PARENT, die_with_parent

if DIE_WITH_PARENT in os.environ:
    die_with_parent()

from fusechat_fuse.cli import main  # after that, since the import takes time

sys.exit(main())

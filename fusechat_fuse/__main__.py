"""`python -m fusechat_fuse`, `accelerate launch -m fusechat_fuse`: the same as the command `fusechat-fuse`."""

import sys

from fusechat_fuse.cli import main

sys.exit(main())

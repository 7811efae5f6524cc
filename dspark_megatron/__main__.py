"""`python -m dspark_megatron`: the `dspark` command where nothing is installed."""

import sys

from dspark_megatron.cli.main import main

sys.exit(main())

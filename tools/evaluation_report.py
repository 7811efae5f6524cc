"""`dspark report` under the name of earlier versions."""

import sys

from dspark_megatron.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("report", sys.argv[1:], prog="tools/evaluation_report.py"))

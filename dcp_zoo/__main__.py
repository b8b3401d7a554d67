"""`python -m dcp_zoo` is `dcp-zoo`."""

from dcp_zoo.cli import main

main()

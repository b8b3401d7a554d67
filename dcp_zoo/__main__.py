"""`python -m dcp_zoo` is `dcp-zoo`; launchers such as torchrun start it this way."""

from dcp_zoo.cli import main

main()

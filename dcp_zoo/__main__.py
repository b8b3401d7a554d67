"""`python -m dcp_zoo` is `dcp-zoo`; launchers such as torchrun start it so."""

from .cli import main

main()

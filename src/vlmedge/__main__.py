"""python -m vlmedge."""

from vlmedge.cli import main

main()

"""`python -m lpvit_cli`: the command line without the console script."""

from lpvit_cli.cli import main

main()

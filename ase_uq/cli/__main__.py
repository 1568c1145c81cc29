"""`python -m ase_uq.cli`: the command line where no script is installed, as under a launcher of many processes."""

from ase_uq.cli import main

main()

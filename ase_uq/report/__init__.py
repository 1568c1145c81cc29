"""What was found, for people: figures. Needs matplotlib, `pip install "ase-uq[report]"`."""

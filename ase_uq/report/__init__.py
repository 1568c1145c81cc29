"""Results for people: figures, and a report as one page. Needs `pip install "ase-uq[report]"`."""

"""What a threshold is to achieve, and the number in eV/Å that achieves it. Numpy alone."""

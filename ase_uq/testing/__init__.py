"""Laws that every plugin must pass, as pytest classes: inherit from one, define how the plugin is made, and run pytest.

Importing this package needs pytest; nothing else in `ase_uq` imports this package.
"""

import pytest

# Failing asserts in the contracts then show their values, as in test files.
pytest.register_assert_rewrite("ase_uq.testing.backends", "ase_uq.testing.methods")

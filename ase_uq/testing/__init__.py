"""Laws that every plugin must pass, as classes for pytest: inherit one, say how the plugin is made, run.

pytest is needed to import this package, and nothing else in `ase_uq` imports it.
"""

import pytest

# So that failing asserts in the contracts show their values, as those in test files do.
pytest.register_assert_rewrite("ase_uq.testing.backends", "ase_uq.testing.methods")

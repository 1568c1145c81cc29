"""What people see while they wait, and of objects in a notebook."""

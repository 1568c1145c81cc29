"""What `fit` makes: heads, their calibrators, their combination, and the file that stores all of it."""

"""What `fit` makes: heads, calibrators, the combination of them, and the file that holds it all."""

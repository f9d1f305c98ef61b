"""How features of a class are synthesised from its attributes: one file per generator, and what they share."""

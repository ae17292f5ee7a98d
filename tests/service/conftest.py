"""A true keeper over a folder of its own, with a launcher that trains nothing."""

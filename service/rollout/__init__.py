"""How a candidate is proven and changed over to."""
